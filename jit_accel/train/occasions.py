"""Things that happen beside the steps of a training, every so many of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jit_accel.base.spans import span


@dataclass(frozen=True)
class Occasion:
    """A thing that happens every so many steps of a run. All processes act, and ask whether it is done, together."""

    name: str
    every: int  # interval in steps; 0 = never, or at the end alone
    action: Callable[[], object]
    is_done: Callable[[], bool] | None = None  # by an earlier start; None where a checkpoint of the step proves it
    at_end: bool = True  # it belongs to the last step too, whatever the interval
    reads_first: bool = True  # the metrics are read before, which may end the run

    def act(self) -> None:
        """Do it, under its name in profiles."""
        with span(self.name):
            self.action()


def due(occasions: Iterable[Occasion], step: int, last_step: int, *, is_new: bool) -> Iterator[Occasion]:
    """Yield what is due, in order; where a start begins with the step (not `is_new`), what earlier ones left undone."""
    for occasion in occasions:
        is_now = occasion.at_end if step == last_step else step and occasion.every and step % occasion.every == 0
        if is_now and (is_new or (occasion.is_done and not occasion.is_done())):
            yield occasion
