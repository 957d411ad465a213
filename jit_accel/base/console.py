"""Lines and progress on the terminal or in a log file, without secrets; where these cannot be written, silence."""

import contextlib
import os
import re
import sys
import time

from tqdm.auto import tqdm

_LINE_EVERY_S = 60.0
HIDDEN = "***"
# Of durations, each in seconds, and from how many of it on it is said.
_UNITS = {"days": (86400, 4.0), "hours": (3600, 1.5), "minutes": (60, 1.5), "seconds": (1, 0.0)}
# One slash is left of two where a URL was taken for a path.
_SCHEME = r"\b[a-z][a-z0-9+.-]+:/{1,2}"
_NAME = r"\w*(?:api[_-]?key|token|password|passwd|secret|access[_-]?key|credentials?)"
_VALUE = r"(?!\d+\b)[^\s\"',;&]{6,}"
# What is replaced, and by what; 40 hexadecimal digits alone are left: they are mostly git commits.
_PATTERNS = (
    (rf"({_SCHEME})[^\s/?#'\"<>|]*@(?=[^\s'\"<>|]|$)", rf"\1{HIDDEN}@"),
    (rf"({_SCHEME}[^\s?'\"<>|]*\?)[^\s'\"<>|]+", rf"\1{HIDDEN}"),
    (r"\b(?:hf|wandb_v1|gh[pousr]|github_pat)_[A-Za-z0-9_-]{16,}", HIDDEN),
    (r"\b(?:sk|glpat)-[A-Za-z0-9_-]{16,}|\b(?-i:AKIA[0-9A-Z]{16})\b|\blocal-[0-9a-f]{40}\b", HIDDEN),
    (r"(\bBearer\s+)\S{8,}", rf"\1{HIDDEN}"),
    (r"(\bapi[ _-]?key\W+)[0-9a-f]{40}\b", rf"\1{HIDDEN}"),
    (rf"({_NAME}\b[\"']?\s*[=:]\s*[\"']?|--{_NAME}\s+[\"']?){_VALUE}", rf"\1{HIDDEN}"),
)


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


class ImageProgress(contextlib.AbstractContextManager):
    """Counts images of all processes, of `total`, `done` before: a bar on a terminal, a line a minute in a log file."""

    def __init__(self, name: str, total: int, done: int, is_shown: bool):
        self.name, self.total, self.done, self.made = name, total, done, 0
        self.began = self.said_at = time.monotonic()
        is_bar = is_shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, unit=" images", disable=not is_bar)
        self.is_log = is_shown and not is_bar

    def add(self, count: int) -> None:
        self.made += count
        self.bar.update(count)
        if self.is_log and time.monotonic() - self.said_at > _LINE_EVERY_S:
            self.said_at, there = time.monotonic(), self.done + self.made
            left_min = (self.total - there) / self.rate / 60
            say(f"{self.name}: {there:,}/{self.total:,} images | {self.rate:.3g} images/s | left {left_min:.0f} min")

    @property
    def rate(self) -> float:
        """Images/s, of those made now."""
        return self.made / max(time.monotonic() - self.began, 1e-9)

    def __exit__(self, *exception) -> None:
        self.bar.close()


def _hush(file) -> None:
    """Send what follows nowhere: what is left in the file's buffer would fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def in_words(seconds: float) -> str:
    """Return a duration such as `about 70 hours`."""
    unit, size = next((unit, size) for unit, (size, least) in _UNITS.items() if seconds >= least * size)
    return f"about {two_digits(seconds / size)} {unit}"


def two_digits(value: float) -> str:
    """Return 0.123 as 0.12, and 123 as 120."""
    return f"{float(f'{value:.2g}'):.10g}"


def redacted(text: str) -> str:
    """Return `text` without the secrets that their looks give away.

    `https://user:pw@host/x?token=abc&size=3` becomes `https://***@host/x?***`; URLs without credentials and
    query stay as they are.
    """
    for pattern, replacement in _PATTERNS:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    return text
