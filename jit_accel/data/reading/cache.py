"""The cache folder: copies of remote files, and findings that are true only while nothing changes.

Copies lie in its shards/, each fetched once by all processes of a machine. They take at most half of what is free or
theirs ($JIT_ACCEL_SHARD_CACHE_GIB: that many GiB), and those not used for longest give way. All may be deleted.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from filelock import FileLock

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file

RACY_NS = 2_000_000_000  # coarsest mtime of a usual file system (FAT: 2 s)
_VERSION = "3"  # of findings: another version's are not read
_IN_USE_S = 60.0  # a copy that was asked for so lately may be about to be opened
_DIGEST_SIZE = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return $JIT_ACCEL_CACHE, or a folder of the user's; it need not exist."""
    if named := os.environ.get("JIT_ACCEL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jit_accel"


def findings_file(kind: str, *key: str) -> Path:
    """Return the file for findings of this kind, in which `key` says of what they are."""
    return cache_folder() / f"{kind}-{_digest(_VERSION, *key)}"


def write_findings(file: Path, data: bytes) -> None:
    """Write what `read_findings` returns whole or not at all; not being able to is no error."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, durable=False) as temporary:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)


def read_findings(file: Path) -> pa.Buffer | None:
    """Return what was written there; None if there is nothing, or it is damaged."""
    try:
        data = pa.py_buffer(file.read_bytes())
    except OSError:
        return None
    digest, found = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
    return found if hashlib.sha256(found).digest() == digest.to_pybytes() else None


def cached_shard(key: str, name: str, num_bytes: int, fetch: Callable[[BinaryIO], None]) -> Path:
    """Return the copy that `key` names, made by `fetch` unless it is there; UserError if it cannot be written."""
    folder = cache_folder() / "shards"
    digest = _digest(key)
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


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]
