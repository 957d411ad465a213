"""The order of the images: pure functions of (seed, position), nothing to save but one integer.

The run's images are numbered 0, 1, 2, ...; the number of an image is its *position*. Epoch k consists of the positions
[k n, (k + 1) n), in which every image comes exactly once; batches roll over its end. Random access: position p is image
`epoch_permutation(seed, p // n, n)[p % n]`, or of so many images that sorting them would cost each process seconds and
memory, `rng.permuted`. Sources in units, which are read front to back: see `StreamOrder`.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from jit_accel.base import rng

LANES_EACH = 8  # of a process, where there are units enough
# Kinds of random access, which a run keeps: checkpoints name theirs, and those that name none were of SORTED.
SORTED, FEISTEL = "sorted", "feistel"
KINDS = (SORTED, FEISTEL)
MOST_SORTED = 2**20  # images: 0.1 s and 8 MiB an epoch in each worker (benchmarks/scale.py)


@lru_cache(maxsize=2)  # a batch at the end of an epoch needs two
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of the `n` images in `epoch`: int64 (n,), read-only."""
    return _sorted_by_hash(seed, f"order/{epoch}", np.arange(n))


def batch_positions(base: int, rank: int, batch_size: int) -> np.ndarray:
    """Return the positions of rank `rank`'s next batch, int64 (batch_size,), when all ranks stand at `base`.

    Those of all ranks are neighbours: steps of (1 process, 4 accumulated), (2, 2) and (4, 1) see the same images.
    """
    return base + rank * batch_size + np.arange(batch_size, dtype=np.int64)


def default_kind(n: int) -> str:
    """Return the kind of random access to `n` images for a new run."""
    return SORTED if n <= MOST_SORTED else FEISTEL


def image_indices(seed: int, positions: np.ndarray, n: int, kind: str = SORTED) -> np.ndarray:
    """Return indices into a data set of `n` images, int64, of the shape of `positions`."""
    epochs, places = np.divmod(positions, n)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        if kind == FEISTEL:
            indices[here] = rng.permuted(seed, f"order/{epoch}", places[here], n)
        else:
            indices[here] = epoch_permutation(seed, epoch, n)[places[here]]
    return indices


def flips(seed: int, positions) -> np.ndarray:
    """Return for each position if its image is mirrored: bool, a fair coin of (seed, position)."""
    return rng.uniform(seed, "flip", positions) < 0.5


def middle(seed: int, positions) -> None:
    """Return None: the crops of all images lie in their middle."""


def anywhere(seed: int, positions) -> np.ndarray:
    """Return for each position where the crop of its image lies, between the two ends of the room there is: float64."""
    return rng.uniform(seed, "crop", positions)


CROPS = {"center": middle, "random": anywhere}


class Place(NamedTuple):
    """The images at `offset` in the shuffled order of `window` of `lane` in `epoch`: int64 (k,) each."""

    epoch: np.ndarray
    lane: np.ndarray
    window: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True, eq=False)
class StreamOrder:
    """The order of a source in units of `sizes` images, int64 (U,).

    In each epoch the units are shuffled and laid end to end, which numbers the images 0 ... n - 1. That row is cut into
    `lanes` lanes of equal length (to one image), and each lane is shuffled in windows of `window` images. Position p of
    an epoch is lane p mod `lanes`, place p div `lanes`.
    """

    seed: int
    sizes: np.ndarray
    lanes: int
    window: int

    @cached_property
    def num_images(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def _epochs(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the units in the order of `epoch`, int64 (U,), and the numbers of their first images, (U + 1,)."""
        if epoch not in self._epochs:
            if len(self._epochs) > 2:  # lanes stand in two epochs at most, but for tiny data
                del self._epochs[min(self._epochs)]
            units = _sorted_by_hash(self.seed, f"units/{epoch}", np.arange(len(self.sizes)))
            self._epochs[epoch] = units, np.concatenate([[0], np.cumsum(self.sizes[units])])
        return self._epochs[epoch]

    def places(self, positions: np.ndarray) -> Place:
        """Return where the images at `positions`, int64 (k,), stand."""
        epoch, place = np.divmod(positions, self.num_images)
        window, offset = np.divmod(place // self.lanes, self.window)
        return Place(epoch, place % self.lanes, window, offset)

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """Return the numbers [first, end) of the images of `lane` in every epoch."""
        length, longer = divmod(self.num_images, self.lanes)
        return tuple(number * length + min(number, longer) for number in (lane, lane + 1))

    def window_bounds(self, lane: int, window: int) -> tuple[int, int]:
        """Return the numbers [first, end) of the images of one window in every epoch."""
        first, end = self.lane_bounds(lane)
        return first + window * self.window, min(first + (window + 1) * self.window, end)

    def shuffled(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Return the numbers of a window's images in the order in which they are handed out, int64."""
        return _sorted_by_hash(self.seed, f"window/{epoch}", np.arange(*self.window_bounds(lane, window)))

    def rows(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the units that hold the images `numbers` of `epoch`, and the images' rows there, of that shape."""
        units, starts = self.units(epoch)
        places = np.searchsorted(starts, numbers, side="right") - 1
        return units[places], numbers - starts[places]

    def positions_of(self, base: int, rank: int, world_size: int, batch_size: int) -> np.ndarray:
        """Return the positions of rank `rank`'s next batch, as `batch_positions`, but by lanes; sorted."""
        positions = base + np.arange(world_size * batch_size, dtype=np.int64)
        return positions[np.sort(shares(self.places(positions).lane, world_size)[rank])]


def shares(lanes: np.ndarray, count: int) -> list[np.ndarray]:
    """Divide images of these `lanes`, int64 (k,), among readers evenly, so that each reads as few lanes as can be.

    Returns for each reader the indices of its images, lane by lane, those of one lane in their order.
    """
    by_lane = np.argsort(lanes, kind="stable")
    edges = [len(lanes) * n // count for n in range(count + 1)]
    return [by_lane[start:end] for start, end in itertools.pairwise(edges)]


def default_lanes(num_units: int, world_size: int, batch_size: int) -> int:
    """Return a number of lanes for a new run: about eight a process, at most `num_units`.

    Multiples of `world_size` that divide a batch of all processes come first: no lane is then read by two.
    """
    most, step_images = max(1, min(LANES_EACH * world_size, num_units)), world_size * batch_size
    for multiple_of in (world_size, 1):
        fitting = [lanes for lanes in range(multiple_of, most + 1, multiple_of) if step_images % lanes == 0]
        if fitting and 2 * fitting[-1] >= most:
            return fitting[-1]
    return most


def _sorted_by_hash(seed: int, purpose: str, numbers: np.ndarray) -> np.ndarray:
    # Unlike `Generator.permutation` the same with every version of NumPy
    order = numbers[np.argsort(rng.hash64(seed, purpose, numbers), kind="stable")]
    order.setflags(write=False)
    return order
