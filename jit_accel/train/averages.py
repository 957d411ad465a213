"""Exponential moving averages of the weights, several decays at once, in float32 beside the model.

A fixed decay d averages over 1/(1-d) steps: on a run that is not many times longer the average still holds
the random weights of the start. `auto` lets the memory grow with the run, always a tenth of the steps so far
(the power-function averages of Karras et al., arXiv 2312.02696, have such a constant relative width). Of two of these
snapshots may be stored, which others are made of after the training: see `model/width_averages.py`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jit_accel.base.processes import reshard
from jit_accel.base.spans import span
from jit_accel.config.groups import width_of
from jit_accel.model.width_averages import decay_of_width
from jit_accel.monitor.metric_table import AUTO_DECAY

AUTO = "auto"
AUTO_SHARE = 0.1
AUTO_MAX_DECAY = 0.9999


def decay_at(name: str, step: int) -> float:
    """Return the decay of the update after the optimizer step that brought the count to `step` (1, 2, ...)."""
    if width := width_of(name):
        return decay_of_width(width, step)
    if name != AUTO:
        return float(name)
    # 1/(1-d) = AUTO_SHARE * step, and at least one step: the first ten copy the weights.
    return min(AUTO_MAX_DECAY, max(0.0, 1 - 1 / (AUTO_SHARE * step)))


class Ema:
    """Averages of a model's trainable parameters, one for each name in `decays` ("auto" or a number in text).

    `widths` holds those that are tracked for snapshots alone, one for each name in `tracked`, such as "width_0.05".

    Build it after the model is on its device and sharded: the averages live where the parameters do.
    """

    def __init__(self, model: nn.Module, decays: Iterable[str], tracked: Iterable[str] = ()):
        self.model = model
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages, self.widths = self._begun(decays), self._begun(tracked)
        # The decay that the run names first: its samples and its pipeline are made of this average.
        self.name, self.first = next(iter(self.averages.items()))

    def _begun(self, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        return {each: {name: p.detach().float().clone() for name, p in self.params.items()} for each in names}

    @property
    def all(self) -> dict[str, dict[str, Tensor]]:
        """Every average by its name."""
        return self.averages | self.widths

    @span("averages")
    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average towards the weights; `step` counts from 1."""
        weights = [p.detach() for p in self.params.values()]
        for decay, average in self.all.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay_at(decay, step))

    def measured_at(self, step: int) -> dict[str, float]:
        """Return the decay of the growing average at `step`, if there is one, keyed as the trackers show it."""
        return {AUTO_DECAY: decay_at(AUTO, step)} if AUTO in self.averages else {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the model's weights for their first average inside the block, and exactly back after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self.model)  # weights that were gathered for a forward would stay as they were
        # In place, tensor by tensor: compiled graphs and sharded parameters keep their addresses, and
        # never more than one parameter is held twice.
        for name, average in self.first.items():
            weight = self.params[name]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
