"""Keys of images by their encoded bytes, the same wherever and under whatever name; read once and kept."""

import errno
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from jit_accel.base.findings import findings_file, read_findings, write_findings
from jit_accel.data.reading.cache import RACY_NS

log = logging.getLogger(__name__)
MANY_KEYS = 20_000  # to read more is announced
UNREADABLE = 2**64 - 1
_EDGE = 4096  # bytes at either end, so that a key costs two small reads
_PAUSES_S = (0.1, 0.3, 1.0)  # between attempts
_LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_FILES_AT_ONCE = 256
_FILE_STATE = np.dtype([("path", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8")])  # path: a hash
_FILE_KEY = np.dtype([("state", _FILE_STATE), ("key", "<u8")])


def content_key(data: bytes | memoryview) -> int:
    """Return a number below 2**64 that differs between encoded images, from their size, beginning and end."""
    return _key(len(data), bytes(data[:_EDGE]), bytes(data[-_EDGE:]))


def file_key(path: str | os.PathLike) -> int:
    """`content_key` of a file, which is not read as a whole; OSError if it cannot be read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return _key(size, start, file.read(_EDGE))


def _key(size: int, start: bytes, end: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(size.to_bytes(8, "little") + start + end, digest_size=8).digest(), "little")


def key_of(value: pa.Scalar | dict | bytes | str | None) -> int:
    """`content_key` of one undecoded value of an image column; of what cannot be read the largest number."""
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.ExtensionScalar):
        value = value.as_py()
    if isinstance(value, pa.StructScalar):
        value = value["bytes"] if value["bytes"].is_valid else value["path"]
    if isinstance(value, pa.Scalar):
        is_text = pa.types.is_string(value.type) or not value.is_valid
        value = value.as_py() if is_text else memoryview(value.as_buffer())  # not copied: only its ends count
    elif isinstance(value, list):  # an array in a table
        value = np.asarray(value).tobytes()
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


def announce_keys(count: int) -> None:
    """Warn that the start takes long, and why."""
    if count > MANY_KEYS:
        log.warning("reading the content keys of %s images for --holdout ...", f"{count:,}")


def file_keys(paths: list[str]) -> np.ndarray:
    """Return the content keys of files, uint64 (n,); those that are as they were are known without being read."""
    root = os.path.commonpath({os.path.abspath(folder) for folder in {os.path.dirname(path) for path in paths}})
    findings, started_ns = findings_file("values", os.path.realpath(root)), time.time_ns()
    keys, is_known = np.empty(len(paths), np.uint64), np.zeros(len(paths), bool)
    with ThreadPoolExecutor(16) as pool:  # a network's disk answers late, but many at once
        states = _of_many(pool, partial(_state, root), paths, _FILE_STATE)
        held = np.frombuffer(read_findings(findings) or b"", _FILE_KEY)
        if len(held):
            places = np.minimum(np.searchsorted(held["state"]["path"], states["path"]), len(held) - 1)
            is_known = held["state"][places] == states
            keys[is_known] = held["key"][places[is_known]]
        if is_known.all():
            return keys
        unknown = list(itertools.compress(paths, ~is_known))
        announce_keys(len(unknown))
        keys[~is_known] = _of_many(pool, patient_file_key, unknown, np.uint64)
    entries = np.empty(len(paths), _FILE_KEY)
    entries["state"], entries["key"] = states, keys
    is_settled = (states["mtime_ns"] > 0) & (states["mtime_ns"] < started_ns - RACY_NS) & (states["size"] >= 0)
    entries = entries[is_settled & (keys != UNREADABLE)]
    write_findings(findings, entries[np.argsort(entries["state"]["path"])].tobytes())
    return keys


def _of_many(pool: Executor, function: Callable, paths: list[str], dtype: np.dtype) -> np.ndarray:
    parts = [paths[start : start + _FILES_AT_ONCE] for start in range(0, len(paths), _FILES_AT_ONCE)]
    return np.concatenate(list(pool.map(lambda part: np.array([function(path) for path in part], dtype), parts)))


def _state(root: str, path: str) -> tuple[int, int, int]:
    """Return a `_FILE_STATE`, with the path as seen from `root`, whose own name does not matter."""
    digest = int.from_bytes(hashlib.blake2b(path.removeprefix(root).encode(), digest_size=8).digest(), "little")
    try:
        info = os.stat(path)
        return digest, info.st_size, info.st_mtime_ns
    except OSError:
        return digest, -1, 0
