"""A request to stop, as an operator or a scheduler makes it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it is answered as Ctrl-C is."""

    number = signal.SIGTERM


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, so that whatever was begun is tidied up."""

    def end(number: int, frame) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignal:
    """Inside its `with` block SIGTERM and Ctrl-C only set `number`, so that a step can end in peace.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.number: int = 0

    def _request(self, number: int, frame) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> StopSignal:
        self._before = {n: signal.signal(n, self._request) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
