"""Tables of images by HF datasets: Parquet, a saved data set, and those that come with the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset

from jit_accel.base.errors import UserError, lookup
from jit_accel.data.formats.columns import ONE_CLASS, Columns, Labels, features_of, find_columns, read_labels
from jit_accel.data.formats.index_cache import remembered
from jit_accel.data.formats.source import (
    Request,
    Source,
    check_embedded,
    find_shards,
    fingerprint_of,
    make_source,
    missing_path,
    shard_names_and_sizes,
)

BUILTIN = Path(__file__).parents[1] / "builtin"
_ROWS_AT_ONCE = 64


def open_parquet(request: Request) -> Source:
    """Open Parquet files (a file, a glob, a folder), as a stream unless `streaming` is False.

    Raises:
        UserError: missing, not Parquet, wrong columns or labels, images stored as paths only.
    """
    files = find_shards(request.path, ".parquet")
    row_groups, schema = _check_files(files)
    rows = sum(map(sum, row_groups))
    if not rows:
        raise UserError("the data set has no rows: choose one with images.", about="data_path", value=request.path)
    columns, labels = _parquet_columns(files, schema, request)
    how = how_to_read(schema, columns, row_groups)
    dataset = _load(files, request, how)
    identity = fingerprint_of(["parquet", str(rows), *shard_names_and_sizes(files)])
    units = units_of(dataset, row_groups)
    how = {"files": tuple(files), **units} if "groups" in units else units
    return make_source(request.path, "parquet", dataset, columns, labels, rows, identity, **how)


def open_builtin(request: Request) -> Source:
    """Open a data set inside the package, in memory: no cache is written, no network is needed.

    Raises:
        UserError: unknown name, or streaming asked for.
    """
    file = lookup(_builtin_files(), request.path, "data_path")
    if request.streaming:
        raise UserError(
            f"{request.path} is small and held in memory: leave the flag out.", about="streaming", value="true"
        )
    row_groups, schema = _check_files([file])
    rows = sum(row_groups[0])
    columns, labels = _parquet_columns([file], schema, request)
    identity = fingerprint_of(["builtin", str(rows), *shard_names_and_sizes([file])])
    dataset = Dataset(pq.read_table(file, use_threads=False))
    return make_source(request.path, "builtin", dataset, columns, labels, rows, identity)


def open_saved(request: Request) -> Source:
    """Open a folder written by `Dataset.save_to_disk` (of a `DatasetDict`: its split "train").

    Raises:
        UserError: not such a folder, no training split, wrong columns or labels.
    """
    if not os.path.isdir(request.path):
        raise missing_path(request.path)
    if request.streaming:
        raise UserError(
            f"{request.path} was saved for random access: leave the flag out.", about="streaming", value="true"
        )
    try:
        dataset = datasets.load_from_disk(request.path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"not a folder made by Dataset.save_to_disk: {error}", about="data_path", value=request.path
        ) from error
    if isinstance(dataset, DatasetDict):
        dataset = lookup(dataset, "train", "data_path", value=request.path, rule="has no split train")
    shards = [file["filename"] for file in dataset.cache_files]
    identity = fingerprint_of(["saved", str(len(dataset)), *shard_names_and_sizes(shards)])
    return random_access(request, "saved", dataset, identity)


def how_to_read(schema: pa.Schema, columns: Columns, row_groups: list[list[int]] | None) -> dict:
    """The arguments that make HF datasets read these columns and no others, whatever is in the others.

    row_groups: their numbers of rows in each file, or None where they are not known.
    """
    features = features_of(schema)
    how = {"columns": columns.all, "features": Features({name: features[name] for name in columns.all})}
    # HF takes the number of rows of the first row group for the size of a batch
    may_be_empty = row_groups is None or any(0 in groups for groups in row_groups)
    return how | ({"batch_size": _ROWS_AT_ONCE} if may_be_empty else {})


def units_of(dataset, row_groups: list[list[int]]) -> dict:
    """The units of a stream of Parquet files (see `Stream`) with these numbers of rows in their row groups.

    Row groups where this version of HF datasets can split a stream by them, else the files.
    """
    if not isinstance(dataset, IterableDataset):
        return {}
    if hasattr(dataset, "reshard"):
        return {
            "groups": np.array([len(groups) for groups in row_groups]),
            "sizes": np.array([rows for groups in row_groups for rows in groups], np.int64),
        }
    return {"sizes": np.array([sum(groups) for groups in row_groups], np.int64)}


def has_saved_dataset(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def random_access(request: Request, format: str, dataset: Dataset, identity: str) -> Source:
    """The source of a table with random access.

    Raises:
        UserError: wrong columns or labels, images stored as paths only.
    """
    columns = find_columns(dataset.features, request.image_column, request.label_column, request.path)
    labels = ONE_CLASS
    if columns.label is not None:
        feature = dataset.features[columns.label]
        labels = read_labels(feature, dataset.unique(columns.label), columns.label, request.path)
    columns = with_ids(columns, labels)
    source = make_source(request.path, format, dataset, columns, labels, len(dataset), identity)
    check_embedded(source.images.dataset[0][columns.image], columns, request.path)
    return source


def with_ids(columns: Columns, labels: Labels) -> Columns:
    """`columns` that know the classes of text labels."""
    return Columns(columns.image, columns.label, columns.label_key, labels.ids)


def read_footer(file: str, opened: BinaryIO | None = None) -> tuple[pq.FileMetaData, pa.Schema]:
    """The footer of a Parquet file, that may be `opened` already.

    Raises:
        UserError: it is none.
    """
    try:
        with pq.ParquetFile(file if opened is None else opened) as parquet:
            return parquet.metadata, parquet.schema_arrow
    except (OSError, pa.ArrowException) as error:
        if opened is not None and not isinstance(error, pa.ArrowException):
            raise  # the network's
        raise UserError(
            f"not a readable Parquet file ({error}): remove or replace it.", about="data_path", value=file
        ) from error


def check_schemas(files: list[str], schemas: list[pa.Schema]) -> None:
    """Refuse files whose columns differ.

    Raises:
        UserError: naming the first.
    """
    first = schemas[0]
    for file, schema in zip(files, schemas):
        if schema.names != first.names:
            raise UserError(
                f"its columns ({', '.join(schema.names)}) differ from those of {files[0]} "
                f"({', '.join(first.names)}): give a pattern that matches the files of one data set.",
                about="data_path",
                value=file,
            )


def choose_columns(schema: pa.Schema, request: Request) -> tuple[Columns, dict]:
    """The columns of Parquet files that are read, and what `features_of` says of all.

    Raises:
        UserError: there are none such, or one of them is there twice.
    """
    features = features_of(schema)
    columns = find_columns(features, request.image_column, request.label_column, request.path)
    twice = next((name for name in columns.all if schema.names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"two columns are named {twice!r}: rename one, or choose others with --image_column and --label_column.",
            about="data_path",
            value=request.path,
        )
    return columns, features


def row_groups_of(footer: pq.FileMetaData) -> list[int]:
    """The rows of each row group."""
    return [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]


def _builtin_files() -> dict[str, str]:
    """`builtin:NAME` of each training split, `builtin:NAME_SPLIT` of each other one, and their files."""
    files = sorted(BUILTIN.glob("*/*.parquet"), key=lambda path: (path.parent.name, path.stem != "train", path.stem))
    names = [path.parent.name + ("" if path.stem == "train" else f"_{path.stem}") for path in files]
    return {f"builtin:{name}": str(path) for name, path in zip(names, files)}


def _check_files(files: list[str]) -> tuple[list[list[int]], pa.Schema]:
    """Read every footer: the numbers of rows of the row groups of each file, and the schema of the first."""
    footers = [read_footer(file) for file in files]
    check_schemas(files, [schema for _, schema in footers])
    return [row_groups_of(footer) for footer, _ in footers], footers[0][1]


def _parquet_columns(files: list[str], schema: pa.Schema, request: Request) -> tuple[Columns, Labels]:
    columns, features = choose_columns(schema, request)
    first = next(_first_rows(files, columns.image), None)
    check_embedded(first, columns, request.path)
    if columns.label is None:
        return columns, ONE_CLASS
    found = remembered(f"parquet {columns.label}", files, lambda file: _different_values(file, columns.label))
    values = {value for values in found for value in values}
    labels = read_labels(features[columns.label], values, columns.label, request.path)
    return with_ids(columns, labels), labels


def _load(files: list[str], request: Request, how: dict) -> Dataset | IterableDataset:
    streaming = request.streaming is not False
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming, **how)
    except Exception as error:  # of many kinds
        reason = error.__cause__ or error
        raise UserError(
            f"HF datasets cannot read these files ({type(reason).__name__}: {reason}): correct them.",
            about="data_path",
            value=request.path,
        ) from error


def _different_values(file: str, column: str) -> list:
    return pc.unique(pq.read_table(file, columns=[column], use_threads=False)[0]).to_pylist()


def _first_rows(files: list[str], column: str):
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1, columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
