"""The files of a data set, on this disk or on servers, whose files are fetched into the cache before they are read."""

import contextlib
import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

import aiohttp
import fsspec

from jit_accel.base.errors import UserError
from jit_accel.data.data_error import data_error
from jit_accel.data.reading import outages
from jit_accel.data.reading.outages import Outage, patiently, without_secrets
from jit_accel.data.reading.shard_cache import cached_shard

T = TypeVar("T")
Span = tuple[int, int]  # bytes [start, end)

CONNECT_S = READ_S = 30.0  # without a byte; there is no limit for the whole of a response
RACY_NS = 2_000_000_000  # coarsest mtime of a usual file system (FAT: 2 s)
_AT_ONCE = 16  # requests
_CHUNK = 2**20
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified")  # of file systems, which say what is in a file
# A forked process shares the epoll object of its parent's event loop. To free a connection it inherited would remove it
# there, and the parent would wait for the next answer in vain: so what may be inherited is kept.
_kept: list = []


@dataclass(frozen=True)
class LocalShard:
    """A file on this disk."""

    path: str
    is_remote = False

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def size(self) -> int:
        return os.path.getsize(self.path)

    def local(self, spans: Iterable[Span] = ()) -> str:
        """Return the path."""
        return self.path

    def identity(self) -> tuple[str, str, list, bool]:
        """Return its folder, its name, what changes with its content, and whether that is sure to."""
        info = os.stat(self.path)
        state = [info.st_size, info.st_mtime_ns]
        return *os.path.split(os.path.realpath(self.path)), state, info.st_mtime_ns < time.time_ns() - RACY_NS


@dataclass(frozen=True)
class RemoteShard:
    """A file on a server, as described at the start.

    size: bytes, or None where the server does not say. tag: changes with the content, or "". has_ranges: parts of the
    file can be asked for.
    """

    url: str
    size: int | None
    tag: str
    has_ranges: bool
    is_remote = True

    def __str__(self) -> str:
        return without_secrets(self.url)

    @property
    def name(self) -> str:
        return file_name(self.url)

    def local(self, spans: Iterable[Span] = ()) -> str:
        """Return the path of a copy on this disk: of the whole, or with holes around `spans`, of parts.

        UserError if the server refuses, or is away for too long; if the file has changed; if the disk is full.
        """
        spans = [(int(start), int(end)) for start, end in spans] if self.has_ranges else []
        key = "\0".join(map(str, (*self.identity()[:3], spans)))
        num_bytes = sum(end - start for start, end in spans) or self.size or 0
        return str(cached_shard(key, self.name, num_bytes, lambda file: self._write(file, spans)))

    def read(self, start: int, end: int) -> bytes:
        """Return bytes [start, end), which are not kept; see `local`."""
        out = io.BytesIO()
        self._receive(start, end, out)
        return out.getvalue()

    def identity(self) -> tuple[str, str, list, bool]:
        """See `LocalShard.identity`; signatures in addresses change, and count only where there is no tag."""
        return posixpath.dirname(str(self)), self.name, [self.size, self.tag or self.url], True

    def _write(self, file: BinaryIO, spans: list[Span]) -> None:
        for start, end in spans or [(0, self.size)]:
            file.seek(start)
            self._receive(start, end, file)
        if spans:
            file.truncate(self.size)

    def _receive(self, start: int, end: int | None, out: BinaryIO) -> None:
        """Write bytes [start, end) to `out`, going on where a response broke off; None: up to the end of the file."""
        outage, at, tail, is_complete = Outage(self.url), start, b"", False
        while not is_complete:
            try:
                with contextlib.closing(self._open(at, end)) as opened:
                    while at != end and (data := opened.read(_CHUNK if end is None else min(_CHUNK, end - at))):
                        out.write(data)
                        at, tail = at + len(data), (tail + data)[-512:]
                        outage.end()
                # Where no length is known, a response that was cut short looks complete: tar files end in zeros.
                is_complete = at == end if end is not None else not tail.strip(b"\0") or tail.endswith(b"PAR1")
                if not is_complete:
                    raise EOFError(f"a response ended after byte {at:,}")
            except Exception as error:  # of many kinds
                outage.wait(error)

    def _open(self, at: int, end: int | None) -> BinaryIO:
        """Open at byte `at`; where Range is not obeyed, what comes before is read in vain."""
        files, inside = file_system(self.url)
        if not _is_web(self.url):
            opened = files.open(inside, "rb", cache_type="none")
            opened.seek(at)
            return opened
        opened = _open_response(files, self.url, at, end)
        first, total = _range_of(opened.r)
        if None not in (total, self.size) and total != self.size:
            raise data_error(
                self,
                f"it has {total} bytes now and had {self.size} when it was opened: data must not change during a run; "
                "start anew, with --resume none where a checkpoint is of the old data.",
            )
        if first not in (0, at):
            raise ConnectionError("the server answered with another range")
        while first < at:
            if not (data := opened.read(min(_CHUNK, at - first))):
                raise EOFError(f"a response ended after byte {first:,}, before the one that broke off")
            first += len(data)
        return opened


Shard = LocalShard | RemoteShard


@contextlib.contextmanager
def at_hand(shard: Shard, spans: Iterable[Span] = ()) -> Iterator[str]:
    """Lend the path of a local copy; what is found to be wrong in it is said of the file itself."""
    path = shard.local(spans)
    try:
        yield path
    except UserError as error:
        if not shard.is_remote or not str(error.value).startswith(path):
            raise
        os.unlink(path)
        value = str(shard) + str(error.value)[len(path) :]
        raise UserError(error.rule, about=error.about, value=value, remedy=error.remedy) from error


def describe(url: str) -> RemoteShard:
    """Ask a server for what it says of a file; UserError if there is no such file, server or protocol."""
    files, inside = file_system(url)

    def attempt() -> RemoteShard:
        if not _is_web(url):
            info = files.info(inside)
            return RemoteShard(url, info.get("size"), next((str(info[n]) for n in _TAGS if info.get(n)), ""), True)
        with contextlib.closing(_open_response(files, url, 0, 1)) as opened:
            _, size = _range_of(opened.r)
            return RemoteShard(url, size, opened.r.headers.get("ETag", ""), opened.r.status == 206)

    return patiently(attempt, url, outages.OPENING_PATIENCE_S)


def at_once(ask: Callable[[Shard], T], shards: Iterable) -> list[T]:
    """Return `ask` of each, asked sixteen at a time; the first error ends it."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return list(threads.map(ask, shards))


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return what reads this URL, and the file's path there; UserError if none is known or installed."""
    options = {}
    if _is_web(url):  # with the proxies in environment variables, as HF does
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


def file_name(url: str) -> str:
    """Return `a.tar` of `https://host/folder/a.tar?key=value`."""
    return posixpath.basename(unquote(urlsplit(url).path))


def _is_web(url: str) -> bool:
    return url.partition("://")[0].lower() in ("http", "https")


def _open_response(files, url: str, start: int, end: int | None):
    headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
    return files.open(url, block_size=0, size=-1, headers=headers)  # with any size no other request is made for it


def _range_of(response: aiohttp.ClientResponse) -> tuple[int, int | None]:
    """Return the first byte of a response, and the size of the file if it says so."""
    if response.status == 200:
        length = response.headers.get("Content-Length")
        return 0, None if length is None else int(length)
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or match is None:
        raise ConnectionError(f"the server answers with status {response.status}")
    return int(match[1]), None if match[2] == "*" else int(match[2])
