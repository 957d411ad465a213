"""A request to stop, as an operator or a scheduler makes it."""

import signal


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopRequest:
    """Inside its `with` block SIGTERM and Ctrl-C only set `number`, so that a step can end in peace.

    A second Ctrl-C interrupts at once. With `at_once` the signals raise `Stopped` where they come, so that whatever was
    begun is tidied up.
    """

    def __init__(self, at_once: bool = False):
        self.number: int = 0
        self.at_once = at_once

    def raise_if_asked(self) -> None:
        """Raise `Stopped` once a signal has come."""
        if self.number:
            raise Stopped(self.number)

    def _receive(self, number: int, frame) -> None:
        if self.at_once:
            raise Stopped(number)
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> "StopRequest":
        self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
