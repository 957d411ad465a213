"""Data sets on the Hugging Face Hub: `owner/name`, `owner/name:config`, `owner/name:config@revision`."""

import os
import re
from collections.abc import Callable

import datasets

from jit_accel.base.errors import lookup
from jit_accel.data.data_error import data_error
from jit_accel.data.formats.remote import is_url
from jit_accel.data.formats.source import Request, Source, fingerprint_of
from jit_accel.data.formats.tables import open_table, open_tables
from jit_accel.data.formats.tars import open_tars
from jit_accel.data.reading.shards import LocalShard, at_once, describe

HUB_ID = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


def open_hub(request: Request) -> Source:
    """Open the split "train" of a data set on the Hub: Parquet and tar files as a stream unless `streaming` is False.

    Others are downloaded and made a table by HF datasets. UserError if it does not exist or cannot be reached.
    """
    match = HUB_ID.fullmatch(request.path)  # none of --data_format hub: HF knows names without an owner too
    how = {"path": request.path} if match is None else {k: v for k, v in match.groupdict().items() if v}
    if request.streaming is not False:
        builder = _ask(request.path, lambda: datasets.load_dataset_builder(**how))
        splits = builder.config.data_files or {"train": []}
        found = lookup(splits, "train", "data_path", value=request.path, rule="has no split train")
        files = list(map(str, found))
        shards = at_once(lambda file: describe(file) if is_url(file) else LocalShard(file), files)
        endings = {os.path.splitext(file)[1] for file in files}
        if endings == {".parquet"}:
            return open_tables(request, "hub", shards, builder.info.features)
        if endings == {".tar"}:
            return open_tars(request, "hub", shards)
        request.refuse("streaming", reason="has files other than Parquet and tar, and is downloaded for random access")
    dataset = _ask(request.path, lambda: datasets.load_dataset(**how, split="train"))
    return open_table(request, "hub", dataset, fingerprint_of(["hub", request.path, str(len(dataset))]))


def _ask(path: str, ask: Callable):
    try:
        return ask()
    except Exception as error:  # the Hub's client raises errors of five libraries
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise data_error(
            path,
            f"there is no such file or folder here, and the Hub's data set of that name "
            f"cannot be opened ({type(error).__name__}: {reason}): check the name, its split 'train', the network, "
            "and for private data sets `hf auth login`.",
        ) from error
