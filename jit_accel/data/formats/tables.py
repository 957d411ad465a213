"""Tables of images by HF datasets: Parquet anywhere, a saved data set, and those that come with the package."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets

from jit_accel.base.errors import UserError, lookup
from jit_accel.data import data_error
from jit_accel.data.formats.array_columns import with_arrays
from jit_accel.data.formats.columns import (
    MAX_CLASSES,
    Columns,
    features_of,
    find_columns,
    label_kind,
    read_labels,
)
from jit_accel.data.formats.label_lists import different_labels, item_of, of_items
from jit_accel.data.formats.numbers import Tally, Vectors, tally_of, vectors_of_tallies
from jit_accel.data.formats.source import Request, Source, fingerprint_of, source_of, table_images
from jit_accel.data.formats.split_columns import choose_values, counts_of, split_column
from jit_accel.data.reading.arrays import is_nested
from jit_accel.data.reading.images import ParquetReader, Stream
from jit_accel.data.reading.servers import at_once
from jit_accel.data.reading.shards import LocalShard, Shard, Span, at_hand, find_shards, missing_path, remembered
from jit_accel.data.reading.splits import ALL, TRAIN, canonical, choose_splits

BUILTIN = Path(__file__).parents[1] / "builtin"
_ROWS_AT_ONCE = 64
_TAIL_BYTES = 2**16  # of a remote file, in which most footers end


class TableFile(NamedTuple):
    """A Parquet file, and what its end says: row groups, statistics, columns."""

    shard: Shard
    footer: pq.FileMetaData
    schema: pa.Schema

    @property
    def groups(self) -> list[pq.RowGroupMetaData]:
        return [self.footer.row_group(number) for number in range(self.footer.num_row_groups)]

    def spans(self, groups: Iterable[pq.RowGroupMetaData], columns: list[str]) -> list[Span]:
        """Return the bytes that reading these columns of row groups needs, and those of the end."""
        spans = []
        for group in groups:
            chunks = [group.column(n) for n in range(group.num_columns)]
            chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
            starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in chunks]
            ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks)]
            spans.append((min(starts), max(ends)))
        return [*spans, (self.shard.size - self.footer.serialized_size - 8, self.shard.size)]


def open_tables(
    request: Request,
    format: str = "parquet",
    shards: Sequence[Shard] = (),
    named: Features | None = None,
    split: str | None = ALL,
) -> Source:
    """Open Parquet files (a file, a glob, a folder, URLs; or `shards`), as a stream unless `streaming` is False.

    `split`: of the rows of `shards`; `named`: their columns, where more is known of them than the files say. UserError
    if they are not Parquet, have wrong columns or labels, or store images as paths only.
    """
    if not shards:
        shards, split = find_shards(request.path, ".parquet", request.split)
    files = at_once(open_file, shards)
    schema = files[0].schema
    for file in files:
        if file.schema.names != schema.names:
            here, there = (", ".join(names) for names in (file.schema.names, schema.names))
            rule = f"its columns ({here}) differ from those of {shards[0]} ({there}): give a pattern that matches the "
            raise data_error(file.shard, rule + "files of one data set.")
    features = features_of(schema) | {name: named[name] for name in named or () if name in schema.names}
    columns = _find_columns(features, request)
    twice = next((name for name in columns.all if schema.names.count(name) > 1), None)
    if twice is not None:
        rule = f"two columns are named {twice!r}: rename one, or choose others with --image_column and --label_column."
        raise data_error(request.path, rule)
    columns, sizes = _of_splits(files, features, columns, split, request.path)
    columns, vectors = _with_numbers(files, columns, request.path)
    values = _values_of_labels(files, columns, features.get(columns.label), request.renumber_labels)
    columns, feature, values = of_items(columns, features.get(columns.label), values)
    columns, names = read_labels(feature, values, columns, request.path, request.label_column, request.renumber_labels)
    rows = int(sizes.sum())
    head, sized = (["hub", request.path], ()) if format == "hub" else (["parquet"], shards)
    of_column = ["split", *sorted(map(str, columns.split[1]))] if columns.split else []
    identity = fingerprint_of([*head, str(rows), *request.other_split, *of_column], sized)
    if request.streaming is False and rows:  # HF refuses to load none
        features = Features({name: features[name] for name in columns.all})
        table = _load([str(getattr(s, "url", s)) for s in shards], features, request.path)
        images = table_images(*_rows_of_splits(table, columns))
    else:
        images = parquet_stream(files, columns, features, sizes)
    return _check_embedded(source_of(request.path, format, images, names, identity, vectors=vectors))


def open_builtin(request: Request) -> Source:
    """Open a data set inside the package, in memory: `builtin:NAME`, or `builtin:NAME_SPLIT` of a split but train."""
    paths = sorted(BUILTIN.glob("*/*.parquet"), key=lambda path: (path.parent.name, path.stem != "train", path.stem))
    names = (path.parent.name + ("" if path.stem == "train" else f"_{path.stem}") for path in paths)
    files = {f"builtin:{name}": str(path) for name, path in zip(names, paths)}
    split = canonical(request.split)
    name = request.path if split == TRAIN else f"{request.path}_{split}"
    file = LocalShard(lookup(files, name, "data_path"))
    request.refuse("streaming", reason="is small and held in memory")
    table = pq.read_table(file.path, use_threads=False)
    identity = fingerprint_of(["builtin", str(len(table))], [file])
    return open_table(request, "builtin", Dataset(table), identity)


def open_saved(request: Request) -> Source:
    """Open a folder written by `Dataset.save_to_disk`."""
    if not os.path.isdir(request.path):
        raise missing_path(request.path)
    request.refuse("streaming", reason="was saved for random access")
    try:
        dataset = datasets.load_from_disk(request.path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise data_error(request.path, f"not a folder made by Dataset.save_to_disk: {error}") from error
    dataset, split = split_of(dataset, request)
    files = [LocalShard(file["filename"]) for file in dataset.cache_files]
    identity = fingerprint_of(["saved", str(len(dataset)), *request.other_split], files)
    return open_table(request, "saved", dataset, identity, split)


def split_of(dataset: Dataset | DatasetDict, request: Request) -> tuple[Dataset, str | None]:
    """Return the table of the chosen splits, one after the other, and what is still to be chosen from by a column.

    UserError if there is no such split.
    """
    if isinstance(dataset, Dataset):
        return dataset, request.split
    if dataset.keys() == {TRAIN}:
        return dataset[TRAIN], request.split
    chosen = choose_splits({name: len(part) for name, part in dataset.items()}, request.split, request.path)
    parts = [dataset[name] for name in chosen]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts), ALL


def open_table(request: Request, format: str, dataset: Dataset, identity: str, split: str | None = ALL) -> Source:
    """Open a table for random access, and of it the rows of a `split`; UserError for wrong columns or labels."""
    columns = _find_columns(dataset.features, request)
    name = split_column(dataset.features)
    counts = counts_of(dataset.with_format("arrow")[name][:]) if name not in (None, *columns.all) else {}
    if (values := choose_values(counts or {None: len(dataset)}, split, request.path)) is not None:
        columns, identity = replace(columns, split=(name, values)), fingerprint_of([identity, *map(str, values)])
        dataset, columns = _rows_of_splits(dataset, columns)
    feature, asked, values = dataset.features.get(columns.label), request.label_column, []
    if item_of(feature) is not feature:
        values = different_labels(dataset.with_format("arrow")[columns.label][:])
    elif columns.label is not None:
        values = dataset.unique(columns.label)
    columns, feature, values = of_items(columns, feature, [values])
    columns, names = read_labels(feature, values, columns, request.path, asked, request.renumber_labels)
    tallies = [[tally_of(dataset.with_format("arrow")[name][:]) for name in columns.vectors]]
    if vectors := vectors_of_tallies(columns.vectors, tallies, request.path):
        columns = replace(columns, vector_sizes=vectors.sizes)
    images = table_images(dataset, columns)
    return _check_embedded(source_of(request.path, format, images, names, identity, vectors=vectors))


def _find_columns(features: Mapping[str, Any], request: Request) -> Columns:
    request.refuse("condition_path", reason="is a table, whose conditions --condition_column names")
    how = request.image_column, request.label_column, request.path, request.condition_column
    return with_arrays(find_columns(features, *how, request.vector_column), features, request)


def _check_embedded(source: Source) -> Source:
    """Return a table; UserError if its first image is the path of a missing file, or nothing like an image."""
    images, columns = source.images, source.images.columns
    row = next(images.rows(int(images.sizes.argmax())), {}) if isinstance(images, Stream) else images.dataset[0]
    data, path = columns.image_of(row.get(columns.image))
    # One bad image is not a bad table
    if isinstance(data, (bytes, memoryview)) or (data is None and not path) or is_nested(data):
        return source
    if not isinstance(data, str):
        rule = f"it holds values like {str(data)[:40]} in {source.name}, which are no encoded images (the bytes of a "
        rule += "JPEG, PNG, ... file): choose another column."
        raise UserError(rule, about="image_column", value=columns.image)
    if not os.path.isfile(data):
        rule = (
            f"the column {columns.image!r} holds only paths of images ({data[:80]!r}), not the images, and there is no "
            "such file here: give the folder of the images as --data_path, or write the table again with the bytes "
            "embedded ({'bytes': open(path, 'rb').read(), 'path': path} in each row)."
        )
        raise data_error(source.name, rule)
    return source


def parquet_stream(
    files: Sequence[TableFile], columns: Columns, features: dict[str, Any], sizes: np.ndarray | None = None
) -> Stream:
    """Return the stream of the row groups of Parquet files, of which so many rows are read (None: all)."""
    wanted = {name: features[name] for name in columns.all}
    wanted |= {name: Image(decode=False) for name in columns.pictures if isinstance(wanted[name], Image)}
    if columns.label is not None and pa.types.is_integer(files[0].schema.field(columns.label).type):
        wanted[columns.label] = Value("int64")  # HF copies the names of classes for each row group
    groups = [(number, group) for number, file in enumerate(files) for group in file.groups]
    spans = None
    if all(file.shard.is_remote and file.shard.has_ranges for file in files):
        found = [files[number].spans([group], columns.all) for number, group in groups]
        spans = np.array(found, np.int64).reshape(-1, 2, 2)
    return Stream(
        tuple(file.shard for file in files),
        ParquetReader(columns, Features(wanted)),
        columns,
        np.array([group.num_rows for _, group in groups], np.int64) if sizes is None else sizes,
        np.array([number for number, _ in groups], np.int64),
        spans,
    )


def open_file(shard: Shard) -> TableFile:
    """Read the end of a Parquet file; UserError if it is none, or cannot be fetched."""
    if shard.is_remote and shard.has_ranges:
        tail = shard.read(max(0, shard.size - _TAIL_BYTES), shard.size)
        missing = int.from_bytes(tail[-8:-4], "little") + 8 - len(tail)
        if 0 < missing <= shard.size - len(tail):
            tail = shard.read(shard.size - len(tail) - missing, shard.size)
        where = pa.BufferReader(tail)
    else:
        where = shard.local()
    try:
        with pq.ParquetFile(where) as parquet:
            return TableFile(shard, parquet.metadata, parquet.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise data_error(shard, f"not a readable Parquet file ({error}): remove or replace it.") from error


def _of_splits(
    files: Sequence[TableFile], features: dict[str, Any], columns: Columns, wanted: str | None, where: str
) -> tuple[Columns, np.ndarray]:
    """Return the columns with the one that chooses rows of the splits that `wanted` means, and so many of each group.

    The rows of each value are counted by reading that column alone.
    """
    name, sizes = split_column(features), [[group.num_rows for group in file.groups] for file in files]
    if name in (None, *columns.all):
        choose_splits({TRAIN: sum(map(sum, sizes))}, wanted, where)
        return columns, np.array(list(itertools.chain(*sizes)), np.int64)
    file_of = {file.shard: file for file in files}
    counts = remembered(f"parquet splits {name}", list(file_of), lambda shard: _counts(shard, name, file_of[shard]))
    total: Counter = Counter()
    for value, count in itertools.chain(*itertools.chain(*counts)):
        total[value] += count
    total = total if sum(total.values()) == sum(map(sum, sizes)) else {None: sum(map(sum, sizes))}
    values = choose_values(total, wanted, where)
    if values is not None:
        columns = replace(columns, split=(name, values))
        sizes = [[sum(n for value, n in group if value in values) for group in of_file] for of_file in counts]
    return columns, np.array(list(itertools.chain(*sizes)), np.int64)


def _counts(shard: Shard, column: str, file: TableFile) -> list[list]:
    """Return of each row group the different values of a column, each with the number of its rows."""
    spans = file.spans((group for group in file.groups if group.num_rows), [column]) if shard.is_remote else ()
    with at_hand(shard, spans) as path, pq.ParquetFile(path) as parquet:
        groups = (parquet.read_row_group(n, columns=[column], use_threads=False)[0] for n in range(len(file.groups)))
        return [list(counts_of(group).items()) for group in groups]


def _rows_of_splits(dataset: Dataset, columns: Columns) -> tuple[Dataset, Columns]:
    """Return the rows that the columns choose, and the columns without that choice."""
    if columns.split is None:
        return dataset, columns
    table = pa.table({columns.split[0]: dataset.with_format("arrow")[columns.split[0]][:], "row": range(len(dataset))})
    return dataset.select(columns.chosen(table)["row"].to_numpy()), replace(columns, split=None)


def _values_of_labels(files: Sequence[TableFile], columns: Columns, feature: Any, are_all: bool) -> list[list]:
    """Return the `different_labels` of parts by reading their column alone; of remote numbers those within the bounds
    of footers unless `are_all` are wanted.
    """
    column, file_of = columns.label, {file.shard: file for file in files}
    if column is None:
        return []
    if files[0].shard.is_remote and not are_all and label_kind(feature) in ("class", "int"):
        values = _bounds(files, column)
        if values is not None:
            numbers = [value for value in values if isinstance(value, int)] or [0]
            return [[*values], range(min(numbers), min(max(numbers), MAX_CLASSES))]

    def look(shard: Shard) -> list:
        return different_labels(_read_columns(shard, columns, file_of[shard], [column])[column])

    kind = " ".join(["parquet", column, *map(str, columns.split[1] if columns.split else ())])
    return remembered(kind, list(file_of), look)


def _bounds(files: Iterable[TableFile], column: str) -> set | None:
    """Return the least and the largest value of a column, and None if some are missing; None if footers lack them."""
    found = set()
    for file in files:
        for group in file.groups:
            if group.num_rows:
                paths = [group.column(n).path_in_schema for n in range(group.num_columns)]
                statistics = group.column(paths.index(column)).statistics if column in paths else None
                if statistics is None or not statistics.has_min_max:
                    return None
                found |= {statistics.min, statistics.max} | ({None} if statistics.null_count else set())
    return found


def _with_numbers(files: Sequence[TableFile], columns: Columns, where: str) -> tuple[Columns, Vectors | None]:
    """Return the columns with how many numbers each has, and the numbers' statistics, by reading theirs alone."""
    file_of = {file.shard: file for file in files}

    def look(shard: Shard) -> list[Tally]:
        table = _read_columns(shard, columns, file_of[shard], columns.vectors)
        return [tally_of(table[name]) for name in columns.vectors]

    if not columns.vectors:
        return columns, None
    kind = f"parquet numbers {columns.vectors} {columns.split and columns.split[1]}"
    vectors = vectors_of_tallies(columns.vectors, remembered(kind, list(file_of), look), where)
    return replace(columns, vector_sizes=vectors.sizes), vectors


def _read_columns(shard: Shard, columns: Columns, file: TableFile, names: Iterable[str]) -> pa.Table:
    """Return these columns of a file, of the rows that are read."""
    wanted = list(dict.fromkeys([*names, *([columns.split[0]] if columns.split else [])]))
    spans = file.spans((group for group in file.groups if group.num_rows), wanted) if shard.is_remote else ()
    with at_hand(shard, spans) as path:
        return columns.chosen(pq.read_table(path, columns=wanted, use_threads=False))


def _load(addresses: list[str], features: Features, where: str) -> Dataset:
    try:
        how = {"data_files": addresses, "columns": list(features), "features": features}
        # Without a batch size HF takes the number of rows of the first row group, which may be 0.
        return datasets.load_dataset("parquet", split="train", batch_size=_ROWS_AT_ONCE, **how)
    except Exception as error:  # of many kinds
        reason = error.__cause__ or error
        rule = f"HF datasets cannot read these files ({type(reason).__name__}: {reason}): correct them."
        raise data_error(where, rule) from error
