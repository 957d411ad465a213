"""The undecoded images of a data set, by random access or in order, a unit at a time."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import islice
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset
from pyarrow.dataset import ParquetFragmentScanOptions

from jit_accel.base.errors import UserError, shown
from jit_accel.config.presets import Size, in_pixels, sides_of
from jit_accel.data import data_error
from jit_accel.data.formats.columns import IMAGE_CHANNELS, Columns
from jit_accel.data.reading.content import announce_keys, file_keys, key_of
from jit_accel.data.reading.crop import has_room
from jit_accel.data.reading.decode import BadImage, decode_row, facts_in_row
from jit_accel.data.reading.shards import Shard, Span, at_hand

_KEYS_AT_ONCE = 4096
_ROWS_AT_ONCE = 64
_MOST_OPEN_FILES = 32
_SCAN = ParquetFragmentScanOptions(pre_buffer=False)  # which saves a fifth of the time, and memory


Read = tuple[np.ndarray, dict[int, str]]  # as `Images.read` returns it


class Images(Protocol):
    """Images that can be read in any order.

    Where no image needs decoding, `is_encoded` is there and False; `channels`, where conditions go with them. `read`
    may be without `at` where no crops at random places are asked for.
    """

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, out: np.ndarray, at: np.ndarray | None = None) -> Read:
        """Read images `indices`, int64 (B,), into `out` (B, C, H, W), undefined where bad.

        at: where the crop of each lies, 0..1, float64 (B,), as `center_crop` takes it; None for the centre.

        With conditions `out` may have as many channels as `channels` says, of which these are the last.

        Return what else is known of them, (B,) of `Columns.facts_type` (their labels, int64, where there are no
        numbers), and {place in the batch: "name: reason"} of bad images.
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

    @property
    def channels(self) -> int:
        return self.columns.channels

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray, out: np.ndarray, at: np.ndarray | None = None) -> Read:
        """Decode and crop; see `Images.read`."""
        columns = self.columns if out.shape[1] == self.channels else replace(self.columns, condition=None)
        rows = self.dataset[indices.tolist()]
        facts, bad = np.zeros(len(indices), columns.facts_type), {}
        for i in range(len(indices)):
            row, name = {column: values[i] for column, values in rows.items()}, lambda i=i: f"image {indices[i]}"
            try:
                facts[i] = facts_in_row(row, columns, name)
                out[i] = decode_row(row, columns, out.shape[2:], name, None if at is None else at[i])
            except BadImage as error:
                bad[i] = str(error)
        return facts, bad

    def keys(self) -> np.ndarray:
        """Read both ends of every file that is new or changed, unless keys were stored; see `Images.keys`."""
        if self.columns.key:
            return self.dataset.with_format("arrow")[self.columns.key][:].to_numpy().astype(np.uint64)
        if paths := self.paths():
            return file_keys(paths)
        announce_keys(len(self))
        tables = self.dataset.select_columns([self.columns.image]).with_format("arrow")
        keys = np.empty(len(self), np.uint64)
        with ThreadPoolExecutor(16) as pool:  # a network's disk answers late, but many at once
            for start in range(0, len(self), _KEYS_AT_ONCE):
                rows = tables[start : start + _KEYS_AT_ONCE][self.columns.image]
                keys[start : start + len(rows)] = list(pool.map(key_of, rows.combine_chunks()))
        return keys

    def paths(self) -> list[str]:
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

    @property
    def channels(self) -> int:
        return getattr(self.images, "channels", IMAGE_CHANNELS)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray, out: np.ndarray, *at: np.ndarray) -> Read:
        """See `Images.read`."""
        return self.images.read(self.indices[indices], out, *at)

    def keys(self) -> np.ndarray:
        """See `Images.keys`."""
        return self.images.keys()[self.indices]


class KeptImages:
    """The images of `images`, their centres cropped to one size, each of which is decoded once and then kept."""

    def __init__(self, images: Images, channels: int, size: Size, dtype: np.dtype | type = np.uint8):
        self.images = images
        self.pixels = np.empty((len(images), channels, *sides_of(size)), dtype)  # memory is taken as they come
        self.facts: np.ndarray | None = None  # once their type is known
        self.are_kept = np.zeros(len(images), bool)

    def read(self, indices: np.ndarray, out: np.ndarray) -> Read:
        """See `Images.read`; what is bad is looked at anew each time."""
        places, bad = np.flatnonzero(~self.are_kept[indices]), {}
        if len(places):
            fresh = np.empty((len(places), *self.pixels.shape[1:]), self.pixels.dtype)
            facts, reasons = self.images.read(indices[places], fresh)
            self.facts = np.empty(len(self.pixels), facts.dtype) if self.facts is None else self.facts
            self.pixels[indices[places]], self.facts[indices[places]] = fresh, facts
            self.are_kept[indices[places]] = True
            bad = {int(places[place]): reason for place, reason in reasons.items()}
            self.are_kept[indices[list(bad)]] = False
        out[:] = self.pixels[indices]
        return self.facts[indices], bad


def check_crops(images: "Images | Stream", stored: Size | None, size: Size, *, of: str) -> None:
    """Raise `UserError` where crops of this size at random places cannot be read, or leave nothing to choose.

    stored: the one size that all images have, if it is known.
    """
    while isinstance(images, SomeImages):
        images = images.images
    if not isinstance(images, Stream) and "at" not in signature(images.read).parameters:
        rule = f"the `read` of {of} takes no places of crops: give it an argument `at`, as Images.read has, or use "
        raise UserError(rule + "--crop center.", about="crop", value="random")
    if stored is not None and not has_room(stored, size):
        height, width = sides_of(size)
        rule = f"the images of {of} were prepared with {in_pixels(stored)} px, of which --img_size {shown(size)} cuts "
        rule += "nothing off: train on what they were prepared from, prepare them longer, such as with "
        rule += f"--img_size {height} {width + width // 2}, or use --crop center."
        raise UserError(rule, about="crop", value="random")


@dataclass(frozen=True)
class Stream:
    """The undecoded rows of a data set, unit by unit.

    read: the rows of a unit, by the path of a file, the unit's number there and the first row that is wanted.
    """

    shards: tuple[Shard, ...]
    read: Callable[[str, int, int], Iterator[dict]]
    columns: Columns
    sizes: np.ndarray  # int64 (U,): the images of each unit, in the order of the files, without those held out
    files: np.ndarray | None = None  # int64 (U,), ascending: the file of each row group; None: the file is the unit
    spans: np.ndarray | None = None  # int64 (U, k, 2): the bytes [start, end) that a unit needs; None: the whole file
    min_key: int = 0  # images with smaller content keys are held out of `training_rows`

    @property
    def num_units(self) -> int:
        return len(self.sizes)

    @property
    def is_labelled(self) -> bool:
        return self.columns.label is not None

    @property
    def channels(self) -> int:
        return self.columns.channels

    @property
    def is_remote(self) -> bool:
        """Return whether units are fetched before they are read."""
        return self.shards[0].is_remote

    def rows(self, unit: int, start: int = 0) -> Iterator[dict]:
        """Yield the rows of a unit from number `start` on; UserError if its file is damaged, or cannot be fetched."""
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
        group = "" if self.files is None else f", row group {number}"
        of_split = " of the split" if self.columns.split else ""
        return f"{self.shards[file].name}{group}, image {row}{of_split}" + " of those not held out" * bool(self.min_key)

    def units_of(self, file: int) -> range:
        """Return the units in a file."""
        return range(file, file + 1) if self.files is None else range(*np.searchsorted(self.files, [file, file + 1]))

    def _place(self, unit: int) -> tuple[int, int]:
        """Return the file a unit is in, and its number there."""
        if self.files is None:
            return unit, 0
        file = int(self.files[unit])
        return file, unit - self.units_of(file).start

    def _spans(self, unit: int) -> Iterable[Span]:
        return () if self.spans is None else self.spans[unit]


@dataclass(frozen=True)
class ParquetReader:
    """The rows of row groups: these columns and no others, whatever is in the others."""

    columns: Columns
    features: Features
    _open: dict[str, IterableDataset] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, path: str, group: int, start: int = 0) -> Iterator[dict]:
        """Yield the rows of a row group from number `start` on, pixels as memory of Arrow; UserError if damaged."""
        try:
            for table in map(self.columns.chosen, self._tables(path, group)):
                yield from self._rows(table.slice(start))
                start = max(0, start - len(table))
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            rule = f"row group {group} cannot be read ({error}): restore the file and run the same command "
            rule += "again; a training goes on with --resume auto."
            raise data_error(path, rule) from error

    def _tables(self, path: str, group: int) -> Iterable[pa.Table | pa.RecordBatch]:
        if self.columns.raw_size is not None:  # HF takes longer than all else that is done to bare pixels
            return read_row_group(path, group, self.columns.all).to_batches(_ROWS_AT_ONCE)
        # A file at a time, since `shard` costs time in proportion to the shards there are: 80 ms at 10,000
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            how = {"columns": list(self.features), "features": self.features, "fragment_scan_options": _SCAN}
            self._open[path] = IterableDataset.from_parquet(path, **how).reshard().with_format("arrow")
        dataset = self._open[path]
        return dataset.shard(num_shards=dataset.num_shards, index=group).iter(batch_size=_ROWS_AT_ONCE)

    def _rows(self, table: pa.Table | pa.RecordBatch) -> Iterator[dict]:
        if self.columns.raw_size is None:
            yield from table.to_pylist()
            return
        pixels, others = table[self.columns.image], table.drop_columns([self.columns.image]).to_pylist()
        for value, row in zip(pixels, others):
            buffer = value.as_buffer()
            yield {self.columns.image: None if buffer is None else memoryview(buffer), **row}


def read_row_group(path: str, group: int, columns: list[str]) -> pa.Table:
    """Return these columns; OSError, IndexError or pa.ArrowException if the file is damaged, or was replaced."""
    with pq.ParquetFile(path) as parquet:
        return parquet.read_row_group(group, columns=columns, use_threads=False)
