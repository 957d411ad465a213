"""The lengths of a run: epochs as optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jit_accel.base.errors import UserError
from jit_accel.config.settings import OptimConfig

PAPER_EPOCHS = 200.0
PAPER_WARMUP_EPOCHS = 5.0


@dataclass(frozen=True)
class Plan:
    """The lengths and rates of a run, in optimizer steps.

    Attributes:
        num_images: images of one epoch, or None where a stream does not tell.
        global_batch_size: images per optimizer step, over all processes and micro-steps.
    """

    total_steps: int
    warmup_steps: int
    global_batch_size: int
    num_images: int | None

    def epoch_of(self, step: int) -> float:
        """Return the passes over the data after `step` optimizer steps (0 where the length is unknown)."""
        return step * self.global_batch_size / self.num_images if self.num_images else 0.0


def plan_run(optim: OptimConfig, *, num_images: int | None, world_size: int, accumulation: int | None = None) -> Plan:
    """Turn epochs into steps.

    Raises:
        UserError: the global batch is larger than the data, or epochs of a stream of unknown length.
    """
    accumulation = accumulation or optim.gradient_accumulation_steps or 1
    global_batch = optim.batch_size * world_size * accumulation
    if num_images is not None and global_batch > num_images:
        raise UserError(
            f"must not be larger than the data set ({num_images} images): use a smaller batch or more images.",
            about="batch_size",
            value=f"{optim.batch_size} x {world_size} processes x {accumulation} accumulation steps = {global_batch}",
        )
    if optim.max_steps is not None:
        total = optim.max_steps
    elif num_images is None:
        raise UserError("this data set does not tell its length: give --max_steps instead.", about="epochs")
    else:
        total = max(1, math.ceil((optim.epochs or PAPER_EPOCHS) * num_images / global_batch))
    return Plan(total, _warmup_steps(optim, total, num_images, global_batch), global_batch, num_images)


def _warmup_steps(optim: OptimConfig, total: int, num_images: int | None, global_batch: int) -> int:
    if optim.warmup_steps is not None:
        warmup = optim.warmup_steps
    elif optim.warmup_epochs is not None:
        if num_images is None:
            raise UserError(
                "this data set does not tell its length: give --warmup_steps instead.", about="warmup_epochs"
            )
        warmup = round(optim.warmup_epochs * num_images / global_batch)
    else:
        paper = PAPER_WARMUP_EPOCHS * (num_images or math.inf) / global_batch
        return round(min(paper, 0.1 * total))
    if warmup > total:
        raise UserError(
            f"the warm-up of {warmup} steps is longer than the run of {total}: shorten it.", about="warmup_steps"
        )
    return warmup


def ema_memory_steps(decay: float) -> float:
    """Return the steps over which an EMA of this decay averages."""
    return 1 / (1 - decay)
