"""What the walks over data sets found, kept between runs, and true only while nothing has changed.

The files lie in $JIT_ACCEL_CACHE, or else in jit_accel/ of $XDG_CACHE_HOME or ~/.cache. They may be deleted at any
time; where they cannot be read or written, the work is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jit_accel.base.files import atomic_file
from jit_accel.data.formats.scan import RACY_NS, FolderScan, changed_ns, walk_folder

VERSION = "1"  # of what is in the files: another version's are not read
FILE_STATE = np.dtype([("path", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8")])  # path: a hash
_FILE_VALUE = np.dtype([*FILE_STATE.descr, ("value", "<u8")])
_DIGEST_SIZE = hashlib.sha256().digest_size  # before the contents: Arrow crashes on some damaged files


def cache_folder() -> Path:
    """Where the caches are; it need not exist."""
    if named := os.environ.get("JIT_ACCEL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jit_accel"


def scan_folder(root: str) -> FolderScan:
    """The images under `root`; walked only if any folder in it was changed since the last time."""
    scan = known_scan(root)
    if scan is None:
        scan = walk_folder(root)
        if scan.is_settled:
            _write(_index_file(root), lambda file: _write_scan(scan, file))
    return scan


def known_scan(root: str) -> FolderScan | None:
    """What the cache holds of the folder `root`, if that is still true."""
    try:
        table = pa.ipc.open_file(_read_sealed(_index_file(root))).read_all()
    except (OSError, pa.ArrowException):  # none, or a damaged one
        return None
    directories = pa.ipc.open_stream(table.schema.metadata[b"directories"]).read_all()
    directories = dict(zip(*(column.to_pylist() for column in directories.columns)))
    facts = json.loads(table.schema.metadata[b"scan"])
    if not _is_unchanged(root, directories, facts["doubtful"]):
        return None
    other_endings = Counter(facts.pop("other_endings"))
    return FolderScan(table.column(0), other_endings=other_endings, directories=directories, **facts)


def remembered(kind: str, files: list[str], look: Callable[[str], Any]) -> list[Any]:
    """`look(file)` of each file, a JSON value, from the cache where size and mtime are as they were.

    Args:
        kind: tells what is looked for; part of the key.
    """
    folders: dict[str, dict] = {}
    found, changed = [], set()
    for file in files:
        folder, name = os.path.split(os.path.realpath(file))
        if folder not in folders:
            folders[folder] = _read_facts(_facts_file(kind, folder))
        info = os.stat(file)
        state = [info.st_size, info.st_mtime_ns]
        held = folders[folder].get(name)
        if held is None or held[0] != state:
            held = folders[folder][name] = [state, look(file)]
            if info.st_mtime_ns < time.time_ns() - RACY_NS:
                changed.add(folder)
        found.append(held[1])
    for folder in changed:
        entries = {n: entry for n, entry in folders[folder].items() if entry[0][1] < time.time_ns() - RACY_NS}
        data = json.dumps([VERSION, entries]).encode("utf-8", "surrogateescape")
        _write(_facts_file(kind, folder), lambda path, data=data: path.write_bytes(data))
    return found


def remembered_once(kind: str, identity: str, look: Callable[[], Any]) -> Any:
    """`look()`, a JSON value, from the cache where `identity` was looked at before: it must tell every change."""
    path = cache_folder() / f"named-{_key(kind, identity)}.json"
    try:
        return json.loads(_read_sealed(path).to_pybytes())
    except (OSError, ValueError):
        found = look()
        _write(path, lambda file: _write_sealed(json.dumps(found).encode(), file))
        return found


def remembered_values(kind: str, root: str, states: np.ndarray, look: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A number of each of many small files, as `remembered`, but compact: one cache for all of them.

    Args:
        kind, root: name the cache; what is asked for replaces what is in it.
        states: `FILE_STATE` (n,), of a file that is missing with a negative size.
        look: the numbers uint64 (k,) of the files int64 (k,) that are not known; the largest is not remembered.
    """
    path = cache_folder() / f"values-{_key(kind, os.path.realpath(root))}.bin"
    try:
        held = np.frombuffer(_read_sealed(path), _FILE_VALUE)
    except (OSError, ValueError):
        held = np.empty(0, _FILE_VALUE)
    values, is_known = np.empty(len(states), np.uint64), np.zeros(len(states), bool)
    if len(held):
        places = np.minimum(np.searchsorted(held["path"], states["path"]), len(held) - 1)
        is_known = np.logical_and.reduce([held[name][places] == states[name] for name in FILE_STATE.names])
        values[is_known] = held["value"][places[is_known]]
    unknown = np.flatnonzero(~is_known)
    if len(unknown) == 0:
        return values
    started_ns = time.time_ns()
    values[unknown] = look(unknown)
    entries = np.empty(len(states), _FILE_VALUE)
    for name in FILE_STATE.names:
        entries[name] = states[name]
    entries["value"] = values
    is_settled = (states["mtime_ns"] > 0) & (states["mtime_ns"] < started_ns - RACY_NS) & (states["size"] >= 0)
    entries = entries[is_settled & (values != np.iinfo(np.uint64).max)]
    entries.sort(order="path")
    _write(path, lambda file: _write_sealed(entries.tobytes(), file))
    return values


def hash_strings(strings: pa.ChunkedArray, head: Iterable[str] = ()) -> str:
    """Sixteen hex digits of `head` and the strings, joined by zero bytes, without a Python object for each."""
    digest = hashlib.sha256("".join(part + "\0" for part in head).encode())
    for chunk in strings.chunks:
        for start in range(0, len(chunk), 2**18):
            part = chunk.slice(start, 2**18)
            row = pa.ListArray.from_arrays(pa.array([0, len(part)], pa.int32()), part)
            digest.update(pc.binary_join(row, "\0")[0].as_buffer())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def _is_unchanged(root: str, directories: dict[str, int], doubtful: list[str]) -> bool:
    try:
        found = [changed_ns(os.stat(os.path.join(root, prefix))) for prefix in directories]
    except OSError:
        return False
    return found == list(directories.values()) and not any(_is_readable(os.path.join(root, path)) for path in doubtful)


def _is_readable(path: str) -> bool:
    return os.path.exists(path) and (not os.path.isdir(path) or os.access(path, os.R_OK | os.X_OK))


def _write_scan(scan: FolderScan, path: Path) -> None:
    facts = {
        "metadata": scan.metadata,
        "other_endings": scan.other_endings,
        "unreadable": scan.unreadable,
        "doubtful": scan.doubtful,
    }
    changed = pa.array(scan.directories.values(), pa.int64())
    directories = pa.table({"path": pa.array(scan.directories, pa.string()), "changed_ns": changed})
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, directories.schema) as writer:
        writer.write_table(directories)
    schema = pa.schema(
        [("path", pa.string())], {"scan": json.dumps(facts), "directories": buffer.getvalue().to_pybytes()}
    )
    data = pa.BufferOutputStream()
    with pa.ipc.new_file(data, schema) as writer:
        writer.write_table(pa.table([scan.images], schema=schema))
    _write_sealed(data.getvalue(), path)


def _write_sealed(data: bytes | pa.Buffer, path: Path) -> None:
    path.write_bytes(hashlib.sha256(data).digest() + data)


def _read_sealed(path: Path) -> pa.Buffer:
    data = pa.py_buffer(path.read_bytes())
    if hashlib.sha256(data[_DIGEST_SIZE:]).digest() != data[:_DIGEST_SIZE].to_pybytes():
        raise OSError(f"{path} is damaged")
    return data[_DIGEST_SIZE:]


def _read_facts(path: Path) -> dict[str, list]:
    try:
        version, entries = json.loads(path.read_bytes())
        return {name: [list(state), value] for name, (state, value) in entries.items()} if version == VERSION else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _index_file(root: str) -> Path:
    return cache_folder() / f"folder-{_key(os.path.realpath(root))}.arrow"


def _facts_file(kind: str, folder: str) -> Path:
    return cache_folder() / f"files-{_key(kind, folder)}.json"


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((VERSION, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file whole, or not at all; not being able to is no error."""
    with contextlib.suppress(OSError, pa.ArrowException):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            write(temporary)
