"""Tables of images by HF datasets: Parquet anywhere, a saved data set, and those that come with the package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, Value

from jit_accel.base.errors import UserError, lookup
from jit_accel.data.formats.columns import Columns, Labels, features_of, find_columns, label_kind, read_labels
from jit_accel.data.formats.index_cache import remembered
from jit_accel.data.formats.source import (
    Request,
    Source,
    check_embedded,
    find_shards,
    fingerprint_of,
    missing_path,
    names_and_sizes,
    no_rows,
    source_of,
    table_images,
)
from jit_accel.data.reading.parquet_rows import ParquetReader
from jit_accel.data.reading.shards import LocalShard, Shard, Span, at_hand, at_once
from jit_accel.data.reading.units import Stream

BUILTIN = Path(__file__).parents[1] / "builtin"
_ROWS_AT_ONCE = 64
_TAIL_BYTES = 2**16  # of a remote file, in which most footers end
Footer = tuple[pq.FileMetaData, pa.Schema]


def open_parquet(request: Request) -> Source:
    """Open Parquet files (a file, a glob, a folder, URLs), as a stream unless `streaming` is False.

    Raises:
        UserError: missing, not Parquet, wrong columns or labels, images stored as paths only.
    """
    return open_tables(request, "parquet", find_shards(request.path, ".parquet"))


def open_tables(request: Request, format: str, shards: Sequence[Shard], named: Features | None = None) -> Source:
    """Open these Parquet files; `named`: their columns, where more is known of them than the files say.

    Raises:
        UserError: see `open_parquet`.
    """
    footers = at_once(read_footer, shards)
    check_schemas(shards, footers)
    rows = sum(footer.num_rows for footer, _ in footers)
    if not rows:
        raise no_rows(request.path)
    schema = footers[0][1]
    features = features_of(schema) | {name: named[name] for name in named or () if name in schema.names}
    columns = find_columns(features, request.image_column, request.label_column, request.path)
    _check_unique(columns, schema, request.path)
    labels = _read_labels(shards, footers, columns, features, request.path)
    columns = columns.of_classes(labels)
    parts = ["hub", request.path] if format == "hub" else ["parquet"]
    identity = fingerprint_of([*parts, str(rows), *(() if format == "hub" else names_and_sizes(shards))])
    if request.streaming is False:
        features = Features({name: features[name] for name in columns.all})
        images = table_images(_load([str(getattr(s, "url", s)) for s in shards], features, request.path), columns)
    else:
        images = parquet_stream(shards, footers, columns, features)
    source = source_of(request.path, format, images, labels, identity)
    check_embedded(images, request.path)
    return source


def open_builtin(request: Request) -> Source:
    """Open a data set inside the package, in memory: no cache is written, no network is needed.

    Raises:
        UserError: unknown name, or streaming asked for.
    """
    file = LocalShard(lookup(_builtin_files(), request.path, "data_path"))
    request.refuse("streaming", reason="is small and held in memory")
    table = pq.read_table(file.path, use_threads=False)
    identity = fingerprint_of(["builtin", str(len(table)), *names_and_sizes([file])])
    return _open_table(request, "builtin", Dataset(table), identity)


def open_saved(request: Request) -> Source:
    """Open a folder written by `Dataset.save_to_disk` (of a `DatasetDict`: its split "train").

    Raises:
        UserError: not such a folder, no training split, wrong columns or labels.
    """
    if not os.path.isdir(request.path):
        raise missing_path(request.path)
    request.refuse("streaming", reason="was saved for random access")
    try:
        dataset = datasets.load_from_disk(request.path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"not a folder made by Dataset.save_to_disk: {error}", about="data_path", value=request.path
        ) from error
    if isinstance(dataset, DatasetDict):
        dataset = lookup(dataset, "train", "data_path", value=request.path, rule="has no split train")
    files = [LocalShard(file["filename"]) for file in dataset.cache_files]
    identity = fingerprint_of(["saved", str(len(dataset)), *names_and_sizes(files)])
    return _open_table(request, "saved", dataset, identity)


def open_downloaded(request: Request, dataset: Dataset) -> Source:
    """Open a table that HF datasets has downloaded from the Hub.

    Raises:
        UserError: wrong columns or labels.
    """
    return _open_table(request, "hub", dataset, fingerprint_of(["hub", request.path, str(len(dataset))]))


def _open_table(request: Request, format: str, dataset: Dataset, identity: str) -> Source:
    columns = find_columns(dataset.features, request.image_column, request.label_column, request.path)
    values = None if columns.label is None else dataset.unique(columns.label)
    labels = read_labels(dataset.features.get(columns.label), values, columns.label, request.path)
    images = table_images(dataset, columns.of_classes(labels))
    source = source_of(request.path, format, images, labels, identity)
    check_embedded(images, request.path)
    return source


def has_saved_dataset(folder: str) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def parquet_stream(
    shards: Sequence[Shard], footers: Sequence[Footer], columns: Columns, features: dict[str, Any]
) -> Stream:
    """Return the stream of the row groups of Parquet files."""
    wanted = {name: features[name] for name in columns.all}
    if isinstance(wanted[columns.image], Image):
        wanted[columns.image] = Image(decode=False)
    if columns.label is not None and pa.types.is_integer(footers[0][1].field(columns.label).type):
        wanted[columns.label] = Value("int64")  # HF copies the names of classes for each row group
    groups = [[footer.row_group(n) for n in range(footer.num_row_groups)] for footer, _ in footers]
    spans = None
    if all(shard.is_remote and shard.has_ranges for shard in shards):
        spans = [_spans(s, f, [g], columns.all) for s, (f, _), some in zip(shards, footers, groups) for g in some]
    return Stream(
        tuple(shards),
        ParquetReader(columns, Features(wanted)),
        columns,
        np.array([group.num_rows for of_file in groups for group in of_file], np.int64),
        np.array([len(of_file) for of_file in groups], np.int64),
        None if spans is None else np.array(spans, np.int64).reshape(-1, 2, 2),
    )


def read_footer(shard: Shard) -> Footer:
    """Return what the end of a Parquet file says: row groups, statistics, columns.

    Raises:
        UserError: it is none, or cannot be fetched.
    """
    where = shard.local() if not (shard.is_remote and shard.has_ranges) else None
    if where is None:
        tail = shard.read(max(0, shard.size - _TAIL_BYTES), shard.size)
        missing = int.from_bytes(tail[-8:-4], "little") + 8 - len(tail)
        if 0 < missing <= shard.size - len(tail):
            tail = shard.read(shard.size - len(tail) - missing, shard.size)
        where = pa.BufferReader(tail)
    try:
        with pq.ParquetFile(where) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"not a readable Parquet file ({error}): remove or replace it.", about="data_path", value=str(shard)
        ) from error


def _spans(
    shard: Shard, footer: pq.FileMetaData, groups: Iterable[pq.RowGroupMetaData], columns: list[str]
) -> list[Span]:
    """Return the bytes of a Parquet file that reading these columns of row groups needs, and its footer."""
    spans = []
    for group in groups:
        chunks = [group.column(n) for n in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in chunks]
        ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks)]
        spans.append((min(starts), max(ends)))
    return [*spans, (shard.size - footer.serialized_size - 8, shard.size)]


def check_schemas(shards: Sequence[Shard], footers: Sequence[Footer]) -> None:
    """Refuse files whose columns differ.

    Raises:
        UserError: naming the first.
    """
    first = footers[0][1]
    for shard, (_, schema) in zip(shards, footers):
        if schema.names != first.names:
            raise UserError(
                f"its columns ({', '.join(schema.names)}) differ from those of {shards[0]} "
                f"({', '.join(first.names)}): give a pattern that matches the files of one data set.",
                about="data_path",
                value=str(shard),
            )


def _check_unique(columns: Columns, schema: pa.Schema, where: str) -> None:
    twice = next((name for name in columns.all if schema.names.count(name) > 1), None)
    if twice is not None:
        rule = f"two columns are named {twice!r}: rename one, or choose others with --image_column and --label_column."
        raise UserError(rule, about="data_path", value=where)


def _read_labels(
    shards: Sequence[Shard], footers: Sequence[Footer], columns: Columns, features: dict[str, Any], where: str
) -> Labels:
    """Return what the labels mean, by the bounds in the footers, or by reading their column alone."""
    column = columns.label
    if column is None:
        return read_labels(None, None, None, where)
    values = None if label_kind(features[column]) == "text" else _bounds([footer for footer, _ in footers], column)
    if values is None:
        footer_of = dict(zip(shards, footers))
        found = remembered(
            f"parquet {column}", shards, lambda shard: _different_values(shard, column, footer_of[shard][0])
        )
        values = {value for of_file in found for value in of_file}
    return read_labels(features[column], values, column, where)


def _bounds(footers: Iterable[pq.FileMetaData], column: str) -> set | None:
    """Return the least and the largest value of a column, and None if some are missing; None if footers lack them."""
    found = set()
    for footer in footers:
        number = footer.schema.names.index(column) if column in footer.schema.names else None
        for group in map(footer.row_group, range(footer.num_row_groups)):
            if group.num_rows:
                statistics = None if number is None else group.column(number).statistics
                if statistics is None or not statistics.has_min_max:
                    return None
                found |= {statistics.min, statistics.max} | ({None} if statistics.null_count else set())
    return found


def _different_values(shard: Shard, column: str, footer: pq.FileMetaData) -> list:
    groups = filter(lambda group: group.num_rows, map(footer.row_group, range(footer.num_row_groups)))
    with at_hand(shard, _spans(shard, footer, groups, [column]) if shard.is_remote else ()) as path:
        return pc.unique(pq.read_table(path, columns=[column], use_threads=False)[0]).to_pylist()


def _load(addresses: list[str], features: Features, where: str) -> Dataset:
    try:
        return datasets.load_dataset(
            "parquet",
            data_files=addresses,
            split="train",
            columns=list(features),
            features=features,
            batch_size=_ROWS_AT_ONCE,  # else HF takes the number of rows of the first row group, which may be 0
        )
    except Exception as error:  # of many kinds
        reason = error.__cause__ or error
        rule = f"HF datasets cannot read these files ({type(reason).__name__}: {reason}): correct them."
        raise UserError(rule, about="data_path", value=where) from error


def _builtin_files() -> dict[str, str]:
    """Return `builtin:NAME` of each training split, `builtin:NAME_SPLIT` of each other one, and their files."""
    files = sorted(BUILTIN.glob("*/*.parquet"), key=lambda path: (path.parent.name, path.stem != "train", path.stem))
    names = [path.parent.name + ("" if path.stem == "train" else f"_{path.stem}") for path in files]
    return {f"builtin:{name}": str(path) for name, path in zip(names, files)}
