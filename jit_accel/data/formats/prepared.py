"""The stores that `python -m jit_accel.prepare` writes: images of one size, shuffled once, and an `index.json`."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch

from jit_accel.base.errors import UserError
from jit_accel.base.shared_tables import shared_arrays
from jit_accel.config.presets import Size, plain_size, sides_of
from jit_accel.data.formats.columns import IMAGE_CHANNELS, Columns, features_of
from jit_accel.data.formats.source import Request, Source, fingerprint_of, source_of, table_images
from jit_accel.data.formats.tables import open_file, parquet_stream
from jit_accel.data.reading.decode import crop_pixels
from jit_accel.data.reading.images import Read
from jit_accel.data.reading.servers import at_once
from jit_accel.data.reading.shards import LocalShard, missing_path
from jit_accel.data.reading.splits import TRAIN, choose_splits

INDEX = "index.json"
UNFINISHED = ".unfinished"
STORE_FORMAT = "jit_accel.prepared"
STORE_VERSION, PAIRS_VERSION = 1, 2  # of images alone, as from the beginning, and with conditions
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


def open_prepared(request: Request) -> Source:
    """Open a folder written by `jit_accel.prepare`: memory-mapped uint8, or Parquet as a stream."""
    folder = request.path
    if not os.path.isdir(folder):
        raise missing_path(folder)
    reason = "was prepared, its columns are known"
    names = "image_column", "label_column", "renumber_labels", "condition_path", "condition_column"
    request.refuse(*names, reason=reason)
    request.refuse("vector_column", reason="was prepared, and only what it was made of has numbers")
    index = read_index(folder)
    choose_splits({TRAIN: index["num_images"]}, request.split, folder)
    names, has_pairs = tuple(index["class_names"]), index["version"] == PAIRS_VERSION
    identity = fingerprint_of(
        [index["format"], index["encoding"], str(index["img_size"]), *names, *(s["sha256"] for s in index["shards"])]
    )
    if index["encoding"] == "uint8":
        request.refuse("streaming", reason="holds memory-mapped pixels, which are read by random access")
        shards = tuple((shard["file"], shard["table"]["file"], shard["images"]) for shard in index["shards"])
        channels = IMAGE_CHANNELS * (1 + has_pairs)
        images = PixelStore(os.path.abspath(folder), index["img_size"], shards, index["is_labelled"], channels)
        images.labels()  # now, when processes share them
    else:
        raw = {"raw_size": index["img_size"], "name": "name"} if index["encoding"] == "raw" else {}
        raw |= {"condition": "condition"} if has_pairs else {}
        columns = Columns("image", "label" if index["is_labelled"] else None, key="key", **raw)
        paths = [os.path.join(os.path.abspath(folder), shard["file"]) for shard in index["shards"]]
        if request.streaming is False:
            how = {"data_files": paths, "split": "train", "columns": columns.all}
            images = table_images(datasets.load_dataset("parquet", **how), columns)
        else:
            files = at_once(open_file, map(LocalShard, paths))
            images = parquet_stream(files, columns, features_of(files[0].schema))
    names = names if index["is_labelled"] else ("image",)
    return source_of(folder, "prepared", images, names, identity, index["img_size"])


@dataclass(frozen=True)
class PixelStore:
    """Images of uint8 pixels, of one size, in memory-mapped files, opened where and when they are first read."""

    folder: str
    img_size: Size
    shards: tuple[tuple[str, str, int], ...]  # array, table of labels, keys and names, number of images
    is_labelled: bool = True
    channels: int = IMAGE_CHANNELS  # and behind those of an image the ones of its condition, if there is any
    is_encoded = False

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def read(self, indices: np.ndarray, out: np.ndarray, at: np.ndarray | None = None) -> Read:
        """Copy pixels; see `Images.read`. Into a smaller `out` they are scaled, as `center_crop` does."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[shards]
        size = out.shape[2:]
        is_scaled, has_all = size != sides_of(self.img_size), out.shape[1] == self.channels
        if not is_scaled and has_all and len(shards) and (shards == shards[0]).all() and out.flags.c_contiguous:
            np.take(self._pixels(int(shards[0])), rows, axis=0, out=out, mode="clip")  # "raise" makes a copy first
        else:
            for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist())):
                pixels = self._pixels(shard)[row, : out.shape[1]]
                spot = None if at is None else at[place]
                out[place] = crop_pixels(pixels, size, spot) if is_scaled else pixels
        return self.labels()[indices], {}

    def labels(self) -> np.ndarray:
        """Return the classes, int64 (n,)."""
        return self._column("label")

    def keys(self) -> np.ndarray:
        """Return the `content_key` of the file that each image was made of, uint64 (n,)."""
        return self._column("key")

    def names(self) -> np.ndarray:
        """Return the name that each image had in its source, str (n,)."""
        return self._column("name")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(count for *_, count in self.shards)])

    @cached_property
    def _pixels(self) -> Callable[[int], np.ndarray]:
        """Return the pixels of a shard, uint8 (N, channels, H, W), read-only; mapped when they are first asked for."""
        return cache(lambda shard: _map_array(Path(self.folder) / self.shards[shard][0]))

    @cached_property
    def _column(self) -> Callable[[str], np.ndarray]:
        return cache(self._read_column)

    def _read_column(self, name: str) -> np.ndarray:
        if name == "label":
            how = f"labels of {self.folder}", lambda: {name: self._read_parts(name)}
            return shared_arrays(*how)[name] if self.is_labelled else np.zeros(len(self), np.int64)
        return self._read_parts(name)

    def _read_parts(self, name: str) -> np.ndarray:
        parts = []
        for _, table, _ in self.shards:
            with pq.ParquetFile(Path(self.folder) / table) as parquet:  # `read_table` takes eight times as long
                parts.append(parquet.read([name], use_threads=False)[0].to_numpy())
        return np.concatenate(parts)


def _map_array(path: Path) -> np.ndarray:
    """Map a .npy file of uint8, C order. NumPy's own way keeps a file open for each, of which 1,024 are allowed."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    assert (dtype, is_fortran) == (np.uint8, False), f"{path}: {dtype}, not uint8 in C order"
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    array = mapped[start : start + int(np.prod(shape))].reshape(shape)
    array.setflags(write=False)
    return array


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
        is_known = version in (STORE_VERSION, PAIRS_VERSION)
        if is_known:
            _check_index(index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise problem(f"its {INDEX} is damaged ({error}): prepare the images again.") from None
    if not is_known:
        rule = (
            f"its {INDEX} has the version {version}, this program reads {STORE_VERSION} and {PAIRS_VERSION}: prepare "
        )
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
