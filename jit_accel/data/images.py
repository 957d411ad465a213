"""Random access to the images of a data set."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from datasets import Dataset

from jit_accel.data.batch import decode_row
from jit_accel.data.columns import Columns
from jit_accel.data.content import key_of
from jit_accel.data.decode import BadImage

_ROWS_AT_ONCE = 4096


class Images(Protocol):
    """What `RandomAccessLoader` reads from. Where no image needs decoding, `is_encoded` is there and False."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Read images into `out`.

        Args:
            indices: int64 (B,).
            out: uint8 (B, 3, size, size), filled with the pixels, RGB; where an image is bad it is left undefined.

        Returns:
            Labels, int64 (B,), and for each bad image its place in the batch and "name: reason".
        """

    def keys(self) -> np.ndarray:
        """The content keys of all images (see `content.py`), uint64 (n,)."""


@dataclass(frozen=True)
class TableImages:
    """Encoded images in an HF data set, of which `columns` says how to read a row."""

    dataset: Dataset
    columns: Columns

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Decode and crop; see `Images.read`."""
        rows = self.dataset[indices.tolist()]
        labels, bad = np.zeros(len(indices), np.int64), {}
        label_values = rows[self.columns.label] if self.columns.label else itertools.repeat(None)
        for i, (value, label) in enumerate(zip(rows[self.columns.image], label_values)):
            try:
                out[i] = decode_row(value, self.columns, out.shape[-1], f"image {indices[i]}")
            except BadImage as error:
                bad[i] = str(error)
            labels[i] = self.columns.label_of(label)
        return labels, bad

    def keys(self) -> np.ndarray:
        """Reads both ends of every file, unless keys were stored; see `Images.keys`."""
        if self.columns.key:
            return self.dataset.with_format("arrow")[self.columns.key][:].to_numpy().astype(np.uint64)
        tables = self.dataset.select_columns([self.columns.image]).with_format("arrow")
        keys = np.empty(len(self), np.uint64)
        with ThreadPoolExecutor(16) as pool:  # a network's disk answers late, but many at once
            for start in range(0, len(self), _ROWS_AT_ONCE):
                rows = tables[start : start + _ROWS_AT_ONCE][self.columns.image]
                keys[start : start + len(rows)] = list(pool.map(key_of, rows.combine_chunks()))
        return keys


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
