"""Which process and lane reads which images of a stream's epochs, and what is left of them after a stop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jit_accel.base import rng
from jit_accel.data.batches.spans import (
    EpochOrder,
    Span,
    clipped,
    cut,
    dealt,
    epoch_order,
    evenly,
    from_numbers,
    merged,
    numbers_in,
    total,
)


@dataclass(frozen=True)
class Place:
    """Where a lane stands: `offset` images into the shuffled block of `epoch` that begins with number `start`.

    block: the numbers of that block as spans; () at its beginning, where it need not have been read.
    """

    epoch: int = 0
    start: int = 0
    offset: int = 0
    block: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Partition:
    """The division of a stream among `world_size` processes of `num_lanes` lanes each.

    A lane reads its part of an epoch from front to back, whatever the number of workers. Where the units tell their
    sizes, each process gets exactly as many images as it takes until the epoch ends for all, so that the images at the
    positions [k n, (k + 1) n) of the run are the n of the data set. Where they do not, whole units are dealt, and
    processes reach the end of an epoch at different times.

    origin: position in the run where this division began. left: of the epochs begun before, what was left then.
    """

    seed: int
    num_units: int
    sizes: np.ndarray | None
    world_size: int
    batch_size: int
    num_lanes: int
    origin: int = 0
    left: dict[int, list[Span]] = field(default_factory=dict)
    _parts: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_images(self) -> int | None:
        return None if self.sizes is None else int(self.sizes.sum())

    def order(self, epoch: int) -> EpochOrder:
        return epoch_order(self.seed, epoch, self.num_units, self.sizes)

    def part(self, epoch: int, rank: int, lane: int) -> list[Span]:
        """What lane `lane` of process `rank` reads in `epoch`: sorted spans."""
        if epoch not in self._parts:
            if len(self._parts) > 2:  # lanes stand in two epochs at most
                del self._parts[min(self._parts)]
            self._parts[epoch] = self._divide(epoch)
        return self._parts[epoch][rank][lane]

    def _divide(self, epoch: int) -> list[list[list[Span]]]:
        order = self.order(epoch)
        spans = self.left.get(epoch, order.whole)
        if self.sizes is None:
            parts = dealt(spans, order.starts, self.world_size * self.num_lanes)
            return [parts[rank * self.num_lanes :][: self.num_lanes] for rank in range(self.world_size)]
        shares = self._shares(epoch)
        return [cut(part, evenly(total(part), self.num_lanes)) for part in cut(spans, shares)]

    def _shares(self, epoch: int) -> list[int]:
        """How many images of `epoch` each process takes from `origin` on."""
        n, per_batch = self.num_images, self.batch_size * self.world_size
        start, stop = (max(position - self.origin, 0) for position in (epoch * n, (epoch + 1) * n))

        def taken_before(position: int, rank: int) -> int:
            rounds, rest = divmod(position, per_batch)
            return rounds * self.batch_size + min(max(rest - rank * self.batch_size, 0), self.batch_size)

        return [taken_before(stop, rank) - taken_before(start, rank) for rank in range(self.world_size)]

    def remaining(self, places: list[list[Place]]) -> dict[int, list[Span]]:
        """What is left of each epoch that was begun, when the lanes of all processes stand at `places[rank][lane]`."""
        flat = [(rank, lane, place) for rank, row in enumerate(places) for lane, place in enumerate(row)]
        epochs = [place.epoch for *_, place in flat]
        left: dict[int, list[Span]] = {}
        for epoch in range(min(epochs), max(epochs) + 1):
            spans: list[Span] = []
            for rank, lane, place in flat:
                if place.epoch <= epoch:
                    part = self.part(epoch, rank, lane)
                    spans += self._rest(part, place) if place.epoch == epoch else part
            left[epoch] = merged(spans)
        return left

    def _rest(self, part: list[Span], place: Place) -> list[Span]:
        if not place.offset:
            return clipped(part, place.start)
        numbers = numbers_in(place.block)
        kept = numbers[shuffled(self.seed, place.epoch, numbers)[place.offset :]]
        return from_numbers(kept) + clipped(part, int(numbers[-1]) + 1)


def shuffled(seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
    """The order in which the images of one block are handed out, whoever reads it: int64 (k,), indices."""
    return np.argsort(rng.hash64(seed, f"block/{epoch}", numbers), kind="stable")
