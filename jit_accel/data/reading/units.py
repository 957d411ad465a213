"""A data set that is read in order, a unit at a time: row groups of Parquet files, or tar files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from jit_accel.base.errors import UserError
from jit_accel.data.formats.columns import Columns
from jit_accel.data.reading.content import key_of
from jit_accel.data.reading.parquet_rows import read_row_group
from jit_accel.data.reading.shards import Shard, Span, at_hand


@dataclass(frozen=True)
class Stream:
    """The undecoded rows of a data set, unit by unit.

    shards: its files. read: the rows of a unit, by the path of a file, the unit's number there and the first row that
    is wanted. sizes: int64 (U,), the images of each unit, in the order of the files, without those that are held out.
    groups: int64 (F,), how many units (row groups) each file has, or None where the file is the unit. spans: int64
    (U, k, 2), the bytes [start, end) of its file that a unit needs, or None where files are fetched whole.
    min_key: images with smaller content keys are held out of `training_rows`.
    """

    shards: tuple[Shard, ...]
    read: Callable[[str, int, int], Iterator[dict]]
    columns: Columns
    sizes: np.ndarray
    groups: np.ndarray | None = None
    spans: np.ndarray | None = None
    min_key: int = 0

    @property
    def num_units(self) -> int:
        return len(self.shards) if self.groups is None else int(self.groups.sum())

    @property
    def is_labelled(self) -> bool:
        return self.columns.label is not None

    @property
    def is_remote(self) -> bool:
        """Return whether units are fetched before they are read."""
        return any(shard.is_remote for shard in self.shards[:1])

    def rows(self, unit: int, start: int = 0) -> Iterator[dict]:
        """Yield the rows of a unit from number `start` on.

        Raises:
            UserError: a server refuses, or is away for too long; a file is damaged.
        """
        if self.sizes[unit]:  # HF cannot read those of size 0
            file, number = self._place(unit)
            with at_hand(self.shards[file], self._spans(unit)) as path:
                yield from self.read(path, number, start)

    def training_rows(self, unit: int, start: int = 0) -> Iterator[dict]:
        """Yield the same without those that are held out, from number `start` of these on."""
        if not self.min_key:
            return self.rows(unit, start)
        return islice((row for row in self.rows(unit) if self.key_of(row) >= self.min_key), start, None)

    def fetch_ahead(self, unit: int) -> None:
        """Begin to fetch a remote unit that will be read soon; what fails then is tried again when it is read."""
        if not self.is_remote or not self.sizes[unit]:
            return

        def fetch() -> None:
            with contextlib.suppress(UserError):
                self.shards[self._place(unit)[0]].local(self._spans(unit))

        threading.Thread(target=fetch, name=f"fetch {unit}", daemon=True).start()

    def keys(self, unit: int) -> np.ndarray:
        """Return the content keys of a unit's rows, uint64 (k,)."""
        if self.columns.key:  # in a store of ours, whose images need not be read
            file, number = self._place(unit)
            return read_row_group(self.shards[file].local(), number, [self.columns.key])[0].to_numpy()
        return np.array([self.key_of(row) for row in self.rows(unit)], np.uint64)

    def key_of(self, row: dict) -> int:
        """Return the content key of one row."""
        return row[self.columns.key] if self.columns.key else key_of(row[self.columns.image])

    def name_of(self, unit: int, row: int) -> str:
        """Return what an image without a name is called, in every epoch: its file and place there."""
        file, number = self._place(unit)
        group = "" if self.groups is None else f", row group {number}"
        return f"{self.shards[file].name}{group}, image {row}" + (" of those not held out" if self.min_key else "")

    def units_of(self, file: int) -> range:
        """Return the units in a file."""
        if self.groups is None:
            return range(file, file + 1)
        end = int(self.groups[: file + 1].sum())
        return range(end - int(self.groups[file]), end)

    def _place(self, unit: int) -> tuple[int, int]:
        """Return the file a unit is in, and its number there."""
        if self.groups is None:
            return unit, 0
        ends = np.cumsum(self.groups)
        file = int(np.searchsorted(ends, unit, side="right"))
        return file, unit - int(ends[file] - self.groups[file])

    def _spans(self, unit: int) -> Iterable[Span]:
        return () if self.spans is None else self.spans[unit]
