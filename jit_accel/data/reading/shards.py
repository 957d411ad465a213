"""The files of a data set, on this disk or on servers, whose files are fetched into the cache before they are read."""

import contextlib
import glob
import io
import json
import logging
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jit_accel.base.errors import UserError, nearest
from jit_accel.base.findings import findings_file, read_findings, write_findings
from jit_accel.data import data_error
from jit_accel.data.reading import servers
from jit_accel.data.reading.cache import RACY_NS, cached_shard
from jit_accel.data.reading.servers import Outage, at_once, file_system, is_url, is_web, open_response, without_secrets
from jit_accel.data.reading.splits import files_of_splits

log = logging.getLogger(__name__)
Span = tuple[int, int]  # bytes [start, end)

_CHUNK = 2**20
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified")  # of file systems, which say what is in a file


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
    """A file on a server, as described at the start."""

    url: str
    size: int | None  # bytes, where the server says so
    tag: str  # which changes with the content, or ""
    has_ranges: bool  # parts of the file can be asked for
    is_remote = True

    def __str__(self) -> str:
        return without_secrets(self.url)

    @property
    def name(self) -> str:
        return servers.file_name(self.url)

    def local(self, spans: Iterable[Span] = ()) -> str:
        """Return the path of a copy of the whole, or of `spans` with holes around; UserError if it cannot be had."""
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
        if not is_web(self.url):
            opened = files.open(inside, "rb", cache_type="none")
            opened.seek(at)
            return opened
        opened, first, total = open_response(files, self.url, at, end)
        if None not in (total, self.size) and total != self.size:
            rule = f"it has {total} bytes now and had {self.size} when it was opened: data must not change during a "
            raise data_error(self, rule + "run; start anew, with --resume none where a checkpoint is of the old data.")
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
        if not is_web(url):
            info = files.info(inside)
            size, tag = info.get("size"), next((str(info[n]) for n in _TAGS if info.get(n)), "")
            return RemoteShard(url, size, tag, size is not None)
        opened, _, size = open_response(files, url, 0, 1)
        with contextlib.closing(opened):
            return RemoteShard(url, size, opened.r.headers.get("ETag", ""), opened.r.status == 206 and size is not None)

    return servers.patiently(attempt, url, servers.OPENING_PATIENCE_S)


def find_shards(path: str, ending: str, split: str | None = None) -> tuple[list[Shard], str | None]:
    """Return the files of a split behind URLs, a file name, a glob or a folder, sorted; UserError if there are none.

    And what is still to be chosen from by other means; see `choose_folders`.
    """
    if is_url(path):
        files, split = files_of_splits(servers.find_urls(path), split, path)
        return at_once(describe, files), split
    problem = "the pattern matches no file"
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        root, problem = Path(glob.escape(path)), f"the folder holds no *{ending} file"
        files = glob.glob(str(root / f"*{ending}")) or glob.glob(str(root / "**" / f"*{ending}"), recursive=True)
    elif glob.has_magic(path):
        files = glob.glob(path, recursive=True)
    else:
        raise missing_path(path)
    if not files:
        raise data_error(path, f"{problem}: correct the path.")
    files, split = files_of_splits(sorted(files), split, path, path if os.path.isdir(path) else None)
    return [LocalShard(file) for file in files], split


def missing_path(path: str, remedy: str = "correct the path.") -> UserError:
    """Return the error for a path that does not exist, with the nearest name in the folder that does."""
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        return data_error(path, f"no such file or folder, nor the folder above it: {remedy}")
    hint = nearest(os.path.basename(os.path.normpath(path)), sorted(os.listdir(parent)))
    return data_error(path, f"no such file or folder: {remedy}{hint}")


def remembered(kind: str, shards: Sequence[Shard], look: Callable[[Shard], Any]) -> list[Any]:
    """Return `look` of each file, a JSON value of this `kind`, kept while size and mtime, or tag, stay as they are."""
    identities = at_once(lambda shard: shard.identity(), shards)
    caches = {folder: findings_file("files", kind, folder) for folder, *_ in identities}
    found = {folder: read_findings(file) for folder, file in caches.items()}
    facts = {folder: {} if data is None else json.loads(data.to_pybytes()) for folder, data in found.items()}
    unknown = [n for n, (folder, name, state, _) in enumerate(identities) if facts[folder].get(name, [0])[0] != state]
    ask = at_once if shards[0].is_remote else map
    for n, value in zip(unknown, ask(look, [shards[n] for n in unknown])):
        folder, name, state, _ = identities[n]
        facts[folder][name] = [state, value]
    values = [facts[folder][name][1] for folder, name, *_ in identities]
    for folder, name, _, is_settled in identities:
        if not is_settled:
            facts[folder].pop(name, None)
    for folder in {identities[n][0] for n in unknown}:
        write_findings(caches[folder], json.dumps(facts[folder]).encode())
    return values
