"""The lengths of a run: epochs as optimizer steps."""

import math
from dataclasses import dataclass

from jit_accel.base.errors import UserError
from jit_accel.config.settings import OptimConfig

PAPER_EPOCHS = 200.0
PAPER_WARMUP_EPOCHS = 5.0


@dataclass(frozen=True)
class Plan:
    """The lengths of a run, in optimizer steps."""

    total_steps: int
    warmup_steps: int
    global_batch_size: int  # images of a step, over all processes and micro-steps
    num_images: int  # of one epoch

    def epoch_of(self, step: int) -> float:
        """Return the passes over the data after `step` optimizer steps."""
        return step * self.global_batch_size / self.num_images


def plan_run(optim: OptimConfig, *, num_images: int, world_size: int, accumulation: int | None = None) -> Plan:
    """Turn epochs into steps.

    Raises:
        UserError: the global batch is larger than the data, or the warm-up longer than the run.
    """
    accumulation = accumulation or optim.gradient_accumulation_steps or 1
    global_batch = optim.batch_size * world_size * accumulation
    if global_batch > num_images:
        raise UserError(
            f"must not be larger than the data set ({num_images} images): use a smaller batch or more images.",
            about="batch_size",
            value=f"{optim.batch_size} x {world_size} processes x {accumulation} accumulation steps = {global_batch}",
        )
    total = optim.max_steps or max(1, math.ceil((optim.epochs or PAPER_EPOCHS) * num_images / global_batch))
    if optim.warmup_steps is not None:
        warmup = optim.warmup_steps
    elif optim.warmup_epochs is not None:
        warmup = round(optim.warmup_epochs * num_images / global_batch)
    else:
        warmup = round(min(PAPER_WARMUP_EPOCHS * num_images / global_batch, 0.1 * total))
    if warmup > total:
        raise UserError(
            f"the warm-up of {warmup} steps is longer than the run of {total}: shorten it.", about="warmup_steps"
        )
    return Plan(total, warmup, global_batch, num_images)
