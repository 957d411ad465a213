"""Which image comes n-th: pure functions of (seed, position), nothing to save but one integer.

The run's images are numbered 0, 1, 2, ...; image number p (its *position*) is image
`epoch_permutation(seed, p // n, n)[p % n]` of the data set. Batches roll over the end of an epoch:
nothing is dropped or padded, and every image comes exactly once in an epoch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from jit_accel.base import rng


@lru_cache(maxsize=2)  # a batch at the end of an epoch needs two
def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` images in `epoch`: int64 (n,), read-only.

    Sorting hashes, unlike `Generator.permutation`, gives the same order with every version of NumPy.
    """
    order = np.argsort(rng.hash64(seed, f"order/{epoch}", np.arange(n)), kind="stable")
    order.setflags(write=False)
    return order


def batch_positions(base: int, rank: int, batch_size: int) -> np.ndarray:
    """Positions of rank `rank`'s next batch, int64 (batch_size,), when all ranks stand at `base`.

    A micro-batch of W ranks covers W * batch_size neighbouring positions, so that an optimizer step of
    (1 process, 4 accumulated), (2, 2) and (4, 1) sees the same images.
    """
    return base + rank * batch_size + np.arange(batch_size, dtype=np.int64)


def image_indices(seed: int, positions: np.ndarray, n: int) -> np.ndarray:
    """Indices into a data set of `n` images, int64, of the shape of `positions`."""
    epochs, places = np.divmod(positions, n)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_permutation(seed, int(epoch), n)[places[here]]
    return indices


def flips(seed: int, positions, purpose: str = "flip") -> np.ndarray:
    """Whether the image at each position is mirrored: bool, a fair coin of (seed, position)."""
    return rng.uniform(seed, purpose, positions) < 0.5
