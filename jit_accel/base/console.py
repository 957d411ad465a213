"""Lines and progress on the terminal or in a log file; where these cannot be written, the run goes on in silence."""

import contextlib
import os
import sys
import time

from tqdm.auto import tqdm

from jit_accel.base.redaction import redacted

_LINE_EVERY_S = 60.0


def say(message: str, file=None) -> None:
    """Print a line without secrets, above a progress bar if there is one."""
    file = file or sys.stdout
    message = redacted(message)
    try:
        try:
            tqdm.write(message, file=file)
        except UnicodeEncodeError:
            tqdm.write(message.encode(file.encoding, "replace").decode(file.encoding), file=file)
        file.flush()
    except (OSError, ValueError):
        _hush(file)


def warn(message: str) -> None:
    say(f"Warning: {message}", sys.stderr)


class ImageProgress:
    """Counts images of all processes, of `total`, `done` before: a bar on a terminal, a line a minute in a log file."""

    def __init__(self, name: str, total: int, done: int, is_shown: bool):
        self.name, self.total, self.done, self.made, self.is_shown = name, total, done, 0, is_shown
        self.began = self.said_at = time.monotonic()
        is_terminal = is_shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, unit=" images") if is_terminal else None

    def add(self, count: int) -> None:
        self.made += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.is_shown and time.monotonic() - self.said_at > _LINE_EVERY_S:
            self.said_at, there = time.monotonic(), self.done + self.made
            left_min = (self.total - there) / self.rate / 60
            say(f"{self.name}: {there:,}/{self.total:,} images | {self.rate:.3g} images/s | left {left_min:.0f} min")

    @property
    def rate(self) -> float:
        """Images/s, of those made now."""
        return self.made / max(time.monotonic() - self.began, 1e-9)

    def __enter__(self) -> "ImageProgress":
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()


def _hush(file) -> None:
    """Send what follows nowhere: what is left in the file's buffer would fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
