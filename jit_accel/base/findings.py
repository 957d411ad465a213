"""Findings that are true only while nothing changes, kept in the user's cache folder. All may be deleted."""

import contextlib
import hashlib
import os
from pathlib import Path

import pyarrow as pa

from jit_accel.base.files import atomic_file

_VERSION = "3"  # another version's are not read
_DIGEST_SIZE = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return $JIT_ACCEL_CACHE, or a folder of the user's; it need not exist."""
    if named := os.environ.get("JIT_ACCEL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jit_accel"


def findings_file(kind: str, *key: str) -> Path:
    """Return the file for findings of this kind, in which `key` says of what they are."""
    return cache_folder() / f"{kind}-{key_digest(_VERSION, *key)}"


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


def key_digest(*parts: str) -> str:
    """Return 24 hex digits that stand for these texts in the name of a file."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]
