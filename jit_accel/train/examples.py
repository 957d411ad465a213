"""A few images of the data with their conditions, to look at what a network makes of these."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from jit_accel.data.batches.batch import PixelBatch, ready
from jit_accel.data.batches.degradations import degradation_of
from jit_accel.data.batches.holdout import HeldOut
from jit_accel.data.batches.ready_batches import batches
from jit_accel.data.formats.source import Source

ROWS = ("condition", "output", "truth")
COUNT = 8


@dataclass(frozen=True)
class Examples:
    """Images, their labels and their conditions; the same on all processes."""

    truth: np.ndarray  # uint8 (n, H, W, 3)
    labels: list[int]
    conditions: Tensor  # (n, C, H, W) in [0, 1]

    @property
    def shown(self) -> np.ndarray:
        """The conditions as pictures, uint8 (n, H, W, 3)."""
        pixels = (self.conditions * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return (pixels if pixels.shape[-1] == 3 else pixels[..., :1].expand(-1, -1, -1, 3)).numpy()


def choose_examples(
    source: Source, held_out: HeldOut | None, img_size: int, condition_from: str | None
) -> Examples | None:
    """Return a few images held out, else of those trained on; None without conditions. All processes together."""
    if condition_from is None and not source.condition_channels:
        return None
    degradation = None if condition_from is None else degradation_of(condition_from)
    if held_out:
        mine = zip(held_out.images[:COUNT], held_out.labels[:COUNT])
        images, labels = zip(*[pair for pairs in gather_object([list(mine)]) for pair in pairs][:COUNT])
        pixels = PixelBatch(torch.stack(images), torch.stack(labels), np.arange(len(images)))
        batch = ready(pixels, "cpu", degradation)
    else:
        count = min(COUNT, source.num_images)
        how = {"img_size": img_size, "batch_size": count, "horizontal_flip": False}
        with contextlib.closing(batches(source, condition_from=condition_from, **how)) as loader:
            batch = next(loader)
    truth = ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Examples(truth, batch.labels.tolist(), (batch.condition + 1) / 2)
