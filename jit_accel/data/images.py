"""Random access to the images of a data set."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from datasets import Dataset

from jit_accel.data.batch import decode_row
from jit_accel.data.columns import Columns
from jit_accel.data.decode import BadImage


class Images(Protocol):
    """What `RandomAccessLoader` reads from."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Read images into `out`.

        Args:
            indices: int64 (B,).
            out: uint8 (B, 3, size, size), filled with the pixels, RGB; where an image is bad it is left undefined.

        Returns:
            Labels, int64 (B,), and for each bad image its place in the batch and "name: reason".
        """


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


@dataclass(frozen=True)
class SomeImages:
    """Those of `images` that `indices` (int64) name, in that order."""

    images: Images
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """See `Images.read`."""
        return self.images.read(self.indices[indices], out)
