"""The lanes in which a process reads its share of a stream: rows in, decoded chunks in a shuffled order out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from jit_accel.base import rng
from jit_accel.base.errors import UserError
from jit_accel.data.batches import order
from jit_accel.data.batches.batch import MAX_SUBSTITUTES, decode_row, empty_batch
from jit_accel.data.batches.partition import Partition, Place, shuffled
from jit_accel.data.batches.spans import Span, clipped, from_numbers
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.decode import BadImage
from jit_accel.data.reading.read_ahead import ReadAhead

MAX_BLOCK_BYTES = 2**28  # a lane's block ends here at the latest, so that photos of megabytes do not fill the memory
MAX_UNREADABLE = 10_000


@dataclass
class Chunk:
    """Decoded images that come next in a lane, and the places before and after them.

    images: uint8 (k, 3, H, W), k <= batch_size, 0 where the lane has nothing in an epoch. labels: int64 (k,).
    mirror: bool (k,). bad_images: by their places in the chunk, "name: reason" of those that another image replaces.
    """

    lane: int
    before: Place
    images: torch.Tensor
    labels: np.ndarray
    mirror: np.ndarray
    bad_images: dict[int, str]
    after: Place

    def split(self, count: int) -> tuple[Chunk, Chunk]:
        """The first `count` images and the rest."""
        between = replace(self.before, offset=self.before.offset + count)
        bad = self.bad_images.items()
        first = replace(
            self,
            images=self.images[:count],
            labels=self.labels[:count],
            mirror=self.mirror[:count],
            bad_images={place: reason for place, reason in bad if place < count},
            after=between,
        )
        rest = replace(
            self,
            before=between,
            images=self.images[count:],
            labels=self.labels[count:],
            mirror=self.mirror[count:],
            bad_images={place - count: reason for place, reason in bad if place >= count},
        )
        return first, rest


@dataclass(frozen=True)
class Decoding:
    """What the lanes of a loader have in common."""

    img_size: int
    batch_size: int
    seed: int
    shuffle_buffer: int
    horizontal_flip: bool


class Item(NamedTuple):
    """An undecoded image: its number in the epoch, and where it lies."""

    number: int
    value: dict
    unit: int
    row: int


class Lane:
    """The endless chunks of one lane of process `rank`, from `place` on."""

    def __init__(self, source: Source, decoding: Decoding, partition: Partition, rank: int, lane: int, place: Place):
        self.name, self.stream, self.decoding, self.partition = source.name, source.images, decoding, partition
        self.rank, self.lane, self.place = rank, lane, place
        self.fallback: tuple[np.ndarray, int] | None = None

    def chunks(self) -> Iterator[Chunk]:
        while True:
            for chunk in self._epoch(self.place):
                self.place = chunk.after
                yield chunk

    def _epoch(self, place: Place) -> Iterator[Chunk]:
        """From `place` to the end of its epoch."""
        part = clipped(self.partition.part(place.epoch, self.rank, self.lane), place.start)
        over = Place(place.epoch + 1)
        with contextlib.closing(self._ahead(self._rows(place.epoch, part))) as rows:
            first = next(rows, None)
            if first is None:
                yield self._empty_chunk(0, place, over)
            while first is not None:
                block = self._read_block(itertools.chain([first], rows), place)
                first = next(rows, None)  # the block's last chunk must know whether the epoch ends with it
                begun = replace(place, block=tuple(from_numbers(np.array([item.number for item in block]))))
                place = Place(place.epoch, block[-1].number + 1)
                yield from self._block(block, begun, over if first is None else place)

    def _rows(self, epoch: int, spans: list[Span]) -> Iterator[Item]:
        """All images in `spans`."""
        for unit, first_number, ranges in self.partition.order(epoch).in_units(spans):
            row, missing = ranges[0][0], ranges[-1][1]
            rows = self.stream.training_rows(unit, row)
            for start, stop in ranges:
                for value in rows:
                    if row >= start:
                        yield Item(first_number + row, value, unit, row)
                    row += 1
                    if row == stop:
                        break
            if row < missing and self.partition.sizes is not None:
                raise UserError(
                    f"a shard ended after {row} images where there were {missing} when it was "
                    "opened: it changed or was cut short; restore it and go on with --resume auto.",
                    about="data_path",
                    value=self.name,
                )

    def _ahead(self, rows: Iterator[Item]) -> Iterator[Item]:
        """Over a network the next block is read while this one is decoded."""
        if not self.stream.is_remote:
            return rows
        return ReadAhead(rows, self.decoding.shuffle_buffer, MAX_BLOCK_BYTES, self._num_bytes)

    def _num_bytes(self, item: Item) -> int:
        data, _ = self.stream.columns.image_of(item.value[self.stream.columns.image])
        return len(data or b"")

    def _read_block(self, rows: Iterator[Item], place: Place) -> list[Item]:
        """The next images, as many as are shuffled together."""
        block, num_bytes = [], 0
        known = sum(b - a for a, b in place.block)  # a block that was begun ends where it ended
        while len(block) < (known or self.decoding.shuffle_buffer) and (known or num_bytes < MAX_BLOCK_BYTES):
            item = next(rows, None)
            if item is None:
                break
            num_bytes += self._num_bytes(item)
            block.append(item)
        return block

    def _block(self, block: list[Item], place: Place, after: Place) -> Iterator[Chunk]:
        """Decode the rest of a block in its shuffled order, in chunks that end at multiples of the batch size."""
        decoding, epoch = self.decoding, place.epoch
        numbers = np.array([item.number for item in block], np.int64)
        turns = shuffled(decoding.seed, epoch, numbers)
        mirrored = order.flips(decoding.seed, numbers, f"flip/{epoch}")
        while place.offset < len(block):
            stop = min((place.offset // decoding.batch_size + 1) * decoding.batch_size, len(block))
            following = replace(place, offset=stop)
            turns_now = turns[place.offset : stop]
            chunk = self._empty_chunk(len(turns_now), place, after if stop == len(block) else following)
            images = chunk.images.numpy()
            for n, k in enumerate(turns_now):
                try:
                    images[n], chunk.labels[n] = self._decode(block[k])
                except BadImage as error:
                    chunk.bad_images[n] = str(error)
                    images[n], chunk.labels[n] = self._substitute(block, numbers[k], epoch, str(error))
                chunk.mirror[n] = mirrored[k]
            yield chunk
            place = following

    def _empty_chunk(self, count: int, before: Place, after: Place) -> Chunk:
        size = self.decoding.img_size
        images = empty_batch((count, 3, size, size))
        return Chunk(self.lane, before, images, np.zeros(count, np.int64), np.zeros(count, bool), {}, after)

    def _substitute(self, block: list[Item], number: int, epoch: int, reason: str) -> tuple[np.ndarray, int]:
        """Another image of the block for one that is bad, so that batches keep their shape and epochs their length."""
        draws = int(number) * MAX_SUBSTITUTES + np.arange(MAX_SUBSTITUTES)
        for k in rng.hash64(self.decoding.seed, f"substitute/{epoch}", draws) % np.uint64(len(block)):
            try:
                return self._decode(block[int(k)])
            except BadImage:  # it is named at its own turn
                continue
        if self.fallback is None:
            self.fallback = self._first_readable(reason)
        return self.fallback

    def _first_readable(self, reason: str) -> tuple[np.ndarray, int]:
        rows = (
            Item(0, value, unit, row)
            for unit in range(self.stream.num_units)
            for row, value in enumerate(self.stream.training_rows(unit))
        )
        tried = 0
        for item in itertools.islice(rows, MAX_UNREADABLE):
            try:
                return self._decode(item)
            except BadImage:
                tried += 1
        raise UserError(
            f"none of {tried} images can be decoded ({reason}): repair the data.", about="data_path", value=self.name
        )

    def _decode(self, item: Item) -> tuple[np.ndarray, int]:
        columns, value = self.stream.columns, item.value
        name_of = partial(self.stream.name_of, item.unit, item.row)
        pixels = decode_row(value[columns.image], columns, self.decoding.img_size, name_of)
        return pixels, columns.label_of(value.get(columns.label))


class Lanes(torch.utils.data.IterableDataset):
    """The chunks of the lanes of one worker, in the order in which `StreamLoader` asks for them."""

    def __init__(self, lanes: list[Lane], epoch: int, turn: int):
        """`turn`: the lane of the whole process that comes next, in `epoch`, the least of its lanes'."""
        self.lanes, self.epoch, self.turn = lanes, epoch, turn

    def __iter__(self) -> Iterator[Chunk | UserError]:
        """A UserError is yielded, not raised: torch would bury its message under a worker's traceback."""
        chunks = [lane.chunks() for lane in self.lanes]
        places = [lane.place for lane in self.lanes]
        turn = self.turn if min(place.epoch for place in places) == self.epoch else 0
        try:
            while True:
                epoch = min(place.epoch for place in places)
                for n, lane in enumerate(self.lanes):
                    if lane.lane >= turn and places[n].epoch == epoch:
                        chunk = next(chunks[n])
                        places[n] = chunk.after
                        yield chunk
                turn = 0
        except UserError as error:
            yield error
