"""The findings of walks over data sets, kept between runs in the cache folder, and true only while nothing changes.

The files may be deleted at any time; where they cannot be read or written, the work is done again.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jit_accel.base.files import atomic_file
from jit_accel.data.formats.scan import FolderScan, changed_ns, walk_folder
from jit_accel.data.reading.content import UNREADABLE
from jit_accel.data.reading.shard_cache import cache_folder
from jit_accel.data.reading.shards import RACY_NS, Shard, at_once

VERSION = "2"  # of what is in the files: another version's are not read
FILE_STATE = np.dtype([("path", "<u8"), ("size", "<i8"), ("mtime_ns", "<i8")])  # path: a hash
_FILE_VALUE = np.dtype([("state", FILE_STATE), ("value", "<u8")])
_DIGEST_SIZE = hashlib.sha256().digest_size  # before the contents: Arrow crashes on some damaged files


def scan_folder(root: str) -> FolderScan:
    """Return the images under `root`, which is walked only if any folder in it was changed since the last time."""
    scan = known_scan(root)
    if scan is None:
        scan = walk_folder(root)
        if scan.is_settled:
            facts = {name: value for name, value in vars(scan).items() if name != "images"}
            schema = pa.schema([("path", pa.string())], {"scan": json.dumps(facts)})
            data = pa.BufferOutputStream()
            with pa.ipc.new_file(data, schema) as writer:
                writer.write_table(pa.table([scan.images], schema=schema))
            _write(_index_file(root), _sealed(data.getvalue().to_pybytes()))
    return scan


def known_scan(root: str) -> FolderScan | None:
    """Return the kept scan of the folder `root`, if that is still true."""
    try:
        table = pa.ipc.open_file(_read_sealed(_index_file(root))).read_all()
        facts = json.loads(table.schema.metadata[b"scan"])
        changes = [changed_ns(os.stat(os.path.join(root, prefix))) for prefix in facts["directories"]]
    except (OSError, pa.ArrowException):  # none, a damaged one, or one of a folder that is gone
        return None
    doubtful = [path for name in facts["doubtful"] if os.path.exists(path := os.path.join(root, name))]
    is_better = any(not os.path.isdir(path) or os.access(path, os.R_OK | os.X_OK) for path in doubtful)
    if is_better or changes != list(facts["directories"].values()):
        return None
    return FolderScan(table.column(0), **facts | {"other_endings": Counter(facts["other_endings"])})


def remembered(kind: str, shards: Sequence[Shard], look: Callable[[Shard], Any]) -> list[Any]:
    """Return `look` of each file, a JSON value, from the cache where its size and mtime, or tag, are as they were.

    `kind` names what is looked for, and is part of the key.
    """
    identities = at_once(lambda shard: shard.identity(), shards)
    caches = {folder: cache_folder() / f"files-{_key(kind, folder)}.json" for folder, *_ in identities}
    facts = {folder: _read_facts(file) for folder, file in caches.items()}
    unknown = [n for n, (folder, name, state, _) in enumerate(identities) if facts[folder].get(name, [0])[0] != state]
    ask = at_once if shards[0].is_remote else map
    for n, found in zip(unknown, ask(look, [shards[n] for n in unknown])):
        folder, name, state, _ = identities[n]
        facts[folder][name] = [state, found]
    values = [facts[folder][name][1] for folder, name, *_ in identities]
    for folder, name, _, is_settled in identities:
        if not is_settled:
            del facts[folder][name]
    for folder in {identities[n][0] for n in unknown}:
        _write(caches[folder], json.dumps([VERSION, facts[folder]]).encode("utf-8", "surrogateescape"))
    return values


def remembered_values(kind: str, root: str, states: np.ndarray, look: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return a number of each of many small files, as `remembered`, but compact: one cache for all of them.

    `kind` and `root` name the cache, in which what is asked for replaces what is there. `states` are `FILE_STATE` (n,),
    of a file that is missing with a negative size. `look` returns the numbers uint64 (k,) of the files int64 (k,) that
    are not known; the largest is not remembered.
    """
    path = cache_folder() / f"values-{_key(kind, os.path.realpath(root))}.bin"
    try:
        held = np.frombuffer(_read_sealed(path), _FILE_VALUE)
    except (OSError, ValueError):
        held = np.empty(0, _FILE_VALUE)
    values, is_known = np.empty(len(states), np.uint64), np.zeros(len(states), bool)
    if len(held):
        places = np.minimum(np.searchsorted(held["state"]["path"], states["path"]), len(held) - 1)
        is_known = held["state"][places] == states
        values[is_known] = held["value"][places[is_known]]
    if is_known.all():
        return values
    started_ns = time.time_ns()
    values[~is_known] = look(np.flatnonzero(~is_known))
    entries = np.empty(len(states), _FILE_VALUE)
    entries["state"], entries["value"] = states, values
    is_settled = (states["mtime_ns"] > 0) & (states["mtime_ns"] < started_ns - RACY_NS) & (states["size"] >= 0)
    entries = entries[is_settled & (values != UNREADABLE)]
    _write(path, _sealed(entries[np.argsort(entries["state"]["path"])].tobytes()))
    return values


def hash_strings(strings: pa.ChunkedArray, head: Iterable[str] = ()) -> str:
    """Return sixteen hex digits of `head` and the strings, joined by zero bytes, without a Python object for each."""
    digest = hashlib.sha256("".join(part + "\0" for part in head).encode())
    for chunk in strings.chunks:
        for start in range(0, len(chunk), 2**18):
            part = chunk.slice(start, 2**18)
            row = pa.ListArray.from_arrays(pa.array([0, len(part)], pa.int32()), part)
            digest.update(pc.binary_join(row, "\0")[0].as_buffer())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def _sealed(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


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


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((VERSION, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _write(path: Path, data: bytes) -> None:
    """Write a file that is there complete or not at all; not being able to is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            temporary.write_bytes(data)
