"""The list of all that happens every so many steps of a run, and the one question about it: what is due?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Occasion:
    """One row of the list. All processes act together.

    Attributes:
        every: interval in steps; 0 = never, or at the end alone.
        action: what is done.
        is_done: whether an earlier start has done it at the step it left off with; None where a checkpoint of that
            step proves it. All processes ask together.
        at_end: whether it belongs to the last step too, whatever the interval.
        reads_first: whether the metrics are read before, which may stop the run.
    """

    name: str
    every: int
    action: Callable[[], object]
    is_done: Callable[[], bool] | None = None
    at_end: bool = True
    reads_first: bool = True

    def falls_on(self, step: int, last_step: int) -> bool:
        """Return True where this step is one of its own."""
        if step == last_step:
            return self.at_end
        return self.every > 0 and step > 0 and step % self.every == 0


def due(occasions: Iterable[Occasion], step: int, last_step: int, *, is_new: bool) -> Iterator[Occasion]:
    """Yield what is to be done at this step, in the order of the list.

    Args:
        is_new: False where this start has not trained the step but begins with it: then only what an earlier start
            left undone is due.
    """
    for occasion in occasions:
        if occasion.falls_on(step, last_step) and (is_new or (occasion.is_done and not occasion.is_done())):
            yield occasion
