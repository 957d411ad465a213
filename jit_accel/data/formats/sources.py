"""The kinds of data that `--data_path` may name. A new format is one opener and one row in `FORMATS`."""

import glob
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace

import datasets
import pyarrow as pa

from jit_accel.base.errors import UserError, lookup, shown
from jit_accel.base.shared_tables import shared_table
from jit_accel.config.groups import problem_of_raw, problem_of_separator
from jit_accel.data import data_error
from jit_accel.data.formats.columns import IMAGE_CHANNELS
from jit_accel.data.formats.folder import is_about_images, is_known_image_folder, open_folder
from jit_accel.data.formats.partners import check_pairs
from jit_accel.data.formats.pixel_format import in_format
from jit_accel.data.formats.prepared import is_prepared, open_prepared
from jit_accel.data.formats.scan import has_images
from jit_accel.data.formats.source import Request, Source, fingerprint_of
from jit_accel.data.formats.tables import open_builtin, open_saved, open_table, open_tables, split_of
from jit_accel.data.formats.tars import open_tars
from jit_accel.data.reading.servers import at_once, ending_of, is_url
from jit_accel.data.reading.shards import LocalShard, describe, missing_path
from jit_accel.data.reading.splits import ALL, TRAIN, choose_splits

__all__ = ["FORMATS", "Source", "detect_format", "open_images"]

HUB_ID = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[\w.-]+)(:(?P<name>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
_BY_ENDING = {".parquet": "parquet", ".tar": "webdataset"}


def open_images(
    data_path: str | os.PathLike,
    *,
    data_format: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool | None = None,
    renumber_labels: bool = False,
    split: str | None = None,
    condition_path: str | os.PathLike | None = None,
    condition_column: str | None = None,
    vector_column: Sequence[str] = (),
    in_channels: int = IMAGE_CHANNELS,
    value_range: tuple[float, float] | None = None,
    raw_shape: Sequence[int] = (),
    raw_dtype: str | None = None,
    label_separator: str | None = None,
) -> Source:
    """Open `--data_path`: a folder of images, Parquet or tar files, their URLs (`https://host/shard-{000..009}.tar`),
    a saved or prepared data set, a Hub id (`owner/name:config@revision`), `builtin:NAME`.

    Args:
        data_format: a key of `FORMATS`, or "auto" to tell by what is there.
        streaming: read sequentially (True), by random access (False), or as suits the format (None).
        renumber_labels: number the labels that occur 0, 1, 2, ...
        split: of several splits one, as test, or some, train+test, or all; None: train.
        condition_path: a folder with a picture for each image, its condition, of the same relative name.
        condition_column: the column of the conditions; in metadata files it holds their paths, in tar files it is the
            ending of their members.
        vector_column: names of columns of numbers, or lists of such, that are conditions.
        in_channels: 1 for grey, 3 for colour, to which pictures are converted; others are those of arrays (.npy, .npz),
            or of TIFFs with as many bands.
        value_range: the values that become -1 and 1 (None: those of 8 or of 16 bits); needed for floats.
        raw_shape: (H, W), (H, W, C) or (C, H, W), where the images of a table are the bytes of arrays, without a file
            format, in C order, the low byte of a number first.
        raw_dtype: the type of their numbers, such as uint16.
        label_separator: what stands between several labels in a cell of a metadata file's label column, such as ";".

    UserError for whatever is wrong with the path, the columns or the labels, found before any training.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is raised, and said once
    path = os.fspath(data_path)
    if not path.startswith("builtin:"):
        path = os.path.expanduser(path)
        forms = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))  # of accents, as disks have them
        path = next((form for form in (path, *forms) if os.path.exists(form)), path)
    lookup({"auto": None, **FORMATS}, data_format, "data_format")
    if data_format == "auto":
        data_format = detect_format(path)
    if is_url(path):
        lookup(dict.fromkeys(_BY_ENDING.values()), data_format, "data_format", rule="no format of URLs")
    if None not in (condition_path, condition_column):
        raise UserError("says the same as condition_path: give only one of them.", about="condition_column")
    place = None if condition_path is None else os.path.expanduser(os.fspath(condition_path))
    vectors = (vector_column,) if isinstance(vector_column, str) else tuple(dict.fromkeys(vector_column))
    how = image_column, label_column, streaming, renumber_labels, split, place, condition_column, vectors
    request = Request(path, *how, tuple(raw_shape), raw_dtype, label_separator)
    _check_format(request, data_format)
    source = FORMATS[data_format](request)
    source = in_format(source, in_channels, value_range and tuple(map(float, value_range)))
    check_pairs(source, "condition_column" if condition_path is None else "condition_path", place or condition_column)
    return source


def _check_format(request: Request, data_format: str) -> None:
    """Raise `UserError` for settings of bytes and of cells that cannot be, and for data that has none of these."""
    if problem := problem_of_separator(request.label_separator, request.label_column):
        raise UserError(problem, about="label_separator", value=request.label_separator)
    if data_format not in ("folder", "prepared"):
        request.refuse("label_separator", reason="has no metadata files, whose cells may hold several labels")
    if problem := problem_of_raw(request.raw_shape, request.raw_dtype):
        raise UserError(problem[1], about=problem[0], value=shown(getattr(request, problem[0])))
    if data_format in ("folder", "webdataset", "prepared"):
        request.refuse("raw_shape", reason="is no table, whose columns may hold bare bytes")


def detect_format(path: str) -> str:
    """Return the key of `FORMATS` that fits what is at `path`; UserError if that is nothing, or of no known kind."""
    if path.startswith("builtin:"):
        return "builtin"
    if is_url(path):
        ending = ending_of(path)
        return lookup(_BY_ENDING, ending, "data_path", value=path, rule=f"of URLs, the ending {ending} is unknown")
    if os.path.isdir(path):
        return _detect_in_folder(path)
    if os.path.isfile(path) or glob.has_magic(path):
        ending = os.path.splitext(path)[1].lower()
        if ending in _BY_ENDING:
            return _BY_ENDING[ending]
        rule = f"cannot tell the format of a file ending in {ending or 'nothing'}"
        raise data_error(path, f"{rule}: give *.parquet, *.tar, or a folder of images.")
    if not HUB_ID.fullmatch(path):
        raise missing_path(path)
    if os.path.isdir(os.path.dirname(path)):  # more likely a slip in a path than a name on the Hub
        raise missing_path(path, "correct the path, or give --data_format hub if you mean the Hub's data set.")
    return "hub"


def _detect_in_folder(folder: str) -> str:
    if is_prepared(folder):
        return "prepared"
    if any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")):
        return "saved"
    return shared_table(f"format of {os.path.abspath(folder)}", lambda: _table_of_format(folder)).column_names[0]


def _table_of_format(folder: str) -> pa.Table:
    """Return a table with the format of the files in a folder as its only column, to be shared."""
    return pa.table({_format_of_files(folder): [True]})


def _format_of_files(folder: str) -> str:
    if is_known_image_folder(folder):  # a pattern takes seconds where there are a million files
        return "folder"
    for pattern in ("*", "**/*"):  # shards at the top, then images anywhere, then shards anywhere
        for ending, format in _BY_ENDING.items():
            found = set(glob.iglob(os.path.join(glob.escape(folder), pattern + ending), recursive=True))
            if found and not (all(map(is_about_images, found)) and has_images(folder)):
                return format
        if pattern == "*" and has_images(folder):
            return "folder"
    return "folder"


def open_hub(request: Request) -> Source:
    """Open a split of a data set on the Hub: Parquet and tar files as a stream unless `streaming` is False.

    Others are downloaded and made a table by HF datasets. UserError if it does not exist or cannot be reached.
    """
    match = HUB_ID.fullmatch(request.path)  # none of --data_format hub: HF knows names without an owner too
    how = {"path": request.path} if match is None else {k: v for k, v in match.groupdict().items() if v}
    if request.streaming is not False:
        builder = _ask(request.path, lambda: datasets.load_dataset_builder(**how))
        splits = builder.config.data_files or {TRAIN: []}
        sizes = {name: len(files) for name, files in splits.items()}
        chosen = choose_splits(sizes, request.split, request.path, "files")
        by_column = request.split if sizes.keys() == {TRAIN} else ALL
        request = replace(request, split="+".join(chosen))
        files = [str(file) for name in chosen for file in splits[name]]
        shards = at_once(lambda file: describe(file) if is_url(file) else LocalShard(file), files)
        endings = {os.path.splitext(file)[1] for file in files}
        if endings == {".parquet"}:
            return open_tables(request, "hub", shards, builder.info.features, by_column)
        if endings == {".tar"}:
            return open_tars(request, "hub", shards)
        request.refuse("streaming", reason="has files other than Parquet and tar, and is downloaded for random access")
    dataset, split = split_of(_ask(request.path, lambda: datasets.load_dataset(**how)), request)
    identity = fingerprint_of(["hub", request.path, str(len(dataset)), *request.other_split])
    return open_table(request, "hub", dataset, identity, split)


def _ask(path: str, ask: Callable):
    try:
        return ask()
    except Exception as error:  # the Hub's client raises errors of five libraries
        reason = (str(error).splitlines() or ["no reason given"])[0]
        rule = (
            f"there is no such file or folder here, and the Hub's data set of that name cannot be opened "
            f"({type(error).__name__}: {reason}): check the name, the network, and for private data "
            "sets `hf auth login`."
        )
        raise data_error(path, rule) from error


FORMATS = {
    "folder": open_folder,
    "parquet": open_tables,
    "webdataset": open_tars,
    "saved": open_saved,
    "prepared": open_prepared,
    "hub": open_hub,
    "builtin": open_builtin,
}
