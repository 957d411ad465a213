"""Random access to the images of a data set."""

import hashlib
import itertools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset

from jit_accel.data.batches.batch import decode_row
from jit_accel.data.formats.columns import Columns
from jit_accel.data.formats.index_cache import FILE_STATE, remembered_values
from jit_accel.data.reading.content import key_of, patient_file_key
from jit_accel.data.reading.decode import BadImage

log = logging.getLogger(__name__)
MANY_KEYS = 20_000  # to read more is announced
_ROWS_AT_ONCE = 4096
_FILES_AT_ONCE = 256


class Images(Protocol):
    """Images that can be read in any order. Where no image needs decoding, `is_encoded` is there and False."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Read the images `indices` (int64 (B,)) into `out` (uint8 (B, 3, size, size), RGB; where bad left undefined).

        Returns the labels, int64 (B,), and for each bad image its place in the batch and "name: reason".
        """

    def keys(self) -> np.ndarray:
        """The content keys of all images (see `content.py`), uint64 (n,)."""


@dataclass(frozen=True)
class TableImages:
    """Encoded images in an HF data set, of which `columns` says how to read a row."""

    dataset: Dataset
    columns: Columns

    @property
    def is_labelled(self) -> bool:
        return self.columns.label is not None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Decode and crop; see `Images.read`."""
        rows = self.dataset[indices.tolist()]
        labels, bad = np.zeros(len(indices), np.int64), {}
        label_values = rows[self.columns.label] if self.columns.label else itertools.repeat(None)
        for i, (value, label) in enumerate(zip(rows[self.columns.image], label_values)):
            try:
                out[i] = decode_row(value, self.columns, out.shape[-1], lambda i=i: f"image {indices[i]}")
            except BadImage as error:
                bad[i] = str(error)
            labels[i] = self.columns.label_of(label)
        return labels, bad

    def keys(self) -> np.ndarray:
        """Read both ends of every file that is new or changed, unless keys were stored; see `Images.keys`."""
        if self.columns.key:
            return self.dataset.with_format("arrow")[self.columns.key][:].to_numpy().astype(np.uint64)
        if paths := self._paths():
            return _file_keys(paths)
        announce_keys(len(self))
        tables = self.dataset.select_columns([self.columns.image]).with_format("arrow")
        keys = np.empty(len(self), np.uint64)
        with ThreadPoolExecutor(16) as pool:  # a network's disk answers late, but many at once
            for start in range(0, len(self), _ROWS_AT_ONCE):
                rows = tables[start : start + _ROWS_AT_ONCE][self.columns.image]
                keys[start : start + len(rows)] = list(pool.map(key_of, rows.combine_chunks()))
        return keys

    def _paths(self) -> list[str]:
        """Return the images' files, or [] where any image is in the table itself."""
        if not isinstance(self.columns.image_of(self.dataset[0][self.columns.image])[0], str):
            return []
        column = self.dataset.select_columns([self.columns.image]).with_format("arrow")[self.columns.image][:]
        if pa.types.is_struct(column.type):
            is_embedded = any(chunk.field("bytes").null_count < len(chunk) for chunk in column.chunks)
            column = pa.chunked_array([] if is_embedded else [c.field("path") for c in column.chunks], pa.string())
        return column.to_pylist() if pa.types.is_string(column.type) and not column.null_count else []


def announce_keys(count: int) -> None:
    """Warn that the start takes long, and why."""
    if count > MANY_KEYS:
        log.warning("reading the content keys of %s images for --holdout ...", f"{count:,}")


def _file_keys(paths: list[str]) -> np.ndarray:
    root = os.path.commonpath({os.path.abspath(folder) for folder in {os.path.dirname(path) for path in paths}})
    with ThreadPoolExecutor(16) as pool:  # a network's disk answers late, but many at once

        def of_all(function: Callable[[list[str]], np.ndarray], some: list[str]) -> np.ndarray:
            parts = [some[start : start + _FILES_AT_ONCE] for start in range(0, len(some), _FILES_AT_ONCE)]
            return np.concatenate(list(pool.map(function, parts)))

        def look(numbers: np.ndarray) -> np.ndarray:
            announce_keys(len(numbers))
            unknown = [paths[n] for n in numbers]
            return of_all(lambda some: np.array([patient_file_key(path) for path in some], np.uint64), unknown)

        return remembered_values("content keys", root, of_all(lambda some: _states(some, root), paths), look)


def _states(paths: list[str], root: str) -> np.ndarray:
    """Return the `FILE_STATE` of each; its path as seen from `root`, so that the name of `root` does not matter."""
    states = np.empty(len(paths), FILE_STATE)
    for n, path in enumerate(paths):
        digest = hashlib.blake2b(path.removeprefix(root).encode(), digest_size=8).digest()
        try:
            info = os.stat(path)
            found = info.st_size, info.st_mtime_ns
        except OSError:
            found = -1, 0
        states[n] = int.from_bytes(digest, "little"), *found
    return states


@dataclass(frozen=True)
class SomeImages:
    """Those of `images` that `indices` (int64) name, in that order."""

    images: Images
    indices: np.ndarray

    @property
    def is_encoded(self) -> bool:
        return getattr(self.images, "is_encoded", True)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """See `Images.read`."""
        return self.images.read(self.indices[indices], out)

    def keys(self) -> np.ndarray:
        """See `Images.keys`."""
        return self.images.keys()[self.indices]
