"""Data sets on the Hugging Face Hub: `owner/name`, `owner/name:config`, `owner/name:config@revision`."""

from __future__ import annotations

import logging
import re

import datasets
import numpy as np

from jit_accel.base.errors import UserError
from jit_accel.data.formats.columns import ONE_CLASS, find_columns, read_labels
from jit_accel.data.formats.remote import footers_of
from jit_accel.data.formats.source import Request, Source, check_embedded, fingerprint_of, make_source
from jit_accel.data.formats.tables import random_access, row_groups_of, units_of

log = logging.getLogger(__name__)

MOST_FOOTERS = 512  # of more files the sizes are not asked for
HUB_ID = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


def open_hub(request: Request) -> Source:
    """Open the split "train" of a data set on the Hub, as a stream unless `streaming` is False.

    Raises:
        UserError: it does not exist or cannot be reached; wrong columns or labels.
    """
    name, how = _parse(request.path)
    streaming = request.streaming is not False
    try:
        dataset = datasets.load_dataset(name, **how, split="train", streaming=streaming)
    except Exception as error:  # the Hub's client raises errors of five libraries
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"there is no such file or folder here, and the Hub's data set of that name "
            f"cannot be opened ({type(error).__name__}: {reason}): check the name, its split 'train', the network, "
            "and for private data sets `hf auth login`.",
            about="data_path",
            value=request.path,
        ) from error
    if not streaming:
        return random_access(request, "hub", dataset, fingerprint_of(["hub", request.path, str(len(dataset))]))
    if dataset.features is None:
        raise UserError(
            "its columns are not known before it was read: use --streaming false.",
            about="data_path",
            value=request.path,
        )
    columns = find_columns(dataset.features, request.image_column, request.label_column, request.path)
    labels = ONE_CLASS
    if columns.label is not None:
        labels = read_labels(dataset.features[columns.label], None, columns.label, request.path)
    split = (dataset.info.splits or {}).get("train")
    files, row_groups = _row_groups(name, how, dataset.num_shards)
    rows = sum(map(sum, row_groups)) if row_groups else split and split.num_examples
    identity = fingerprint_of(["hub", request.path, str(rows)])
    units = units_of(dataset, row_groups) if row_groups else {}
    how = {"is_remote": True, "urls": files or (request.path,) * dataset.num_shards, **units}
    source = make_source(request.path, "hub", dataset, columns, labels, rows, identity, **how)
    filled = 0 if source.images.sizes is None else int(np.argmax(source.images.sizes > 0))
    first = next(iter(source.images.rows(filled)), None)
    check_embedded(first and first[columns.image], columns, request.path)
    return source


def _parse(path: str) -> tuple[str, dict[str, str]]:
    """The name for `load_dataset` and its further arguments."""
    match = HUB_ID.fullmatch(path)
    if match is None:  # of --data_format hub; HF knows names without an owner too
        return path, {}
    found = match.groupdict()
    return found.pop("path"), {"name" if k == "config" else k: v for k, v in found.items() if v}


def _row_groups(name: str, how: dict[str, str], num_shards: int) -> tuple[tuple[str, ...], list[list[int]] | None]:
    """The files of the split and the rows of their row groups, or () and None where they are not Parquet."""
    try:
        builder = datasets.load_dataset_builder(name, **how)
        files = tuple(map(str, (builder.config.data_files or {}).get("train") or ()))
        if len(files) != num_shards or len(files) > MOST_FOOTERS:
            return (), None
        if not all(file.endswith(".parquet") for file in files):
            return files, None
        return files, [row_groups_of(footer) for footer, _ in footers_of(list(files))]
    except Exception as error:  # as above; the data set can be read without
        log.info("%s: the sizes of its row groups are not known (%s)", name, error)
        return (), None
