"""The stores that `python -m jit_accel.prepare` writes: images of one size, shuffled once, and an `index.json`."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from jit_accel.base.errors import UserError, lookup
from jit_accel.config.presets import Size, plain_size
from jit_accel.data.formats.columns import COLOUR, IMAGE_CHANNELS, Columns, PixelFormat, features_of
from jit_accel.data.formats.numbers import Vectors
from jit_accel.data.formats.pixel_store import PixelStore
from jit_accel.data.formats.source import Request, Source, fingerprint_of, source_of, table_images
from jit_accel.data.formats.tables import open_file, parquet_stream
from jit_accel.data.reading.servers import at_once
from jit_accel.data.reading.shards import LocalShard, missing_path
from jit_accel.data.reading.splits import TRAIN, choose_splits

INDEX = "index.json"
UNFINISHED = ".unfinished"
STORE_FORMAT = "jit_accel.prepared"
# Of images alone, as from the beginning; with conditions; with a record of their numbers, and of others beside them
STORE_VERSION, PAIRS_VERSION, FACTS_VERSION = VERSIONS = 1, 2, 3
MAPPED = ("uint8", "uint16", "int16", "float32")  # encodings that are memory-mapped, by the type of their numbers
LABEL_SETTINGS = ("label_column", "label_separator")  # which may be given again, as they were
OWN_COLUMNS = ("image", "condition", "label", "key", "name")
_FILE = {"file": str, "bytes": int, "sha256": str}
_TABLE_SHARD = _FILE | {"images": int, "row_groups": [int]}
_PIXELS_SHARD = _FILE | {"images": int, "table": _FILE}  # of encoding uint8
_INDEX = {  # the fields that are used, and their types
    "encoding": str,
    "num_images": int,
    "num_bytes": int,
    "num_skipped": int,
    "is_labelled": bool,
    "class_names": [str],
    "settings": {},
    "shards": [{}],
}
_WORDS = {str: "text", int: "natural number", bool: "true or false", dict: "object", list: "list"}


@dataclass(frozen=True)
class StoreFacts:
    """The facts that a store's `index.json` has of its images besides their size and classes."""

    pixels: PixelFormat = COLOUR
    has_pairs: bool = False
    vectors: Vectors | None = None  # as of all rows of what was prepared
    most_labels: int | None = None  # of an image, where they may have several

    @classmethod
    def of(cls, index: dict) -> "StoreFacts":
        """Return what an index of any version says."""
        if index["version"] != FACTS_VERSION:
            return cls(has_pairs=index["version"] == PAIRS_VERSION)
        pixels, shown = index["pixels"], index["pixels"]["condition_channels"]
        given = pixels["channels"], shown or IMAGE_CHANNELS, pixels["value_range"] and tuple(pixels["value_range"])
        return cls(PixelFormat(*given), shown > 0, Vectors.of_record(index["vectors"]), index["most_labels"])

    @property
    def channels(self) -> int:
        """Return the channels that are stored of an image, and of its condition, if it has one."""
        return self.pixels.channels + self.has_pairs * self.pixels.condition_channels

    @property
    def version(self) -> int:
        """Return the oldest version of an index that can say this."""
        if self == StoreFacts(has_pairs=self.has_pairs):
            return PAIRS_VERSION if self.has_pairs else STORE_VERSION
        return FACTS_VERSION

    def record(self, encoding: str) -> dict[str, Any]:
        """Return the entries of an index that say this."""
        if self.version != FACTS_VERSION:
            return {}
        pixels = {"channels": self.pixels.channels, "value_range": self.pixels.value_range}
        pixels["condition_channels"] = self.channels - self.pixels.channels
        pixels["dtype"] = encoding if encoding in MAPPED else str(self.pixels.dtype)
        return {"pixels": pixels, "vectors": self.vectors and self.vectors.record(), "most_labels": self.most_labels}


def number_columns(names: Iterable[str]) -> list[str]:
    """Return the names that columns of numbers have in the tables of a store, beside its own."""
    return [f"{name} of the data" if name in OWN_COLUMNS else name for name in names]


def open_prepared(request: Request) -> Source:
    """Open a folder written by `jit_accel.prepare`: memory-mapped numbers, or Parquet as a stream."""
    folder = request.path
    if not os.path.isdir(folder):
        raise missing_path(folder)
    index = read_index(folder)
    others = [name for name in LABEL_SETTINGS if getattr(request, name) != index["settings"].get(name)]
    names = "image_column", *others, "renumber_labels"
    request.refuse(*names, "condition_path", "condition_column", reason="was prepared, its columns are known")
    choose_splits({TRAIN: index["num_images"]}, request.split, folder)
    facts, names = _as_asked(StoreFacts.of(index), request), tuple(index["class_names"])
    identity = fingerprint_of(
        [index["format"], index["encoding"], str(index["img_size"]), *names, *(s["sha256"] for s in index["shards"])]
    )
    vectors = facts.vectors
    numbers = tuple(zip(number_columns(vectors.names), vectors.sizes)) if vectors else ()
    if index["encoding"] in MAPPED:
        request.refuse("streaming", reason="holds memory-mapped pixels, which are read by random access")
        shards = tuple((shard["file"], shard["table"]["file"], shard["images"]) for shard in index["shards"])
        given = os.path.abspath(folder), index["img_size"], shards, index["is_labelled"]
        images = PixelStore(*given, facts.channels, facts.pixels, numbers, facts.most_labels)
        images.facts(np.empty(0, np.int64))  # now, when processes share them
    else:
        columns = columns_of(index["encoding"], index["img_size"], index["is_labelled"], facts)
        paths = [os.path.join(os.path.abspath(folder), shard["file"]) for shard in index["shards"]]
        if request.streaming is False:
            how = {"data_files": paths, "split": "train", "columns": columns.all}
            images = table_images(datasets.load_dataset("parquet", **how), columns)
        else:
            files = at_once(open_file, map(LocalShard, paths))
            images = parquet_stream(files, columns, features_of(files[0].schema))
    names = names if index["is_labelled"] else ("image",)
    source = source_of(folder, "prepared", images, names, identity, index["img_size"], vectors)
    return replace(source, pixels=facts.pixels, most_labels=facts.most_labels)


def columns_of(encoding: str, img_size: Size, is_labelled: bool, facts: StoreFacts) -> Columns:
    """Return the columns that the rows of a store's tables are read by."""
    raw = {"raw_size": img_size, "name": "name"} if encoding == "raw" else {}
    raw |= {"condition": "condition"} if facts.has_pairs else {}
    if facts.vectors:
        raw |= {"vectors": tuple(number_columns(facts.vectors.names)), "vector_sizes": facts.vectors.sizes}
    label = "label" if is_labelled else None
    return Columns("image", label, key="key", most_labels=facts.most_labels, pixels=facts.pixels, **raw)


def _as_asked(facts: StoreFacts, request: Request) -> StoreFacts:
    """Return them with the columns of numbers that are asked for, in their order. UserError for one that is missing."""
    if facts.vectors is None:
        request.refuse("vector_column", reason="was prepared without --vector_column, and has no numbers")
    if not request.vector_column:
        return facts
    for name in request.vector_column:
        lookup(dict.fromkeys(facts.vectors.names), name, "vector_column", rule=f"no column of {request.path}")
    return replace(facts, vectors=facts.vectors.chosen(request.vector_column))


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
        is_known = version in VERSIONS
        if is_known:
            _check_index(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise problem(f"its {INDEX} is damaged ({error}): prepare the images again.") from None
    if not is_known:
        rule = f"its {INDEX} has the version {version}, this program reads {VERSIONS[0]} to {VERSIONS[-1]}: prepare "
        rule += "the images again, "
        raise problem(rule + "or update jit_accel.")
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
    _check_shape(sides := index["img_size"], [int] if isinstance(sides, list) else int, "img_size")
    index["img_size"] = plain_size(sides)
    if not index["shards"]:
        raise ValueError("shards is empty")
    _check_shape(index["shards"], [_PIXELS_SHARD if index["encoding"] in MAPPED else _TABLE_SHARD], "shards")
    if index["version"] == FACTS_VERSION:
        _check_shape(index, {"pixels": {"channels": int, "condition_channels": int}}, INDEX)
        StoreFacts.of(index)
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
