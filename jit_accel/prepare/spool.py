"""The Arrow files in which the images of a stream, which can only be read in order, wait to be shuffled."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from jit_accel.base.files import atomic_file
from jit_accel.data.reading.units import Stream
from jit_accel.prepare.encode import Encoded

MOST_PARTS = 256  # files that are open at once later
FEWEST_PARTS = 32  # for processes to share
MOST_CUTS = 8  # of one unit: what comes before a cut is read in vain
_TYPES = {"data": "large_binary", "name": "string", "label": "int64", "key": "uint64", "reason": "string"}
_SCHEMA = pa.schema([(name, getattr(pa, type)()) for name, type in _TYPES.items()])  # as the fields of `Encoded`

Piece = tuple[int, int, int]  # unit, its first row, and the row behind its last


def parts_of(stream: Stream) -> list[list[Piece]]:
    """Divide a stream into parts in its own order, whoever reads them: up to 256, of whole units or pieces of them."""
    cuts = 1 if stream.is_remote else max(1, min(MOST_CUTS, FEWEST_PARTS // stream.num_units))
    pieces: list[Piece] = []
    for unit, size in enumerate(stream.sizes.tolist()):
        edges = [size * n // cuts for n in range(cuts + 1)]
        pieces += [(unit, a, b) for a, b in pairwise(edges) if a != b]
    count = min(MOST_PARTS, len(pieces))
    return [pieces[len(pieces) * n // count : len(pieces) * (n + 1) // count] for n in range(count)]


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:03d}.arrow"


def write_part(path: Path, images: Iterable[Encoded]) -> None:
    """Write a part that is there whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batched(images, 2**16, 2**24):
            columns = zip(*batch)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


def batched(images: Iterable[Encoded], most_images: int, most_bytes: int) -> Iterator[list[Encoded]]:
    """Yield images in lists of at most so many images and bytes, or of a single larger image."""
    batch, num_bytes = [], 0
    for image in images:
        size = len(image.data or b"")
        if batch and (len(batch) == most_images or num_bytes + size > most_bytes):
            yield batch
            batch, num_bytes = [], 0
        batch.append(image)
        num_bytes += size
    if batch:
        yield batch


class Spool:
    """Random access to the images in all parts of a spool, numbered as in the stream without those left out."""

    def __init__(self, folder: Path, num_parts: int):
        self.folder, self.num_parts = folder, num_parts

    def __reduce__(self):
        return Spool, (self.folder, self.num_parts)  # the mapped files are not sent to processes

    @cached_property
    def table(self) -> pa.Table:
        """All images, also those that are left out, mapped into memory."""
        files = [pa.memory_map(str(part_path(self.folder, number))) for number in range(self.num_parts)]
        return pa.concat_tables([pa.ipc.open_file(file).read_all() for file in files] or [_SCHEMA.empty_table()])

    @cached_property
    def kept(self) -> np.ndarray:
        """The row of each image, int64 (n,)."""
        return np.flatnonzero(self.table["data"].is_valid().to_numpy())

    def __len__(self) -> int:
        return len(self.kept)

    def skipped(self) -> list[dict]:
        """Return `name` and `reason` of the images that are left out."""
        return self.table.select(["name", "reason"]).filter(self.table["data"].is_null()).to_pylist()

    def images_at(self, numbers: np.ndarray) -> Iterator[Encoded]:
        """Yield the images with these numbers, int64 (k,), in their order."""
        columns = [self.table[name] for name in _TYPES]
        for row in self.kept[numbers].tolist():
            yield Encoded(*(column[row].as_py() for column in columns))
