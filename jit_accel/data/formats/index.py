"""`index.json`: what a folder written by `python -m jit_accel.prepare` holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jit_accel.base.errors import UserError

INDEX = "index.json"
UNFINISHED = ".unfinished"
STORE_FORMAT = "jit_accel.prepared"
STORE_VERSION = 1
_CHUNK_BYTES = 2**20
_FIELDS = {  # that are used, and their types; [type]: a list of these
    "encoding": str,
    "img_size": int,
    "num_images": int,
    "num_bytes": int,
    "num_skipped": int,
    "is_labelled": bool,
    "class_names": [str],
    "settings": dict,
    "shards": [dict],
}
_FILE_FIELDS = {"file": str, "bytes": int, "sha256": str}
_PIXELS_FIELDS = _FILE_FIELDS | {"images": int, "table": dict}  # of encoding uint8
_TABLE_FIELDS = _FILE_FIELDS | {"images": int, "row_groups": [int]}
_TYPE_NAMES = {str: "text", int: "natural number", bool: "true or false", dict: "object"}


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether `jit_accel.prepare` wrote this folder, or began to."""
    if os.path.isfile(os.path.join(folder, UNFINISHED, "plan.json")):
        return True
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:  # an image folder may have an index.json of its own
        return STORE_FORMAT.encode() in file.read(200)


def read_index(folder: str | os.PathLike, about: str = "data_path") -> dict:
    """Read `index.json`, and check that the files it names are there in their sizes.

    Raises:
        UserError: no finished store, of a later version, damaged, files missing or of another size or elsewhere.
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise problem(f"its {INDEX} is damaged ({error}): prepare the images again.") from None
    if version != STORE_VERSION:
        raise problem(
            f"its {INDEX} has the version {version}, this program reads {STORE_VERSION}: prepare the images "
            "again, or update jit_accel."
        )
    try:
        _check_index(index)
    except ValueError as error:
        raise problem(f"its {INDEX} is damaged ({error}): prepare the images again.") from None
    for file in files_of(index):
        _check_size(Path(folder) / file["file"], file["bytes"], problem)
    return index


def files_of(index: dict) -> list[dict]:
    """All files of a store, each with `file`, `bytes` and `sha256`."""
    return [file for shard in index["shards"] for file in (shard, shard.get("table")) if file]


def _check_index(index: dict) -> None:
    """Raise ValueError for what is missing or of another type, and for files elsewhere than in the folder."""
    _check_fields(index, _FIELDS, INDEX)
    if not index["shards"]:
        raise ValueError("shards is empty")
    for number, shard in enumerate(index["shards"]):
        what = f"shard {number}"
        _check_fields(shard, _PIXELS_FIELDS if index["encoding"] == "uint8" else _TABLE_FIELDS, what)
        if "table" in shard:
            _check_fields(shard["table"], _FILE_FIELDS, f"the table of {what}")
    for name in (file["file"] for file in files_of(index)):
        if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise ValueError(f"{name!r} is no name of a file in this folder")


def _check_fields(value: dict, fields: dict, what: str) -> None:
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"of {what}, {name} is missing")
        found = value[name]
        if not isinstance(kind, list):
            if not _is_of(found, kind):
                raise ValueError(f"of {what}, {name} is no {_TYPE_NAMES[kind]}")
        elif not (isinstance(found, list) and all(_is_of(item, kind[0]) for item in found)):
            raise ValueError(f"of {what}, {name} is no list of {_TYPE_NAMES[kind[0]]}s")


def _is_of(value: object, kind: type) -> bool:
    return type(value) is kind and (kind is not int or value >= 0)  # true and false are no numbers


def _check_size(path: Path, expected: int, problem: Callable[[str], UserError]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise problem(
            f"{path.name} is missing ({error.strerror}): copy it again, or prepare the images again."
        ) from None
    if size != expected:
        raise problem(
            f"{path.name} has {size:,} bytes where {expected:,} were written: copy it again, or prepare the "
            "images again."
        )


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
