"""The lanes of a stream: undecoded rows in, by windows; decoded images out, in the order of `StreamOrder`."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch

from jit_accel.base import rng
from jit_accel.base.errors import UserError
from jit_accel.config.presets import Size, sides_of
from jit_accel.data import data_error, undecodable
from jit_accel.data.batches.batch import MAX_SUBSTITUTES, empty_batch
from jit_accel.data.batches.order import StreamOrder, shares
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.decode import BadImage, decode_row, facts_in_row
from jit_accel.data.reading.images import Stream

MAX_WINDOW_BYTES = 2**28  # so that photos of megabytes do not fill the memory
_SAMPLED_ROWS = 32  # for the size of an image
MAX_UNREADABLE = 10_000
Batches = Callable[[], Iterator[np.ndarray]]  # begins the sorted positions of batches, int64 (k,)


@dataclass
class OpenLane:
    """A lane that is being read in `epoch`, and its last window: the undecoded images [first, end) of the epoch."""

    epoch: int
    rows: Iterator[dict]
    window: int = -1
    first: int = -1
    end: int = -1
    images: list[dict] = field(default_factory=list)
    order: np.ndarray | None = None  # indices into `images`, as these are handed out
    used: int = 0  # the batch in which it was asked for last


class LaneReader:
    """The windows of a stream's lanes, each read once as long as the positions that are asked for only grow.

    A lane not used for as many batches as there are lanes is another reader's: each pattern has come again by then.
    """

    def __init__(self, source: Source, order: StreamOrder):
        self._name, self._stream, self._order = source.name, source.images, order
        self._lanes: dict[int, OpenLane] = {}
        self._batches = 0

    def window(self, epoch: int, lane: int, number: int) -> OpenLane:
        """Return `lane` at this window, read if it is not there; `UserError` where its shards have changed."""
        current = self._lanes.get(lane)
        if current is None or (current.epoch, current.window) != (epoch, number):
            current = self._lanes[lane] = self._read(lane, epoch, number)
        current.used = self._batches
        return current

    def end_batch(self) -> None:
        """Close the lanes that are no longer used."""
        self._batches += 1
        for lane in [lane for lane, one in self._lanes.items() if self._batches - one.used > self._order.lanes]:
            self._lanes.pop(lane).rows.close()

    def _read(self, lane: int, epoch: int, number: int) -> OpenLane:
        first, end = self._order.window_bounds(lane, number)
        current = self._lanes.pop(lane, None)
        if current is None or (current.epoch, current.end) != (epoch, first):
            if current is not None:
                current.rows.close()
            current = OpenLane(epoch, self._rows(epoch, first, self._order.lane_bounds(lane)[1]))
        current.images = []  # whose memory is free while the next ones are read
        current.images = list(islice(current.rows, end - first))
        current.window, current.first, current.end = number, first, end
        current.order = self._order.shuffled(epoch, lane, number) - first
        return current

    def _rows(self, epoch: int, first: int, end: int) -> Iterator[dict]:
        """Yield the images [first, end) of `epoch`; while one remote unit is read, the next is fetched."""
        units, starts = self._order.units(epoch)
        edges = np.searchsorted(starts, first, side="right") - 1, np.searchsorted(starts, end)
        places = [place for place in range(*map(int, edges)) if starts[place] < starts[place + 1]]
        for place, following in zip_longest(places, places[1:]):
            if following is not None:
                self._stream.fetch_ahead(int(units[following]))
            start, size = int(starts[place]), int(starts[place + 1] - starts[place])
            row, stop = max(first - start, 0), min(size, end - start)
            for value in islice(self._stream.training_rows(int(units[place]), row), stop - row):
                yield value
                row += 1
            if row < stop:
                rule = f"a shard ended after {row} images where there were {size} when it was opened: it changed or "
                rule += "was cut short; restore it and run the same command again; a training goes on with "
                raise data_error(self._name, rule + "--resume auto.")


@dataclass
class BatchPart:
    """The images of a batch that one reader decodes."""

    places: np.ndarray  # int64 (k,), sorted
    images: torch.Tensor  # uint8 (k, 3 + C, H, W), as in `PixelBatch`
    facts: np.ndarray  # (k,) of `Columns.facts_type`
    bad_images: dict[int, str]  # {place: "name: reason"}, replaced by other images


class BatchPartReader(torch.utils.data.IterableDataset):
    """The endless `BatchPart`s of reader `number` of `count`, which read the images of `batches` together.

    A UserError is an item and not raised: torch would bury its message under a worker's traceback.
    """

    def __init__(
        self,
        source: Source,
        order: StreamOrder,
        img_size: Size,
        batches: Batches,
        crops: Callable[[np.ndarray], np.ndarray | None],
        number: int,
        count: int,
    ):
        self._source, self._stream, self._order, self._img_size = source, source.images, order, img_size
        self._batches, self._crops, self._number, self._count = batches, crops, number, count
        self._first_readable: tuple[np.ndarray, Any] | None = None

    def __iter__(self) -> Iterator[BatchPart | UserError]:
        lanes = LaneReader(self._source, self._order)
        try:
            for positions in self._batches():
                yield self._part(lanes, positions)
                lanes.end_batch()
        except UserError as error:
            yield error

    def _part(self, lanes: LaneReader, positions: np.ndarray) -> BatchPart:
        by_place = self._order.places(positions)
        mine = shares(by_place.lane, self._count)[self._number]
        slots = np.argsort(np.argsort(mine))  # the images lie in the order of their places, and are read by lanes
        shape = (len(mine), self._stream.channels, *sides_of(self._img_size))
        pixels = empty_batch(shape, self._source.pixels.dtype)
        facts = np.empty(len(mine), self._stream.columns.facts_type)
        part = BatchPart(np.sort(mine), pixels, facts, {})
        images = part.images.numpy()
        columns = (slots, mine, *(values[mine] for values in by_place))
        crops = self._crops(positions[mine])
        crops = [None] * len(mine) if crops is None else crops.tolist()
        for slot, place, epoch, lane, number, offset, at in zip(*(column.tolist() for column in columns), crops):
            window = lanes.window(epoch, lane, number)
            try:
                images[slot], facts[slot] = self._decode(window, int(window.order[offset]), at)
            except BadImage as error:
                part.bad_images[place] = str(error)
                images[slot], facts[slot] = self._substitute(window, int(positions[place]), at, str(error))
        return part

    def _decode(self, window: OpenLane, index: int, at: float | None) -> tuple[np.ndarray, Any]:
        def name() -> str:
            unit, row = self._order.rows(window.epoch, window.first + index)
            return self._stream.name_of(int(unit), int(row))

        return self._decode_row(window.images[index], name, at)

    def _decode_row(self, row: dict, name: Callable[[], str], at: float | None = None) -> tuple[np.ndarray, Any]:
        columns = self._stream.columns
        return decode_row(row, columns, self._img_size, name, at), facts_in_row(row, columns, name)

    def _substitute(self, window: OpenLane, position: int, at: float | None, reason: str) -> tuple[np.ndarray, Any]:
        """Return another image of the window for one that is bad, so that batches keep their shape."""
        draws = position * MAX_SUBSTITUTES + np.arange(MAX_SUBSTITUTES)
        chosen = rng.hash64(self._order.seed, "substitute", draws) % np.uint64(len(window.images))
        for index in chosen.tolist():
            with contextlib.suppress(BadImage):  # it is named at its own turn
                return self._decode(window, index, at)
        if self._first_readable is not None:
            return self._first_readable
        stream = self._stream
        rows = ((unit, row) for unit in range(stream.num_units) for row in enumerate(stream.training_rows(unit)))
        for unit, (number, row) in islice(rows, MAX_UNREADABLE):
            with contextlib.suppress(BadImage):
                self._first_readable = self._decode_row(row, partial(stream.name_of, unit, number))
                return self._first_readable
        tried = min(int(stream.sizes.sum()), MAX_UNREADABLE)
        raise undecodable(self._source.name, f"none of {tried} images can be decoded", reason)


def images_in_a_window(stream: Stream, seed: int, shuffle_buffer: int) -> int:
    """Return `shuffle_buffer`, or fewer where the first images of the unit that is read first are too large for it."""
    units, _ = StreamOrder(seed, stream.sizes, lanes=1, window=1).units(epoch=0)
    first = int(units[np.flatnonzero(stream.sizes[units])[0]])
    rows = list(islice(stream.training_rows(first), _SAMPLED_ROWS))
    found = [stream.columns.image_of(row[name])[0] for row in rows for name in stream.columns.pictures]
    num_bytes = sum(len(data) for data in found if data is not None and not isinstance(data, str))
    return max(1, min(shuffle_buffer, int(MAX_WINDOW_BYTES * len(rows) / max(1, num_bytes))))
