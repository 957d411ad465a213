"""Files on servers: their addresses, requests for them, and patience with networks that fail."""

import asyncio
import errno
import itertools
import logging
import posixpath
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import aiohttp
import fsspec
import numpy as np

from jit_accel.base.errors import UserError
from jit_accel.data import data_error

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_S = READ_S = 30.0  # without a byte; there is no limit for the whole of a response
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
PATIENCE_S = 600.0  # without any progress, in the middle of a run
OPENING_PATIENCE_S = 30.0  # at its start, when more likely something is spelled wrong
QUIET_S = 60.0  # a connection that breaks and comes back at once is not worth a line each time
MOST_FILES = 100_000

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PASSING_STATUS = {408, 425, 429}  # besides 5xx
_NETWORK_LIBRARIES = {
    *("aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "http", "httpcore", "httpx", "httpx2"),
    *("huggingface_hub", "requests", "s3fs", "ssl", "urllib3"),
}
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_warned_s: dict[str, float] = {}  # of hosts: when a line last said that they fail
# A forked process shares the epoll object of its parent's event loop. To free a connection it inherited would remove it
# there, and the parent would wait for the next answer in vain: so what may be inherited is kept.
_kept: list = []


def is_url(path: str) -> bool:
    """Return whether `--data_path` names files on a server."""
    return bool(_URL.match(path))


def is_web(url: str) -> bool:
    """Return whether a web server is asked, and no storage that lists its files."""
    return url.partition("://")[0].lower() in ("http", "https")


def ending_of(url: str) -> str:
    """Return `.tar` of `https://host/a-{000..009}.tar?key=value`, in lower case."""
    return posixpath.splitext(urlsplit(url).path)[1].lower()


def file_name(url: str) -> str:
    """Return `a.tar` of `https://host/folder/a.tar?key=value`."""
    return posixpath.basename(unquote(urlsplit(url).path))


def without_secrets(url: str) -> str:
    """Return a URL fit to be shown, without password and signature."""
    parts = urlsplit(url)
    if not parts.scheme or not parts.netloc:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def find_urls(path: str) -> list[str]:
    """Return the files that an address with braces and asterisks means; UserError if a pattern matches none."""
    urls = []
    for pattern in expand_braces(path):
        if "*" not in pattern:
            urls.append(pattern)
            continue
        if is_web(pattern):
            rule = "web servers do not list their files: name them by braces, as in shard-{000..009}.tar."
            raise data_error(pattern, rule)
        files, inside = file_system(pattern)
        found = patiently(partial(files.glob, inside), pattern, OPENING_PATIENCE_S)
        if not found:
            raise data_error(pattern, "the pattern matches no file: correct the path.")
        urls += map(files.unstrip_protocol, sorted(found))
    return urls


def expand_braces(pattern: str) -> list[str]:
    """Return a-08-x, a-08-y, a-09-x, ... of `a-{08..10}-{x,y}`, in the order of a shell.

    UserError for braces that are no list or range, and for too many files.
    """
    pieces = _BRACES.split(pattern)  # text, braces, text, ..., text
    choices = [[piece] if n % 2 == 0 else _alternatives(piece, pattern) for n, piece in enumerate(pieces)]
    if np.prod([len(some) for some in choices], dtype=float) > MOST_FILES:
        raise data_error(pattern, f"these are more than {MOST_FILES:,} files: write larger shards.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    ends = _RANGE.fullmatch(inside)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if 0 <= last - first < MOST_FILES:
            return [f"{n:0{len(ends[1])}d}" for n in range(first, last + 1)]
    elif "," in inside:
        return inside.split(",")
    raise data_error(pattern, f"{{{inside}}} is no range and no list of names: write {{000..009}} or {{a,b}}.")


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return what reads this URL, and the file's path there; UserError if none is known or installed."""
    options = {}
    if is_web(url):  # with the proxies in environment variables, as HF does
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout}
    try:
        files, inside = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise data_error(without_secrets(url), f"{error}.") from error
    except ValueError as error:
        rule = f"unknown ({error}): https://, s3://, gs:// and hf:// are among those that can be read."
        raise data_error(without_secrets(url), f"{url.partition('://')[0].lower()}:// is {rule}") from error
    if not any(files is other for other in _kept):
        _kept.append(files)
    return files, inside


def open_response(
    files: fsspec.AbstractFileSystem, url: str, start: int, end: int | None
) -> tuple[Any, int, int | None]:
    """Return a web server's response for bytes [start, end), the first byte that it holds, and the file's size."""
    headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
    opened = files.open(url, block_size=0, size=-1, headers=headers)  # with any size no other request is made for it
    response = opened.r
    if response.status == 200:
        length = response.headers.get("Content-Length")
        return opened, 0, None if length is None else int(length)
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or match is None:
        opened.close()
        raise ConnectionError(f"the server answers with status {response.status}")
    return opened, int(match[1]), None if match[2] == "*" else int(match[2])


def at_once(ask: Callable[[Any], T], items: Iterable) -> list[T]:
    """Return `ask` of each, asked sixteen at a time; the first error ends it."""
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(ask, items))


class Outage:
    """The failures of one reader since its last progress."""

    def __init__(self, url: str, patience_s: float | None = None):
        self._url, self._patience_s = without_secrets(url), patience_s or PATIENCE_S
        self._host = urlsplit(self._url).netloc
        self._began_s: float | None = None
        self._wait_s, self._has_warned = FIRST_WAIT_S, False

    def wait(self, error: Exception) -> None:
        """Sleep before the next attempt: half a second at first, doubling up to half a minute.

        UserError if the server refuses for good, or there was no progress for too long; `error` itself is raised where
        it is not the network's.
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
            rule = f"no progress for {self._patience_s:g} s ({_reason(error)}): check the address, the network and the "
            rule += "server, and run the same command again; a training goes on with --resume auto."
            raise data_error(self._url, rule) from error
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
