"""A data set that is read in order: files or row groups, each an HF stream of its own."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from datasets import IterableDataset

from jit_accel.data.formats.columns import Columns
from jit_accel.data.formats.tar_samples import sample_rows
from jit_accel.data.reading import http_files
from jit_accel.data.reading.content import key_of
from jit_accel.data.reading.outages import steady
from jit_accel.data.reading.row_groups import row_group_column, row_group_rows

_MOST_OPEN_FILES = 32


@dataclass(frozen=True)
class Stream:
    """The undecoded rows of a data set, unit by unit.

    dataset: one HF shard a file. groups: int64 (F,), how many units (row groups) each file has, or None where the file
    is the unit. sizes: int64 (U,), the rows of each unit in the order of the files, or None where only reading would
    tell. files: paths where they are local, which are then read without HF. is_remote: read over a
    network, whose failures are waited out. urls: then of the files, for messages.
    min_key: images with smaller content keys are held out of `training_rows`, which `sizes` then counts.
    """

    dataset: IterableDataset
    columns: Columns
    groups: np.ndarray | None
    sizes: np.ndarray | None
    files: tuple[str, ...] = ()
    is_remote: bool = False
    urls: tuple[str, ...] = ()
    min_key: int = 0
    _open: dict[int, IterableDataset] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_units(self) -> int:
        return self.dataset.num_shards if self.groups is None else int(self.groups.sum())

    def rows(self, unit: int, start: int = 0) -> Iterator[dict]:
        """The rows of a unit from number `start` on.

        Raises:
            UserError: a server refuses, or is away for too long; a file is damaged.
        """
        if self.sizes is not None and not self.sizes[unit]:
            return iter(())  # which HF cannot read
        if self.files:
            file, number = self._place(unit)
            if self.groups is None:
                return sample_rows(self.files[file], self.columns, start)
            return row_group_rows(self.files[file], number, self.columns, start)
        if not self.is_remote:
            return islice(self._unit(unit), start, None)
        http_files.install()  # again where workers are not forked
        file = self._place(unit)[0]
        return steady(lambda row: islice(self._unit(unit), row, None), start, self.urls[file])

    def training_rows(self, unit: int, start: int = 0) -> Iterator[dict]:
        """The same without those that are held out, from number `start` of these on."""
        if not self.min_key:
            return self.rows(unit, start)
        return islice((row for row in self.rows(unit) if self.key_of(row) >= self.min_key), start, None)

    def keys(self, unit: int) -> np.ndarray:
        """The content keys of a unit's rows, uint64 (k,)."""
        if self.files and self.groups is not None and self.columns.key:
            file, number = self._place(unit)
            return row_group_column(self.files[file], number, self.columns.key)
        return np.array([self.key_of(row) for row in self.rows(unit)], np.uint64)

    def key_of(self, row: dict) -> int:
        """The content key of one row."""
        return row[self.columns.key] if self.columns.key else key_of(row[self.columns.image])

    def name_of(self, unit: int, row: int) -> str:
        """Of an image that has none: its file and place there, the same in every epoch."""
        file, number = self._place(unit)
        names = self.files or self.urls
        name = posixpath.basename(names[file]) if names else f"file {file}"
        group = f", row group {number}" if self.groups is not None else ""
        return f"{name}{group}, image {row}" + (" of those not held out" if self.min_key else "")

    def _place(self, unit: int) -> tuple[int, int]:
        """The file a unit is in, and its number there."""
        if self.groups is None:
            return unit, 0
        ends = np.cumsum(self.groups)
        file = int(np.searchsorted(ends, unit, side="right"))
        return file, unit - int(ends[file] - self.groups[file])

    def _unit(self, unit: int) -> IterableDataset:
        file, number = self._place(unit)
        if self.groups is None:
            return self._file(file)
        return self._file(file).shard(num_shards=int(self.groups[file]), index=number)

    def _file(self, file: int) -> IterableDataset:
        # `shard` costs time in proportion to the shards there are (80 ms at 10,000): so files first, then row groups
        if file not in self._open:
            if len(self._open) >= _MOST_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            dataset = self.dataset.shard(num_shards=self.dataset.num_shards, index=file)
            self._open[file] = dataset.reshard() if self.groups is not None else dataset
        return self._open[file]
