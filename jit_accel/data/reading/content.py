"""Keys of images by their encoded bytes: the same wherever and under whatever name it is stored."""

import errno
import hashlib
import os
import time

import pyarrow as pa

_EDGE = 4096  # bytes at either end, so that a key costs two small reads
UNREADABLE = 2**64 - 1
_PAUSES_S = (0.1, 0.3, 1.0)  # between attempts
_LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def content_key(data: bytes | memoryview) -> int:
    """Return a number below 2**64 that tells encoded images apart, from their size, beginning and end."""
    return _key(len(data), bytes(data[:_EDGE]), bytes(data[-_EDGE:]))


def file_key(path: str | os.PathLike) -> int:
    """`content_key` of a file, which is not read as a whole; OSError if it cannot be read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return _key(size, start, file.read(_EDGE))


def key_of(value: pa.Scalar | dict | bytes | str | None) -> int:
    """`content_key` of one undecoded value of an image column; of what cannot be read the largest number."""
    if isinstance(value, pa.StructScalar):
        value = value["bytes"] if value["bytes"].is_valid else value["path"]
    if isinstance(value, pa.Scalar):
        is_text = pa.types.is_string(value.type) or not value.is_valid
        value = value.as_py() if is_text else memoryview(value.as_buffer())  # not copied: only its ends count
    elif isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return patient_file_key(value) if isinstance(value, str) else content_key(value or b"")


def patient_file_key(path: str | os.PathLike) -> int:
    """`file_key`, tried again where the failure may pass; of what cannot be read the largest number."""
    for pause_s in (*_PAUSES_S, None):
        try:
            return file_key(path)
        except OSError as error:
            if pause_s is None or error.errno in _LASTING:
                break
        time.sleep(pause_s)
    return UNREADABLE


def _key(size: int, start: bytes, end: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(size.to_bytes(8, "little") + start + end, digest_size=8).digest(), "little")
