"""`index.json`, the table of contents of a folder written by `python -m jit_accel.prepare`."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

from jit_accel.base.errors import UserError

INDEX = "index.json"
UNFINISHED = ".unfinished"
STORE_FORMAT = "jit_accel.prepared"
STORE_VERSION = 1
_FILE = {"file": str, "bytes": int, "sha256": str}
_TABLE_SHARD = _FILE | {"images": int, "row_groups": [int]}
_PIXELS_SHARD = _FILE | {"images": int, "table": _FILE}  # of encoding uint8
_INDEX = {  # the fields that are used, and their types
    "encoding": str,
    "img_size": int,
    "num_images": int,
    "num_bytes": int,
    "num_skipped": int,
    "is_labelled": bool,
    "class_names": [str],
    "settings": {},
    "shards": [{}],
}
_WORDS = {str: "text", int: "natural number", bool: "true or false", dict: "object", list: "list"}


def is_prepared(folder: str | os.PathLike) -> bool:
    """Return whether `jit_accel.prepare` wrote this folder, or began to."""
    if os.path.isfile(os.path.join(folder, UNFINISHED, "plan.json")):
        return True
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:  # an image folder may have an index.json of its own
        return STORE_FORMAT.encode() in file.read(200)


def read_index(folder: str | os.PathLike, about: str = "data_path") -> dict:
    """Read `index.json`, and check that the files it names are there in their sizes.

    UserError for no finished store, a later version, damage, and files that are missing, elsewhere or of another size.
    """
    path = Path(folder) / INDEX
    problem = partial(UserError, about=about, value=folder)
    if not path.is_file():
        if is_prepared(folder):
            raise problem("its preparation was not finished: run the same jit_accel.prepare command again.")
        raise problem(f"there is no {INDEX} of jit_accel.prepare: prepare it, or correct the path.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"] if index["format"] == STORE_FORMAT else None
        if version == STORE_VERSION:
            _check_index(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise problem(f"its {INDEX} is damaged ({error}): prepare the images again.") from None
    if version != STORE_VERSION:
        raise problem(
            f"its {INDEX} has the version {version}, this program reads {STORE_VERSION}: prepare the images "
            "again, or update jit_accel."
        )
    again = "copy it again, or prepare the images again."
    for file in files_of(index):
        name, expected = file["file"], file["bytes"]
        try:
            size = (Path(folder) / name).stat().st_size
        except OSError as error:
            raise problem(f"{name} is missing ({error.strerror}): {again}") from None
        if size != expected:
            raise problem(f"{name} has {size:,} bytes where {expected:,} were written: {again}")
    return index


def files_of(index: dict) -> list[dict]:
    """Return all files of a store, each with `file`, `bytes` and `sha256`."""
    return [file for shard in index["shards"] for file in (shard, shard.get("table")) if file]


def _check_index(index: dict) -> None:
    """Raise ValueError for what is missing or of another type, and for files elsewhere than in the folder."""
    _check_shape(index, _INDEX, INDEX)
    if not index["shards"]:
        raise ValueError("shards is empty")
    _check_shape(index["shards"], [_PIXELS_SHARD if index["encoding"] == "uint8" else _TABLE_SHARD], "shards")
    for name in (file["file"] for file in files_of(index)):
        if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise ValueError(f"{name!r} is no name of a file in this folder")


def _check_shape(value: object, shape: object, name: str, of: str = "") -> None:
    """Raise ValueError unless `value` is of a type, a list of such, or a dict with such fields, as `shape` is one."""
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"{name} is no {of}{_WORDS[kind]}")
    if isinstance(shape, list):
        for item in value:
            _check_shape(item, shape[0], name, "list of ")
    elif isinstance(shape, dict):
        for field, kind in shape.items():
            if field not in value:
                raise ValueError(f"{field} is missing")
            _check_shape(value[field], kind, field)


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
