"""Networks that fail: one line when a host is lost, patience, and a message where it is in vain."""

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from jit_accel.base.errors import UserError
from jit_accel.data.data_error import data_error

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
PATIENCE_S = 600.0  # without any progress, in the middle of a run
OPENING_PATIENCE_S = 30.0  # at its start, when more likely something is spelled wrong
QUIET_S = 60.0  # a connection that breaks and comes back at once is not worth a line each time

_PASSING_STATUS = {408, 425, 429}  # besides 5xx
_NETWORK_LIBRARIES = {
    *("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "http", "httpcore", "httpx", "httpx2"),
    *("huggingface_hub", "requests", "s3fs", "ssl", "urllib3"),
}
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_warned_s: dict[str, float] = {}  # of hosts: when a line last said that they fail


class Outage:
    """The failures of one reader since its last progress."""

    def __init__(self, url: str, patience_s: float | None = None):
        self._url, self._patience_s = without_secrets(url), patience_s or PATIENCE_S
        self._host = urlsplit(self._url).netloc
        self._began_s: float | None = None
        self._wait_s, self._has_warned = FIRST_WAIT_S, False

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt: half a second at first, doubling up to half a minute.

        Raises:
            UserError: the server refuses for good, or there was no progress for too long.
            Exception: `error` itself, where it is not the network's.
        """
        if not may_pass(error):
            if _status(error) is None and not isinstance(error, (FileNotFoundError, PermissionError)):
                raise error
            raise data_error(self._url, _refusal(error)) from error
        now = time.monotonic()
        self._began_s = self._began_s or now
        # One line for all readers of a host, which lose it together.
        if not self._has_warned and now - _warned_s.get(self._host, -QUIET_S) >= QUIET_S:
            self._has_warned, _warned_s[self._host] = True, now
            log.warning("%s: %s; trying again for up to %g s", self._url, _reason(error), self._patience_s)
        left_s = self._began_s + self._patience_s - now
        if left_s <= 0:
            raise data_error(
                self._url,
                f"no progress for {self._patience_s:g} s ({_reason(error)}): check the address, the network "
                "and the server, then go on with --resume auto.",
            ) from error
        time.sleep(min(self._wait_s, left_s))
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def end(self) -> None:
        """Start anew with the patience: there was progress."""
        if self._has_warned:
            passed_s = time.monotonic() - self._began_s
            log.warning("%s answers again after %.1f s: reading goes on where it stopped", self._host, passed_s)
        self._began_s, self._wait_s, self._has_warned = None, FIRST_WAIT_S, False


def patiently(attempt: Callable[[], T], url: str, patience_s: float | None = None) -> T:
    """Return the result of `attempt`, repeated while the network fails; UserError as of `Outage.wait`."""
    outage = Outage(url, patience_s)
    while True:
        try:
            result = attempt()
        except Exception as error:  # the libraries of networks raise errors of many kinds
            outage.wait(error)
        else:
            outage.end()
            return result


def may_pass(error: Exception) -> bool:
    """Return whether an error is of the kind that networks and servers recover from."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, (FileNotFoundError, PermissionError, UserError)):
        return False
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return False
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, EOFError, asyncio.TimeoutError)) or library in _NETWORK_LIBRARIES


def without_secrets(url: str) -> str:
    """Return a URL fit to be shown, without password and signature."""
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _status(error: Exception) -> int | None:
    """Return the HTTP status in errors of aiohttp, requests, httpx and huggingface_hub, and of botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) and status > 0 else None


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
