"""Files on web servers, for fsspec and with it for HF datasets: reading survives servers that fail.

fsspec's own HTTP files take a response that ends early for the end of the file where nothing tells its length, do
not outlast a lost connection, and need servers that obey Range.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile

import aiohttp
import datasets
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from fsspec.spec import AbstractBufferedFile

from jit_accel.base.errors import UserError
from jit_accel.data.reading.outages import Outage, patiently, without_secrets

CONNECT_S = READ_S = 30.0  # without a byte; there is no limit for the whole of a response
_CHUNK = 2**18  # bytes
_infos: dict[str, dict] = {}  # what `_info` found; shards do not change
# A forked process shares the epoll object of its parent's event loop. To free a connection it inherited would remove it
# there, and the parent would wait for the next answer in vain: so what may be inherited is kept.
_kept: list = []


def install() -> None:
    """Make HF datasets read http(s):// by `SteadyHTTPFileSystem` in this process, and leave the waiting to us."""
    for protocol in ("http", "https"):
        fsspec.register_implementation(protocol, SteadyHTTPFileSystem, clobber=True)
    # HF would repeat each read twenty times at intervals of 5 to 60 s, most of them in vain
    for name in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{name}_MAX_RETRIES", 2)
    for name in ("READ_RETRY", "OPEN_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY"):
        setattr(datasets.config, f"STREAMING_{name}_INTERVAL", 0.5)


class SteadyHTTPFileSystem(HTTPFileSystem):
    """Read-only; opens a file for sequential reading where `block_size` is 0, else for random access."""

    def __init__(self, *args, **kwargs):
        client = {"timeout": _timeout()} | (kwargs.pop("client_kwargs", None) or {})
        super().__init__(*args, client_kwargs=client, **kwargs)
        _kept.append(self)  # few: fsspec gives each thread the same one again

    async def _glob(self, path, **kwargs):
        """No server is asked: HF looks up each of a list of URLs before it is read, one after another."""
        return {path: {"name": path, "size": None, "type": "file"}} if kwargs.get("detail") else [path]

    async def _info(self, url, **kwargs):
        """name, size (bytes, or None), partial (whether Range is obeyed); one small request a file and process."""
        if url not in _infos:
            async with await self.request(url, 0, 1) as response:
                headers, partial = response.headers, response.status == 206
                size = _total(headers) if partial else headers.get("Content-Length")
                info = {"name": url, "type": "file", "size": None if size is None else int(size), "partial": partial}
            _infos[url] = info | ({"ETag": headers["ETag"]} if "ETag" in headers else {})
        return _infos[url]

    async def request(self, url: str, start: int, end: int | None = None) -> aiohttp.ClientResponse:
        """Ask for the bytes from `start` on, up to `end`; status 206, or 200 where Range is ignored.

        Raises:
            aiohttp.ClientError, OSError: no such answer.
        """
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
        options = self.kwargs | {"headers": self.kwargs.get("headers", {}) | headers}
        session = await self.set_session()
        response = await session.get(self.encode_url(url), timeout=_timeout(), **options)
        if response.status not in (200, 206):
            response.close()
            response.raise_for_status()
            raise ConnectionError(f"the server answers with status {response.status}")
        return response

    async def read_range(self, url: str, start: int, end: int) -> bytes:
        """Exactly these bytes.

        Raises:
            aiohttp.ClientError, OSError, EOFError: the server gave others.
            UserError: the file has another size than before.
        """
        async with await self.request(url, start, end) as response:
            if response.status != 206:
                raise ConnectionError("the server ignored a Range it had obeyed before")
            _check_unchanged(url, response)
            data = await response.read()
        if len(data) != end - start:
            raise EOFError(f"a response ended after {len(data)} of {end - start} bytes")
        return data

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        if mode != "rb":
            raise NotImplementedError("only reading is supported")
        info = patiently(lambda: self.info(path), path)
        if (self.block_size if block_size is None else block_size) == 0:
            return SequentialFile(self, path, info["size"])
        if info["partial"]:
            return RandomAccessFile(self, path, size=info["size"], cache_type="none")
        return _download(SequentialFile(self, path, info["size"]))


class RandomAccessFile(AbstractBufferedFile):
    """A file read by ranges."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        return patiently(lambda: sync(self.fs.loop, self.fs.read_range, self.path, start, end), self.path)


class SequentialFile(io.RawIOBase):
    """A file read from front to back, in one response as long as it lasts; then the next begins where it broke off.

    size: bytes, or None where the server does not tell. Then a response that was cut short looks complete, so that the
    file has to end as tar (zeros) and Parquet files (PAR1) do.
    """

    def __init__(self, fs: SteadyHTTPFileSystem, url: str, size: int | None):
        self._fs, self._loop, self._url, self.size = fs, fs.loop, url, size
        self._pid, self._response, self._received, self._tail = os.getpid(), None, 0, b""
        self._buffer, self._outage, self._is_complete = memoryview(b""), Outage(url), False

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        """Bytes handed out."""
        return self._received - len(self._buffer)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, at least one before the end; all that is left where `size` is negative."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK), b""))
        if not self._buffer and not self._is_complete:
            self._buffer = memoryview(self._receive())
        data, self._buffer = bytes(self._buffer[:size]), self._buffer[size:]
        return data

    def readinto(self, out) -> int:
        """See `read`."""
        data = self.read(len(out))
        out[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """End the connection, whose response may be half read."""
        if not self.closed:
            self._drop()
        super().close()

    def _receive(self) -> bytes:
        while True:
            try:
                data = sync(self._loop, self._next)
            except Exception as error:
                self._drop()
                self._outage.wait(error)
            else:
                self._outage.over()
                return data

    async def _next(self) -> bytes:
        if self._received == self.size:
            self._is_complete = True
            return b""
        if self._response is None:
            self._response = await self._continued()
        data = await self._response.content.read(_CHUNK)
        if not data:
            self._check_complete()
        self._received += len(data)
        self._tail = (self._tail + data)[-512:]
        return data

    async def _continued(self) -> aiohttp.ClientResponse:
        """A response that stands at the first byte not yet received."""
        response = await self._fs.request(self._url, self._received)
        try:
            if response.status == 206:
                _check_unchanged(self._url, response)
                if _first(response.headers) != self._received:
                    raise ConnectionError("the server answered with another range")
                return response
            left = self._received  # this server does not obey Range
            while left:
                data = await response.content.read(min(left, _CHUNK))
                if not data:
                    raise EOFError(f"a response ended {left} bytes before the one that broke off")
                left -= len(data)
        except BaseException:
            response.close()
            raise
        return response

    def _check_complete(self) -> None:
        if self.size is not None and self._received != self.size:
            raise EOFError(f"a response ended after {self._received} of {self.size} bytes")
        if self.size is None and self._tail.strip(b"\0") and not self._tail.endswith(b"PAR1"):
            raise EOFError(f"a response ended after {self._received} bytes, without the mark of a file's end")
        self._is_complete = True

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None and self._pid != os.getpid():
            _kept.append(response)
        elif response is not None:
            self._loop.call_soon_threadsafe(response.close)


class _DownloadedFile(io.BufferedReader):
    """HF sets attributes of the files that it opens, which plain ones do not have."""


def _download(file: SequentialFile) -> _DownloadedFile:
    """The whole of a file, in a nameless temporary one: random access for servers that do not obey Range."""
    local = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed with the file returned)
    with file:
        shutil.copyfileobj(file, local, _CHUNK)
    local.seek(0)
    return _DownloadedFile(local)


def _timeout() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)


def _total(headers) -> str | None:
    match = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    return match and match[1]


def _first(headers) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return match and int(match[1])


def _check_unchanged(url: str, response: aiohttp.ClientResponse) -> None:
    size, total = _infos.get(url, {}).get("size"), _total(response.headers)
    if size is not None and total is not None and int(total) != size:
        raise UserError(
            f"it has {total} bytes now and had {size} when it was opened: data "
            "must not change during a run; start anew, with --resume none where a checkpoint is of the old data.",
            about="data_path",
            value=without_secrets(url),
        )
