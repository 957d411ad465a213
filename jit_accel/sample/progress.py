"""How far a sampling is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm

from jit_accel.base.console import say

_LINE_EVERY_S = 60.0


class ImagesDone:
    """Counts images of all processes; silent where not `is_shown`."""

    def __init__(self, total: int, done: int, is_shown: bool):
        self.total, self.done, self.made, self.is_shown = total, done, 0, is_shown
        self.began = self.told_at = time.monotonic()
        is_terminal = is_shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc="sample", unit=" images") if is_terminal else None

    def add(self, count: int) -> None:
        self.made += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.is_shown and time.monotonic() - self.told_at > _LINE_EVERY_S:
            self.told_at = time.monotonic()
            left = (self.total - self.done - self.made) / self.rate
            say(
                f"{self.done + self.made:,}/{self.total:,} images | {self.rate:.3g} images/s | left {left / 60:.0f} min"
            )

    @property
    def rate(self) -> float:
        """Images/s, of those made now."""
        return self.made / max(time.monotonic() - self.began, 1e-9)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
