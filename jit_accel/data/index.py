"""`index.json`: what a folder written by `python -m jit_accel.prepare` holds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from jit_accel.errors import UserError

INDEX = "index.json"
UNFINISHED = ".unfinished"
STORE_FORMAT = "jit_accel.prepared"
STORE_VERSION = 1
_CHUNK_BYTES = 2**20


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether `jit_accel.prepare` wrote this folder, or began to."""
    if os.path.isfile(os.path.join(folder, UNFINISHED, "plan.json")):
        return True
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:  # an image folder may have an index.json of its own
        return STORE_FORMAT.encode() in file.read(200)


def read_index(folder: str | os.PathLike, flag: str = "--data_path") -> dict:
    """Read `index.json`, and check that the files it names are there in their sizes.

    Raises:
        UserError: no finished store, of a later version, files missing or of another size.
    """
    path = Path(folder) / INDEX
    where = f"{flag} {folder}"
    if not path.is_file():
        if is_prepared(folder):
            raise UserError(f"{where}: its preparation was not finished: run the same jit_accel.prepare command again.")
        raise UserError(f"{where}: there is no {INDEX} of jit_accel.prepare: prepare it, or correct the path.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"] if index["format"] == STORE_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its {INDEX} is damaged ({error}): prepare the images again.") from None
    if version != STORE_VERSION:
        raise UserError(
            f"{where}: its {INDEX} has the version {version}, this program reads {STORE_VERSION}: prepare the images "
            "again, or update jit_accel."
        )
    for file in files_of(index):
        _check_size(Path(folder) / file["file"], file["bytes"], where)
    return index


def files_of(index: dict) -> list[dict]:
    """All files of a store, each with `file`, `bytes` and `sha256`."""
    return [file for shard in index["shards"] for file in (shard, shard.get("table")) if file]


def _check_size(path: Path, expected: int, where: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{where}: {path.name} is missing ({error.strerror}): copy it again, or prepare the images again."
        ) from None
    if size != expected:
        raise UserError(
            f"{where}: {path.name} has {size:,} bytes where {expected:,} were written: copy it again, or prepare the "
            "images again."
        )


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file that is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; a no-op where folders cannot be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
