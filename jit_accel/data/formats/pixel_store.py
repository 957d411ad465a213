"""Pixels that `jit_accel.prepare` stored, of one size and type, in memory-mapped files; read by random access."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jit_accel.base.shared_tables import shared_arrays
from jit_accel.config.presets import Size, sides_of
from jit_accel.data.formats.columns import COLOUR, PixelFormat, facts_type
from jit_accel.data.reading.crop import crop_pixels
from jit_accel.data.reading.images import Read


@dataclass(frozen=True)
class PixelStore:
    """Images of one size, as numbers in memory-mapped files, opened where and when they are first read."""

    folder: str
    img_size: Size
    shards: tuple[tuple[str, str, int], ...]  # array, table of labels, keys and names, number of images
    is_labelled: bool = True
    channels: int = COLOUR.channels  # and behind those of an image the ones of its condition, if there is any
    pixels: PixelFormat = COLOUR
    numbers: tuple[tuple[str, int], ...] = ()  # the columns of numbers, and how many each has
    most_labels: int | None = None  # of an image, where they may have several
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
        is_scaled, is_whole = size != sides_of(self.img_size), out.shape[1] == self.channels
        is_one = bool(len(shards)) and (shards == shards[0]).all() and out.flags.c_contiguous
        if not is_scaled and is_whole and is_one and self._pixels(int(shards[0])).dtype == out.dtype:
            np.take(self._pixels(int(shards[0])), rows, axis=0, out=out, mode="clip")  # "raise" makes a copy first
        else:
            for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist())):
                pixels = self._pixels(shard)[row, : out.shape[1]]
                spot = None if at is None else at[place]
                out[place] = crop_pixels(pixels.astype(out.dtype, copy=False), size, spot) if is_scaled else pixels
        return self.facts(indices), {}

    def facts(self, indices: np.ndarray) -> np.ndarray:
        """Return what is known of images beside their pixels; see `Images.read`."""
        if not self.numbers and self.most_labels is None:
            return self.labels()[indices]
        found = np.empty(len(indices), facts_type(sum(size for _, size in self.numbers), self.most_labels))
        found["label"] = self.labels()[indices]
        if self.numbers:
            found["vectors"] = np.concatenate([self._column(name)[indices] for name, _ in self.numbers], axis=1)
        return found

    def labels(self) -> np.ndarray:
        """Return the classes, int64 (n,); of images that may have several (n, most_labels), filled up by -1."""
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
        """Return the pixels of a shard, (N, channels, H, W), read-only; mapped when they are first asked for."""
        return cache(lambda shard: _map_array(Path(self.folder) / self.shards[shard][0]))

    @cached_property
    def _column(self) -> Callable[[str], np.ndarray]:
        return cache(self._read_column)

    def _read_column(self, name: str) -> np.ndarray:
        if name == "label" and not self.is_labelled:
            return np.zeros(len(self), np.int64)
        width = self.most_labels if name == "label" else dict(self.numbers).get(name)
        if name != "label" and width is None:
            return self._read_parts(name)
        title = f"{'labels' if name == 'label' else name} of {self.folder}"
        found = shared_arrays(title, lambda: {name: self._read_parts(name, width).ravel()})[name]
        return found if width is None else found.reshape(len(self), width)

    def _read_parts(self, name: str, width: int | None = None) -> np.ndarray:
        parts = []
        for _, table, _ in self.shards:
            with pq.ParquetFile(Path(self.folder) / table) as parquet:  # `read_table` takes eight times as long
                column = parquet.read([name], use_threads=False)[0]
            parts.append(column.to_numpy() if width is None else _filled(column, width))
        return np.concatenate(parts)


def _filled(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return a column of numbers, or of lists of at most `width`, as (n, width), filled up by -1."""
    if not hasattr(column.type, "value_type"):
        return column.to_numpy()[:, None]
    lists = column.combine_chunks()
    values, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
    found = np.full((len(lists), width), -1, values.dtype)
    found[np.arange(width) < lengths[:, None]] = values
    return found


def _map_array(path: Path) -> np.ndarray:
    """Map a .npy file in C order. NumPy's own way keeps a file open for each, of which 1,024 are allowed."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    assert not is_fortran, f"{path}: not in C order"
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    array = mapped[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
    array.setflags(write=False)
    return array
