"""Where the images of a stream, which can only be read in order, wait to be shuffled: one Arrow file a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
_BATCH_BYTES = 2**24
_TYPES = {"data": "large_binary", "name": "string", "label": "int64", "key": "uint64", "reason": "string"}
_SCHEMA = pa.schema([(name, getattr(pa, type)()) for name, type in _TYPES.items()])  # as the fields of `Encoded`

Piece = tuple[int, int, int | None]  # unit, its first row, and the row behind its last or None for all


def parts_of(stream: Stream) -> list[list[Piece]]:
    """Divide a stream into parts in its own order, whoever reads them: up to 256, of whole units or pieces of them."""
    sizes = stream.sizes
    cuts = 1
    if sizes is not None and not stream.is_remote:
        cuts = max(1, min(MOST_CUTS, FEWEST_PARTS // stream.num_units))
    pieces: list[Piece] = []
    for unit in range(stream.num_units) if sizes is None else np.flatnonzero(sizes).tolist():
        edges = [int(sizes[unit]) * n // cuts for n in range(cuts + 1)] if cuts > 1 else [0, None]
        pieces += [(unit, a, b) for a, b in pairwise(edges) if a != b]
    count = min(MOST_PARTS, len(pieces))
    edges = [len(pieces) * n // count for n in range(count + 1)]
    return [pieces[a:b] for a, b in pairwise(edges)]


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:03d}.arrow"


def write_part(path: Path, images: Iterable[Encoded]) -> None:
    """Write a part that is there whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in _batches(images):
            columns = list(zip(*batch))
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


def _batches(images: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    batch, num_bytes = [], 0
    for image in images:
        batch.append(image)
        num_bytes += len(image.data or b"") + 200
        if num_bytes > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


@dataclass
class Spool:
    """Random access to the images in the parts of a spool, numbered in the order of the stream."""

    folder: Path
    num_parts: int
    _tables: dict = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": {}}

    def counts(self) -> np.ndarray:
        """The number of images in each part, without those that are left out: int64 (num_parts,)."""
        counts = [len(table) - table["data"].null_count for table in map(self._read, range(self.num_parts))]
        return np.array(counts, np.int64)

    def largest_label(self) -> int:
        """-1 where there are no images."""
        return max((max(self._read(n)["label"].to_pylist(), default=-1) for n in range(self.num_parts)), default=-1)

    def skipped(self) -> list[dict]:
        """`name` and `reason` of the images that are left out."""
        found = []
        for table in map(self._read, range(self.num_parts)):
            if table["data"].null_count:
                found += table.select(["name", "reason"]).filter(table["data"].is_null()).to_pylist()
        return found

    def images_at(self, numbers: np.ndarray, counts: np.ndarray) -> Iterator[Encoded]:
        """The images with these numbers, int64 (k,), in their order."""
        ends = np.cumsum(counts)
        parts = np.searchsorted(ends, numbers, side="right")
        rows = numbers - (ends - counts)[parts]
        for part, row in zip(parts.tolist(), rows.tolist()):
            table, kept = self._part(part)
            yield Encoded(*(table[column][int(kept[row])].as_py() for column in _TYPES))

    def _part(self, number: int) -> tuple[pa.Table, np.ndarray]:
        if number not in self._tables:
            table = self._read(number)
            kept = np.flatnonzero(table["data"].is_valid().to_numpy())
            self._tables[number] = table, kept
        return self._tables[number]

    def _read(self, number: int) -> pa.Table:
        with pa.memory_map(str(part_path(self.folder, number))) as file:
            return pa.ipc.open_file(file).read_all()
