"""Copies of remote files on this disk: each fetched once by all processes of a machine, and kept for later runs.

They lie in shards/ of the cache folder, take at most half of what is free or theirs ($JIT_ACCEL_SHARD_CACHE_GIB: that
many GiB), and give way to others when they were not used for longest.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file

_IN_USE_S = 60.0  # a copy that was asked for so lately may be about to be opened


def cache_folder() -> Path:
    """Return the folder of what is kept between runs, $JIT_ACCEL_CACHE or one of the user's; it need not exist."""
    if named := os.environ.get("JIT_ACCEL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jit_accel"


def cached_shard(key: str, name: str, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> Path:
    """Return the copy that `key` names, made by `fetch` unless it is there; UserError if it cannot be written."""
    folder = cache_folder() / "shards"
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    path = folder / f"{digest}-{name[-100:]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{digest[:2]}.lock"):
            if not path.is_file():
                _make_room(folder, num_bytes)
                with atomic_file(path, durable=False) as temporary, open(temporary, "wb") as file:
                    fetch(file)
            os.utime(path)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror or error}): copies of remote files are kept there; free "
            "some space, or name another folder by the environment variable JIT_ACCEL_CACHE."
        ) from error
    return path


def _make_room(folder: Path, num_bytes: int) -> None:
    """Remove the copies that were not used for longest until there is room for another."""
    held = []
    for path in folder.glob("*-*"):
        info = path.stat()
        held.append((info.st_mtime, getattr(info, "st_blocks", info.st_size // 512) * 512, path))
    total = sum(size for _, size, _ in held)
    limit = _limit_bytes(folder, total)
    for used_s, size, path in sorted(held):
        if total + num_bytes <= limit or used_s > time.time() - _IN_USE_S:
            return
        path.unlink(missing_ok=True)
        total -= size


def _limit_bytes(folder: Path, held: int) -> float:
    named = os.environ.get("JIT_ACCEL_SHARD_CACHE_GIB")
    if not named:
        return (shutil.disk_usage(folder).free + held) / 2
    try:
        return float(named) * 2**30
    except ValueError:
        raise UserError(f"JIT_ACCEL_SHARD_CACHE_GIB={named}: it is a number of GiB, as 200.") from None
