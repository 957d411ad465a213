"""The list of all that happens every so many steps of a run, and the one question about it: what is due?"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Occasion:
    """One row of the list. All processes act, and ask whether it is done, together."""

    name: str
    every: int  # interval in steps; 0 = never, or at the end alone
    action: Callable[[], object]
    is_done: Callable[[], bool] | None = None  # by an earlier start; None where a checkpoint of the step proves it
    at_end: bool = True  # it belongs to the last step too, whatever the interval
    reads_first: bool = True  # the metrics are read before, which may stop the run


def due(occasions: Iterable[Occasion], step: int, last_step: int, *, is_new: bool) -> Iterator[Occasion]:
    """Yield what is to be done at this step, in the order of the list.

    Args:
        is_new: False where this start has not trained the step but begins with it: then only what an earlier start
            left undone is due.
    """
    for occasion in occasions:
        is_now = occasion.at_end if step == last_step else step and occasion.every and step % occasion.every == 0
        if is_now and (is_new or (occasion.is_done and not occasion.is_done())):
            yield occasion
