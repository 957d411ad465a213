"""Parquet and tar files behind URLs: what is asked of the servers before a training begins."""

from __future__ import annotations

import itertools
import json
import logging
import posixpath
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jit_accel.base.errors import UserError
from jit_accel.data.formats.columns import ONE_CLASS, label_kind, read_labels
from jit_accel.data.formats.source import Request, Source, check_embedded, fingerprint_of, make_source
from jit_accel.data.formats.tables import (
    check_schemas,
    choose_columns,
    how_to_read,
    random_access,
    read_footer,
    row_groups_of,
    units_of,
    with_ids,
)
from jit_accel.data.formats.tar_samples import label_in
from jit_accel.data.formats.tars import columns_of, first_sample
from jit_accel.data.reading import http_files
from jit_accel.data.reading.outages import OPENING_PATIENCE_S, patiently, without_secrets

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_FILES = 100_000
_AT_ONCE = 16  # requests
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_url(path: str) -> bool:
    """Whether `--data_path` names files on a server."""
    return bool(_URL.match(path))


def ending_of(url: str) -> str:
    """`.tar` of `https://host/a-{000..009}.tar?key=value`, in lower case."""
    return posixpath.splitext(urlsplit(url).path)[1].lower()


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}-{x,y}` becomes a-08-x, a-08-y, a-09-x, ...: in the order of a shell.

    Raises:
        UserError: braces that are no list or range, or too many files.
    """
    pieces = _BRACES.split(pattern)  # text, braces, text, ..., text
    choices = [[piece] if n % 2 == 0 else _alternatives(piece, pattern) for n, piece in enumerate(pieces)]
    if np.prod([len(some) for some in choices], dtype=float) > MOST_FILES:
        raise UserError(
            f"these are more than {MOST_FILES:,} files: write larger shards.", about="data_path", value=pattern
        )
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    ends = _RANGE.fullmatch(inside)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if 0 <= last - first < MOST_FILES:
            return [f"{n:0{len(ends[1])}d}" for n in range(first, last + 1)]
    elif "," in inside:
        return inside.split(",")
    raise UserError(
        f"{{{inside}}} is no range and no list of names: write {{000..009}} or {{a,b}}.",
        about="data_path",
        value=pattern,
    )


def open_remote_parquet(request: Request) -> Source:
    """Open Parquet files at URLs; `--streaming false` downloads them to the cache of HF datasets.

    Raises:
        UserError: unreachable, missing, not Parquet, wrong columns or labels, images stored as paths only.
    """
    urls, infos = _find(request.path)
    ranges = all(info.get("partial", True) for info in infos)
    if not ranges:
        log.warning(
            "--data_path %s: the server does not obey Range, without which Parquet files are downloaded whole, one at "
            "a time for each lane, to temporary files; tar files are read as they come",
            without_secrets(request.path),
        )
    footers = _all(lambda url: _with_file(url, read_footer), urls if ranges else urls[:1])
    check_schemas(urls, [schema for _, schema in footers])
    row_groups = [row_groups_of(footer) for footer, _ in footers]
    rows = sum(map(sum, row_groups)) if ranges else None
    identity = fingerprint_of(["parquet", str(rows), *_names_and_sizes(urls, infos)])
    schema = footers[0][1]
    columns, features = choose_columns(schema, request)
    filled = next((url for url, groups in zip(urls, row_groups) if any(groups)), urls[0])
    check_embedded(_with_file(filled, lambda _, file: _first_value(file, columns.image)), columns, request.path)
    how = how_to_read(schema, columns, row_groups if ranges else None)
    if request.streaming is False:
        dataset = _load("parquet", urls, request, streaming=False, **how)
        return random_access(request, "parquet", dataset, identity)
    labels = ONE_CLASS
    if columns.label is not None:
        feature = features[columns.label]
        values = _labels(urls, footers, columns.label, feature) if ranges else None
        labels = read_labels(feature, values, columns.label, request.path)
    columns = with_ids(columns, labels)
    dataset = _load("parquet", urls, request, streaming=True, **how)
    units = units_of(dataset, row_groups) if ranges else {}
    how = {"is_remote": True, "urls": tuple(urls), **units}
    return make_source(request.path, "parquet", dataset, columns, labels, rows, identity, **how)


def open_remote_webdataset(request: Request) -> Source:
    """Open tar files at URLs. How many images they hold is known where an index lies beside them (see `_index`).

    Raises:
        UserError: unreachable, missing, not tar files, no images in them, random access asked for.
    """
    if request.streaming is False:
        raise UserError(
            f"{without_secrets(request.path)} is read as a stream: leave the flag out, or download the files and give "
            "their folder.",
            about="streaming",
            value="false",
        )
    urls, infos = _find(request.path)
    sample = _with_file(urls[0], first_sample, block_size=0)
    columns = columns_of(sample, request)
    labels = ONE_CLASS
    if columns.label is not None:
        value = label_in(sample[columns.label], columns, urls[0])
        feature = datasets.Value("int64" if isinstance(value, int) else "string")
        labels = read_labels(feature, None, columns.label_key or columns.label, request.path)
    sizes = _index(urls)
    num_images = None if sizes is None else int(sizes.sum())
    dataset = _load("webdataset", urls, request, streaming=True)
    identity = fingerprint_of(["webdataset", str(num_images), *_names_and_sizes(urls, infos)])
    how = {"is_remote": True, "urls": tuple(urls), "sizes": sizes}
    return make_source(request.path, "webdataset", dataset, columns, labels, num_images, identity, **how)


def footers_of(urls: list[str]) -> list[tuple[pq.FileMetaData, pa.Schema]]:
    """The footers of remote Parquet files, sixteen at a time.

    Raises:
        UserError: one cannot be read.
    """
    http_files.install()
    return _all(lambda url: _with_file(url, read_footer), urls)


def _find(path: str) -> tuple[list[str], list[dict]]:
    """The URLs that `--data_path` means and what their servers tell about them."""
    http_files.install()
    urls = [url for pattern in expand_braces(path) for url in _matches(pattern)]
    return urls, _all(_info, urls)


def _matches(pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    protocol = pattern.partition("://")[0].lower()
    if protocol in ("http", "https"):
        raise UserError(
            "web servers do not list their files: name them by braces, as in shard-{000..009}.tar.",
            about="data_path",
            value=pattern,
        )
    files, inside = _file_system(pattern)
    found = patiently(lambda: sorted(files.glob(inside)), pattern, OPENING_PATIENCE_S)
    if not found:
        raise UserError("the pattern matches no file: correct the path.", about="data_path", value=pattern)
    return [files.unstrip_protocol(file) for file in found]


def _file_system(url: str, **options) -> tuple[Any, str]:
    protocol = url.partition("://")[0].lower()
    try:
        if protocol in ("http", "https"):
            options["client_kwargs"] = {"trust_env": True}  # the proxies in environment variables, as HF does
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{error}.", about="data_path", value=url) from error
    except ValueError as error:
        raise UserError(
            f"{protocol}:// is unknown ({error}): https://, s3://, gs:// and hf:// are among those that can be read.",
            about="data_path",
            value=url,
        ) from error


def _info(url: str) -> dict:
    files, inside = _file_system(url)
    return patiently(lambda: files.info(inside), url, OPENING_PATIENCE_S)


def _with_file(url: str, use: Callable[[str, Any], T], **options) -> T:
    """`use(url, opened)`, repeated while the network fails."""
    files, inside = _file_system(url, **options)

    def attempt() -> T:
        with files.open(inside, "rb") as opened:
            return use(without_secrets(url), opened)

    return patiently(attempt, url)


def _all(ask: Callable[[str], T], urls: list[str]) -> list[T]:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        answers = [threads.submit(ask, url) for url in urls]
        try:
            return [answer.result() for answer in answers]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # the first error says enough
            raise


def _load(kind: str, urls: list[str], request: Request, **how):
    try:
        return patiently(lambda: datasets.load_dataset(kind, data_files=urls, split="train", **how), urls[0])
    except UserError:
        raise
    except Exception as error:  # of many kinds
        raise UserError(
            f"HF datasets cannot read these files ({type(error).__name__}: {error}): correct them.",
            about="data_path",
            value=without_secrets(request.path),
        ) from error


def _names_and_sizes(urls: list[str], infos: list[dict]) -> list[str]:
    """As `shard_names_and_sizes`, so that data keeps its fingerprint when it moves to a server."""
    return [f"{_name(url)}:{info.get('size')}" for url, info in zip(urls, infos)]


def _name(url: str) -> str:
    return posixpath.basename(unquote(urlsplit(url).path))


def _labels(urls: list[str], footers: list, column: str, feature: Any) -> set | None:
    """All different text labels, or the bounds of others, which are enough and in the footers."""
    if label_kind(feature) == "text":
        return _values(urls, column)
    return _bounds([footer for footer, _ in footers], column)


def _first_value(file, column: str):
    with pq.ParquetFile(file, buffer_size=2**16, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(batch_size=1, columns=[column], use_threads=False):
            for value in batch.column(0).to_pylist():
                return value
    return None


def _values(urls: list[str], column: str) -> set:
    """All different values of a column, of which nothing else is downloaded."""

    def values(_, file) -> list:
        return pc.unique(pq.ParquetFile(file).read([column], use_threads=False)[0]).to_pylist()

    return set().union(*_all(lambda url: _with_file(url, values), urls))


def _bounds(footers: Iterable[pq.FileMetaData], column: str) -> set | None:
    """The least and the largest value of a column, and None if some are missing; or None where footers do not tell."""
    found = set()
    for footer in footers:
        number = footer.schema.names.index(column) if column in footer.schema.names else None
        for group in np.flatnonzero(row_groups_of(footer)).tolist():
            statistics = None if number is None else footer.row_group(group).column(number).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            found |= {statistics.min, statistics.max} | ({None} if statistics.null_count else set())
    return found


def _index(urls: list[str]) -> np.ndarray | None:
    """The images of each tar file, int64 (files,), as a file beside them tells, or None where there is none.

    `sizes.json` maps file names to numbers; `index.json` of wids is {"shardlist": [{"url": ..., "nsamples": ...}]}.
    """
    folders = {url.partition("?")[0].rpartition("/")[0] for url in urls}
    if len(folders) > 1:
        return None
    folder, query = folders.pop(), urls[0].partition("?")[2]
    for name in ("sizes.json", "index.json"):
        counts = _counts(f"{folder}/{name}" + ("?" + query if query else ""))
        if counts is None:
            continue
        missing = next((url for url in urls if not isinstance(counts.get(_name(url)), int)), None)
        if missing is None:
            return np.array([counts[_name(url)] for url in urls], np.int64)
        log.warning("%s/%s does not tell how many images %s has: it is not used", folder, name, _name(missing))
    return None


def _counts(url: str) -> dict[str, int] | None:
    files, inside = _file_system(url)
    try:
        text = patiently(lambda: files.cat_file(inside), url, OPENING_PATIENCE_S)
        entries = json.loads(text)
    except (UserError, ValueError):  # there is none, or it is another's
        return None
    if isinstance(entries, dict) and isinstance(entries.get("shardlist"), list):
        shards = [shard for shard in entries["shardlist"] if isinstance(shard, dict)]
        return {_name(str(shard.get("url"))): shard.get("nsamples") for shard in shards}
    return entries if isinstance(entries, dict) else None
