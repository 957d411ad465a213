"""What is measured at each optimizer step, kept on the device until a whole interval is read at once."""

from __future__ import annotations

import torch
from torch import Tensor


class StepMetrics:
    """Losses and gradient norms of the steps since the last flush.

    Nothing here waits for the device, except `flush`: one all-reduce and one copy to the host.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[int] = []
        self.learning_rates: list[float] = []
        self.losses: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.occasional: list[tuple[int, str, Tensor]] = []

    def record(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Keep one step's values; `loss` is this process's mean, `grad_norm` the global one, before clipping."""
        self.steps.append(step)
        self.learning_rates.append(learning_rate)
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def record_occasional(self, name: str, value: Tensor) -> None:
        """Keep a further value of the step recorded last, one that not every step has."""
        self.occasional.append((self.steps[-1], name, value))

    def flush(self, reduce_mean, counters: list[float]) -> tuple[list[dict], list[float]]:
        """Read and forget the kept steps.

        Args:
            reduce_mean: averages a float32 tensor over the processes.
            counters: further numbers of this process to average with them.

        Returns:
            One row a step, keyed as the trackers show them, and the averaged counters.
        """
        kept = len(self.steps)
        # On the device also where no step is kept: NCCL reduces nothing else.
        values = torch.tensor(counters, dtype=torch.float32, device=self.device)
        if kept:
            further = [value for *_, value in self.occasional]
            values = torch.cat([torch.stack([*self.losses, *self.grad_norms, *further]).float(), values])
        values = reduce_mean(values).tolist()
        rows = [
            {"step": step, "train/loss": loss, "train/grad_norm": norm, "train/learning_rate": rate}
            for step, rate, loss, norm in zip(self.steps, self.learning_rates, values, values[kept:])
        ]
        by_step = {row["step"]: row for row in rows}
        for (step, name, _), value in zip(self.occasional, values[2 * kept :]):
            by_step[step][name] = value
        counters = values[2 * kept + len(self.occasional) :]
        self.__init__(self.device)
        return rows, counters
