"""Tables of images by HF datasets: Parquet, a saved data set, the Hub, and those that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset

from jit_accel.data.columns import ONE_CLASS, Columns, Labels, find_columns, read_labels
from jit_accel.data.index_cache import remembered
from jit_accel.data.source import (
    Request,
    Source,
    check_embedded,
    find_shards,
    fingerprint_of,
    make_source,
    missing_path,
    shard_names_and_sizes,
)
from jit_accel.errors import UserError, lookup

BUILTIN = Path(__file__).parent / "builtin"


def open_parquet(request: Request) -> Source:
    """Open Parquet files (a file, a glob, a folder), as a stream unless `streaming` is False.

    Raises:
        UserError: missing, not Parquet, wrong columns or labels, images stored as paths only.
    """
    files = find_shards(request.path, ".parquet")
    row_groups, schema = _check_files(files)
    rows = sum(map(sum, row_groups))
    columns, labels = _parquet_columns(files, schema, request)
    wanted = [columns.image] + [columns.label] * (columns.label is not None)
    dataset = datasets.load_dataset(
        "parquet", data_files=files, split="train", columns=wanted, streaming=request.streaming is not False
    )
    identity = fingerprint_of(["parquet", str(rows), *shard_names_and_sizes(files)])
    return make_source(
        request.path, "parquet", dataset, columns, labels, rows, identity, **units_of(dataset, row_groups)
    )


def open_builtin(request: Request) -> Source:
    """Open a data set inside the package, in memory: no cache is written, no network is needed.

    Raises:
        UserError: unknown name, or streaming asked for.
    """
    choices = {f"builtin:{path.parent.name}": str(path) for path in sorted(BUILTIN.glob("*/train.parquet"))}
    file = lookup(choices, request.path, "--data_path")
    if request.streaming:
        raise UserError(f"--streaming true: {request.path} is small and held in memory: leave the flag out.")
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
        raise UserError(f"--streaming true: {request.path} was saved for random access: leave the flag out.")
    try:
        dataset = datasets.load_from_disk(request.path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"--data_path {request.path}: not a folder made by Dataset.save_to_disk: {error}") from error
    if isinstance(dataset, DatasetDict):
        dataset = lookup(dataset, "train", f"--data_path {request.path}: split")
    shards = [file["filename"] for file in dataset.cache_files]
    identity = fingerprint_of(["saved", str(len(dataset)), *shard_names_and_sizes(shards)])
    return _random_access(request, "saved", dataset, identity)


def open_hub(request: Request) -> Source:
    """Open the split "train" of a data set on the Hub, as a stream unless `streaming` is False.

    Raises:
        UserError: it does not exist or cannot be reached; wrong columns or labels.
    """
    streaming = request.streaming is not False
    try:
        dataset = datasets.load_dataset(request.path, split="train", streaming=streaming)
    except Exception as error:  # the Hub's client raises errors of five libraries
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"--data_path {request.path}: there is no such file or folder here, and the Hub's data set of that name "
            f"cannot be opened ({type(error).__name__}: {reason}): check the name, its split 'train', the network, "
            "and for private data sets `hf auth login`."
        ) from error
    if not streaming:
        return _random_access(request, "hub", dataset, fingerprint_of(["hub", request.path, str(len(dataset))]))
    if dataset.features is None:
        raise UserError(
            f"--data_path {request.path}: its columns are not known before it was read: use --streaming false."
        )
    columns = find_columns(dataset.features, request.image_column, request.label_column, request.path)
    labels = ONE_CLASS
    if columns.label is not None:
        labels = read_labels(dataset.features[columns.label], None, columns.label, request.path)
    split = (dataset.info.splits or {}).get("train")
    rows = split.num_examples if split else None
    identity = fingerprint_of(["hub", request.path, str(rows)])
    source = make_source(request.path, "hub", dataset, columns, labels, rows, identity, is_remote=True)
    first = next(source.images.rows(0), None)
    check_embedded(first and first[columns.image], columns, request.path)
    return source


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


def _random_access(request: Request, format: str, dataset: Dataset, identity: str) -> Source:
    columns = find_columns(dataset.features, request.image_column, request.label_column, request.path)
    labels = ONE_CLASS
    if columns.label is not None:
        feature = dataset.features[columns.label]
        labels = read_labels(feature, dataset.unique(columns.label), columns.label, request.path)
    columns = _with_ids(columns, labels)
    source = make_source(request.path, format, dataset, columns, labels, len(dataset), identity)
    check_embedded(source.images.dataset[0][columns.image], columns, request.path)
    return source


def _with_ids(columns: Columns, labels: Labels) -> Columns:
    return Columns(columns.image, columns.label, columns.label_key, labels.ids)


def _check_files(files: list[str]) -> tuple[list[list[int]], pa.Schema]:
    """Read every footer: the numbers of rows of the row groups of each file, and the schema of the first."""
    row_groups, first = [], None
    for file in files:
        try:
            footer = pq.read_metadata(file)
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"--data_path {file}: not a readable Parquet file ({error}): remove or replace it."
            ) from error
        first = first or schema
        if schema.names != first.names:
            raise UserError(
                f"--data_path {file}: its columns ({', '.join(schema.names)}) differ from those of {files[0]} "
                f"({', '.join(first.names)}): give a pattern that matches the files of one data set."
            )
        row_groups.append([footer.row_group(n).num_rows for n in range(footer.num_row_groups)])
    return row_groups, first


def _parquet_columns(files: list[str], schema: pa.Schema, request: Request) -> tuple[Columns, Labels]:
    features = Features.from_arrow_schema(schema)
    columns = find_columns(features, request.image_column, request.label_column, request.path)
    first = next(_first_rows(files, columns.image), None)
    check_embedded(first, columns, request.path)
    if columns.label is None:
        return columns, ONE_CLASS
    found = remembered(f"parquet {columns.label}", files, lambda file: _different_values(file, columns.label))
    values = {value for values in found for value in values}
    labels = read_labels(features[columns.label], values, columns.label, request.path)
    return _with_ids(columns, labels), labels


def _different_values(file: str, column: str) -> list:
    return pc.unique(pq.read_table(file, columns=[column], use_threads=False)[0]).to_pylist()


def _first_rows(files: list[str], column: str):
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1, columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()
