"""Random access to the images of a data set."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset

from jit_accel.data.formats.columns import Columns
from jit_accel.data.reading.content import announce_keys, file_keys, key_of
from jit_accel.data.reading.decode import BadImage, decode_row

_ROWS_AT_ONCE = 4096


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
            return file_keys(paths)
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
