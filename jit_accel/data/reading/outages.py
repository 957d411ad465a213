"""What to do when a network fails: say so once, wait, go on where it stopped; or give up with a message."""

from __future__ import annotations

import asyncio
import logging
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

from jit_accel.base.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
PATIENCE_S = 600.0  # without any progress, in the middle of a run
OPENING_PATIENCE_S = 30.0  # at its start, when more likely something is spelled wrong
QUIET_S = 60.0  # a connection that breaks and is mended at once is not worth a line each time
MOST_DAMAGED_READS = 3  # a file that is damaged each time it is read is damaged on the server

_PASSING_STATUS = {408, 425, 429}  # besides 5xx
_NETWORK_LIBRARIES = {
    *("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "http", "httpcore", "httpx"),
    *("huggingface_hub", "requests", "s3fs", "ssl", "urllib3"),
}
_DAMAGE = (tarfile.TarError, pa.ArrowInvalid)

# Of hosts: the outages that go on, when a line last told of one, and whether it told of those that go on.
_lock, _down, _said_s, _is_known = threading.Lock(), {}, {}, set()


class Outage:
    """The failures of one reader since its last progress.

    `wait` returns when it is time to try again; `over` tells that there was progress.
    """

    def __init__(self, url: str, patience_s: float | None = None):
        self.url, self._host = without_secrets(url), urlsplit(url).netloc or url
        self._patience_s = patience_s
        self._began_s, self._wait_s, self._damaged_reads = None, FIRST_WAIT_S, 0

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt: half a second at first, doubling up to half a minute.

        Raises:
            UserError: the server refuses for good, or there was no progress for too long.
            Exception: `error` itself, where it is not the network's.
        """
        try:
            self._wait(error)
        except Exception:
            self._end()
            raise

    def _wait(self, error: Exception) -> None:
        reason = _reason(error)
        if isinstance(error, _DAMAGE):
            self._damaged_reads += 1
            if self._damaged_reads == MOST_DAMAGED_READS:
                raise UserError(
                    f"it is damaged, or was cut short ({reason}): write it again and go on with --resume auto.",
                    about="data_path",
                    value=self.url,
                ) from error
        elif not may_pass(error):
            if _is_refusal(error):
                raise UserError(f"{_refusal(error)}", about="data_path", value=self.url) from error
            raise error
        patience_s, now = self._patience_s or PATIENCE_S, time.monotonic()
        is_first = self._began_s is None
        if is_first:
            self._began_s = now
        self._say(reason, patience_s, now, is_first)
        if now - self._began_s >= patience_s:
            raise UserError(
                f"no progress for {patience_s:g} s ({reason}): check the address, the network "
                "and the server, then go on with --resume auto.",
                about="data_path",
                value=self.url,
            ) from error
        time.sleep(min(self._wait_s, max(0.0, self._began_s + patience_s - now)))
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def over(self) -> None:
        """There was progress."""
        if self._began_s is not None:
            passed_s = time.monotonic() - self._began_s
            if self._end():
                log.warning("%s answers again after %.1f s: reading goes on where it stopped", self._host, passed_s)

    def _say(self, reason: str, patience_s: float, now: float, is_first: bool) -> None:
        """One line for all readers of a host, that lose it together; none for a mishap soon after the last line."""
        with _lock:
            _down.setdefault(self._host, set()).add(id(self))
            told_lately = self._host in _said_s and now - _said_s[self._host] < QUIET_S
            if self._host in _is_known or (is_first and told_lately):
                return
            _is_known.add(self._host)
            _said_s[self._host] = now
        log.warning("%s: %s; trying again for up to %g s", self.url, reason, patience_s)

    def _end(self) -> bool:
        """Forget the failures; whether that ends an outage of the host that a line told of."""
        self._began_s, self._wait_s, self._damaged_reads = None, FIRST_WAIT_S, 0
        with _lock:
            others = _down.get(self._host, set())
            others.discard(id(self))
            was_known = self._host in _is_known
            if not others:
                _is_known.discard(self._host)
            return was_known and not others


def patiently(attempt: Callable[[], T], url: str, patience_s: float | None = None) -> T:
    """The result of `attempt`, repeated while the network fails.

    Raises:
        UserError: see `Outage.wait`.
    """
    outage = Outage(url, patience_s)
    while True:
        try:
            result = attempt()
        except Exception as error:  # the libraries of networks raise errors of many kinds
            outage.wait(error)
        else:
            outage.over()
            return result


def steady(open_at: Callable[[int], Iterator[T]], start: int, url: str) -> Iterator[T]:
    """The rows `open_at(start)` yields; where reading fails it goes on with the next row, by `open_at` of its number.

    Raises:
        UserError: see `Outage.wait`.
    """
    outage, row = Outage(url), start
    while True:
        try:
            for value in open_at(row):
                outage.over()
                row += 1
                yield value
            return
        except Exception as error:  # of many kinds, as above
            outage.wait(error)


def may_pass(error: Exception) -> bool:
    """Whether an error is of the kind that networks and servers recover from."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, (FileNotFoundError, PermissionError, UserError)):
        return False
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, EOFError, asyncio.TimeoutError)) or library in _NETWORK_LIBRARIES


def without_secrets(url: str) -> str:
    """A URL fit to be shown: no password, no signature."""
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _status(error: Exception) -> int | None:
    """The HTTP status in errors of aiohttp, requests, httpx and huggingface_hub, and of botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) and status > 0 else None


def _is_refusal(error: Exception) -> bool:
    return _status(error) is not None or isinstance(error, (FileNotFoundError, PermissionError))


def _refusal(error: Exception) -> str:
    status = _status(error)
    if status == 404 or isinstance(error, FileNotFoundError):
        return "there is no such file: correct the address."
    if status in (401, 403) or isinstance(error, PermissionError):
        return f"the server denies access ({status or _reason(error)}): check your rights and the address."
    return f"the server answers with status {status}: correct the address."


def _reason(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        return f"the server answers with status {status}"
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
