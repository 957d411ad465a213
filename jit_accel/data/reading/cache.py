"""Copies of remote files in the cache folder's shards/, each fetched once by all processes of a machine.

They take at most half of what is free or theirs ($JIT_ACCEL_SHARD_CACHE_GIB: that many GiB), and those not used for
longest give way. All may be deleted.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file
from jit_accel.base.findings import cache_folder, key_digest

RACY_NS = 2_000_000_000  # coarsest mtime of a usual file system (FAT: 2 s)
_IN_USE_S = 60.0  # a copy that was asked for so lately may be about to be opened


def cached_shard(key: str, name: str, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> Path:
    """Return the copy that `key` names, made by `fetch` unless it is there; UserError if it cannot be written."""
    folder = cache_folder() / "shards"
    digest = key_digest(key)
    path = folder / f"{digest}-{name[-100:]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{digest[:2]}.lock", poll_interval=0.01):
            try:
                os.utime(path)
            except FileNotFoundError:  # or just removed, by a process that makes room
                _make_room(folder, num_bytes)
                with atomic_file(path, durable=False) as temporary, open(temporary, "wb") as file:
                    fetch(file)
    except OSError as error:
        rule = f"{folder} cannot be written to ({error.strerror or error}): copies of remote files are kept there; "
        rule += "free some space, or name another folder by the environment variable JIT_ACCEL_CACHE."
        raise UserError(rule) from error
    return path


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove the copies that were not used for longest until there is room for another."""
    held = []
    for path in folder.glob("*-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or removed it
            info = path.stat()
            held.append((info.st_mtime, getattr(info, "st_blocks", info.st_size // 512) * 512, path))
    total, named = sum(size for _, size, _ in held), os.environ.get("JIT_ACCEL_SHARD_CACHE_GIB")
    try:
        limit = float(named) * 2**30 if named else (shutil.disk_usage(folder).free + total) / 2
    except ValueError:
        raise UserError(f"JIT_ACCEL_SHARD_CACHE_GIB={named}: it is a number of GiB, as 200.") from None
    for used_s, size, path in sorted(held):
        if total + num_bytes <= limit or used_s > time.time() - _IN_USE_S:
            return
        path.unlink(missing_ok=True)
        total -= size
