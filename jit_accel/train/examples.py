"""A few images of the data with their conditions, to look at what a network makes of these."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from jit_accel.base.image_rows import as_pictures
from jit_accel.config.presets import Size
from jit_accel.data.batches.batch import Batch, PixelBatch, listed, ready
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
    labels: list[int | list[int] | None]
    conditions: Tensor | None  # (n, C, H, W) in [0, 1]
    vectors: list[list[float]] | None = None  # (n, k) in the units of the data

    @property
    def rows(self) -> tuple[str, ...]:
        """The names of a sheet's rows."""
        return ROWS if self.conditions is not None else ROWS[1:]

    def given(self, places: list[int]) -> dict:
        """Return what these examples give to `generate`."""
        conditions = None if self.conditions is None else self.conditions[places]
        vectors = None if self.vectors is None else [self.vectors[place] for place in places]
        return {"conditions": conditions, "vectors": vectors}

    def around(self, made: np.ndarray) -> list[np.ndarray]:
        """Return pictures, uint8 (n, H, W, 3) each, for the rows of a sheet, with what was made of the examples."""
        return [self.shown, made, self.truth] if self.conditions is not None else [made, self.truth]

    @property
    def shown(self) -> np.ndarray:
        """The conditions as pictures, uint8 (n, H, W, 3)."""
        return as_pictures((self.conditions * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def choose_examples(
    source: Source,
    held_out: HeldOut | None,
    img_size: Size,
    condition_from: str | None,
    labels_of: Callable[[Batch], Tensor],
) -> Examples | None:
    """Return a few images held out, else of those trained on; None without conditions. All processes together.

    `labels_of` a batch gives its labels as the network knows them.
    """
    if condition_from is None and not source.condition_channels and source.vectors is None:
        return None
    degradation = None if condition_from is None else degradation_of(condition_from)
    if held_out:
        found = (held_out.images, held_out.labels, held_out.vectors)
        mine = zip(*(tensor[:COUNT] for tensor in found if tensor is not None))
        parts = zip(*[one for some in gather_object([list(mine)]) for one in some][:COUNT])
        images, labels, *vectors = map(torch.stack, parts)
        vectors = vectors[0] if vectors else None
        pixels = PixelBatch(images, labels, np.arange(len(images)), vectors=vectors, pixels=source.pixels)
        batch = ready(pixels, "cpu", degradation)
    else:
        count = min(COUNT, source.num_images)
        how = {"img_size": img_size, "batch_size": count, "horizontal_flip": False}
        with contextlib.closing(batches(source, condition_from=condition_from, **how)) as loader:
            batch = next(loader)
    truth = ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    conditions = None if batch.condition is None else (batch.condition + 1) / 2
    vectors = None if batch.vectors is None else source.vectors.restored(batch.vectors.numpy()).tolist()
    return Examples(as_pictures(truth), listed(labels_of(batch)), conditions, vectors)
