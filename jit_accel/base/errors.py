"""The error that users can put right, and the checks that raise it; a request to stop."""

import contextlib
import difflib
import errno
import math
import os
import re
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

MOST = 10**12  # of whatever is counted or measured; a float holds it exactly
# Settings, of any program, that may name a file or folder.
PLACES = (
    *("data_path", "output_dir", "init_from", "resume", "eval_reference", "eval_feature_weights", "model", "images"),
    *("reference", "pairs", "feature_weights", "make_reference", "output", "input", "verify", "class_names", "config"),
    *("condition_path", "aux_feature_weights"),
)
LONGEST_VALUE = 200  # characters of a value that a message repeats


class UserError(Exception):
    """Something the user can put right. Programs print it without a traceback and exit with 2.

    Args:
        rule: what holds, and the remedy unless it is given by itself.
        about: the setting, or argument, that is at fault.
        value: what was given for it.
        remedy: what to do about it.

    `everywhere` is False where other processes of the run do not raise it, so that this one must print it.
    """

    everywhere = True

    # Exception.__new__ keeps `rule` as args and pickle the rest as attributes, so that errors travel as they are.
    def __init__(self, rule: str, *, about: str | None = None, value: object = None, remedy: str | None = None):
        self.rule, self.about, self.value, self.remedy = rule, about, value, remedy

    def in_words(self, prefix: str = "") -> str:
        """Return the message, with `prefix` before the name of the setting: programs give "--"."""
        given = "" if self.value is None else f" {self.value}"
        given = given if len(given) <= LONGEST_VALUE else f"{given[:LONGEST_VALUE]}..."
        subject = f"{prefix}{self.about}{given}: " if self.about else ""
        return subject + self.rule + (f" {self.remedy}" if self.remedy else "")

    def __str__(self) -> str:
        return self.in_words()

    def rename(self, names: Mapping[str, str]) -> None:
        """Call settings as the caller does, by `names` from one name to the other, also the flags in the text."""
        self.about = names.get(self.about, self.about)
        self.rule, self.remedy = (
            text and re.sub(r"--(\w+)", lambda flag: f"--{names.get(flag[1], flag[1])}", text)
            for text in (self.rule, self.remedy)
        )


class ProcessErrors(UserError):
    """Errors of the processes of a run that are not the same on all of them; None for a process without one."""

    def __init__(self, errors: Sequence[UserError | None]):
        super().__init__("the processes of the run do not have the same problem.")
        self.errors = errors

    def in_words(self, prefix: str = "") -> str:
        ranks: dict[str, list[str]] = {}
        for rank, error in enumerate(self.errors):
            if error is not None:
                ranks.setdefault(error.in_words(prefix), []).append(str(rank))
        return "\n".join(f"process{'es' * (len(on) > 1)} {', '.join(on)}: {text}" for text, on in ranks.items())

    def rename(self, names: Mapping[str, str]) -> None:
        for error in filter(None, self.errors):
            error.rename(names)


def message_of(error: BaseException) -> str:
    """Return what programs say of an error: a user's with its setting as a flag, others with their kind."""
    return error.in_words("--") if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def common_error(errors: Sequence[UserError | None]) -> UserError | None:
    """Return the one error that stands for those of all processes of a run, or None where none has any."""
    texts = {error and str(error) for error in errors}
    return errors[0] if len(texts) == 1 else ProcessErrors(errors)


@contextlib.contextmanager
def renamed_settings(**names: str) -> Iterator[None]:
    """Raise the block's errors about the caller's own settings: `renamed_settings(data_path="reference")`."""
    try:
        yield
    except UserError as error:
        error.rename(names)
        raise


def nearest(name: str, choices: Iterable[object], prefix: str = "") -> str:
    """Return ` Did you mean 'x'?`, or nothing where no choice is like `name`; `prefix` stands before the choice."""
    by_lower = {unicodedata.normalize("NFC", str(choice)).lower(): choice for choice in choices}
    match = difflib.get_close_matches(unicodedata.normalize("NFC", name).lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean '{prefix}{by_lower[match[0]]}'?" if match else ""


def lookup(table: Mapping[str, T], name: str, about: str, *, value: object = None, rule: str = "unknown") -> T:
    """Return `table[name]`, or raise `UserError` with the choices, the nearest match, and the `value` or the name."""
    if name in table:
        return table[name]
    given = name if value is None else value
    raise UserError(f"{rule}; choose from {', '.join(table)}.{nearest(name, table)}", about=about, value=given)


def check_ranges(values: Mapping[str, object], ranges: Iterable[tuple[str, Callable[..., bool], str]]) -> None:
    """Raise `UserError` for the first setting out of its range (name, predicate, in words), or finite and above `MOST`.

    None passes; seeds may be larger.
    """
    for name, holds, rule in ranges:
        value = values.get(name)
        if isinstance(value, int | float) and MOST < abs(value) < math.inf and name != "seed" and holds(value):
            holds, rule = (lambda _: False), f"at most {MOST:,}"
        if value is not None and not holds(value):
            text = f"{value:g}" if isinstance(value, float) else shown(value)
            raise UserError(f"must be {rule}.", about=name, value=text)


def check_places(values: Mapping[str, object]) -> None:
    """Raise `UserError` for a text that no system takes, and for a path that no file system can have."""
    for name, value in values.items():
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and "\0" in text:
                raise UserError("holds a character of the code 0: leave it out.", about=name, value=repr(text))
            if name not in PLACES or not isinstance(text, str) or "://" in text or "{" in text:
                continue
            try:
                encoded = os.fsencode(text)
            except UnicodeEncodeError:
                raise UserError("holds characters that no path can have.", about=name, value=repr(text)) from None
            if len(encoded) > 4096 or max(map(len, encoded.split(b"/"))) > 255:
                is_written = name in ("output_dir", "output")
                rule = "cannot be written to (File name too long): give another." if is_written else "too long a path."
                raise UserError(rule, about=name, value=text)
            if _is_loop(text):
                raise UserError("is a link that leads back to itself.", about=name, value=text)
            if text.startswith("~") and os.path.expanduser(text) == text:
                raise UserError("there is no such home: write the whole path.", about=name, value=text)


def _is_loop(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def within(low: int, high: int, *names: str) -> list[tuple[str, Callable[..., bool], str]]:
    """Return the ranges, for `check_ranges`, of settings that are whole numbers, or lists of them, in bounds."""
    allowed = range(low, high + 1)

    def holds(value: int | Sequence[int]) -> bool:
        return all(part in allowed for part in (value if isinstance(value, Sequence) else (value,)))

    return [(name, holds, f"at least {low} and at most {high:,}") for name in names]


def changed_settings(then: Mapping, now: Mapping, words: Mapping[str, str] | None = None) -> list[str]:
    """Return `--seed was 0 and is 1 now`, or the `words` for it, for each setting that differs from what it was."""
    return [
        (words or {}).get(name) or f"--{name} was {shown(then.get(name))} and is {shown(value)} now"
        for name, value in now.items()
        if shown(then.get(name)) != shown(value)
    ]


def shown(value: object) -> str:
    """Return a value as one would give it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


# Schedulers send SIGUSR1 or SIGUSR2 some time before they end a job; Windows has neither.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def shutdown_timeout_s() -> float | None:
    """Return how long torchrun waits between SIGTERM and SIGKILL, if its environment says so.

    Raises `UserError`: no number of seconds.
    """
    for name in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        if value := os.environ.get(name):
            if not value.isdecimal():
                raise UserError(f"{name} {value}: must be a whole number of seconds.")
            return float(value)
    return None


class StopRequest:
    """Inside its `with` block signals that ask for an end only set `number`, so that a step can end in peace.

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
        # Only the main thread gets signals, and may say what they do.
        is_main = threading.current_thread() is threading.main_thread()
        numbers = STOP_SIGNALS if is_main else ()
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
