"""Tokens that a micro-batch leaves out of the middle blocks of the network in training (TREAD, 2501.04765)."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from jit_accel.base import rng
from jit_accel.data.batches.batch import Batch


@dataclass(frozen=True)
class TokenRouting:
    """Leads a `share` of the `count` tokens of images past the middle blocks: others in each micro-batch."""

    share: float
    count: int
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the tokens that it keeps."""
        kept = torch.from_numpy(self.kept(batch.positions[0]))
        return replace(batch, kept_tokens=kept.to(batch.images.device, non_blocking=True))

    def kept(self, position: int) -> np.ndarray:
        """Return the numbers of the kept tokens, in order, of a micro-batch whose first image has this position."""
        keys = rng.hash64(self.seed, "routing", [position]) + np.arange(self.count, dtype=np.uint64)
        kept = max(1, self.count - round(self.share * self.count))
        return np.sort(rng.hash64(self.seed, "routed_token", keys).argsort()[:kept])
