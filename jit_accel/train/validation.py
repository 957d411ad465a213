"""The loss on images that are not trained on, always with the same noise and times."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from jit_accel.data.batches.batch import Batch, PixelBatch, ready
from jit_accel.data.batches.holdout import HeldOut

MIN_DRAWS = 256


class Validation:
    """Mean loss over the held-out images of all processes.

    Noise and time follow from each image's content, so the loss does not depend on the number of processes, on the
    batch size, or on which files lie beside it.
    """

    seed = 0  # whatever the run's seed: runs are compared by this loss

    def __init__(self, held_out: HeldOut, accelerator, batch_size: int):
        self.held_out, self.accelerator, self.batch_size = held_out, accelerator, batch_size
        mine = torch.tensor([len(held_out.keys)], device=accelerator.device)
        counts = accelerator.gather(mine)
        self.num_images, self.most = int(counts.sum()), int(counts.max())
        # One time and noise an image say little when there are few.
        self.draws = max(1, MIN_DRAWS // max(1, self.num_images))

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (batch, weights): equally many on every process, since a sharded network needs all for each forward.

        Where a process has fewer images it goes on with its first ones, at weight 0; one without any has a grey one.
        """
        held, count = self.held_out, len(self.held_out.keys)
        if not count:
            grey = torch.full((1, *held.images.shape[1:]), 128, dtype=torch.uint8)
            held = HeldOut(grey, torch.zeros(1, dtype=torch.int64), np.zeros(1, np.int64))
        for start in range(0, self.most * self.draws, self.batch_size):
            numbers = torch.arange(start, min(start + self.batch_size, self.most * self.draws))
            draws, places = numbers // self.most, numbers % self.most
            weights = (places < count).float()
            places = places % len(held.keys)
            # another draw of an image is a neighbouring number, as different as any other
            positions = held.keys[places.numpy()] + draws.numpy()
            batch = PixelBatch(held.images[places], held.labels[places], positions)
            yield ready(batch, self.accelerator.device), weights

    @torch.no_grad()
    def loss(self, loss_of: Callable[[Batch], Tensor]) -> Tensor:
        """Return the mean, on the device, the same on all processes.

        loss_of(batch): losses, float32 (B,).
        """
        total = torch.zeros((), device=self.accelerator.device)
        for batch, weights in self.batches():
            total += (loss_of(batch) * weights.to(total.device)).sum()
        return self.accelerator.reduce(total, "sum") / (self.num_images * self.draws)
