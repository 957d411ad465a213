"""The kinds of data that `--data_path` may name. A new format is one opener and one row in `FORMATS`."""

import glob
import logging
import os

import datasets

from jit_accel.base.errors import lookup
from jit_accel.data.data_error import data_error
from jit_accel.data.formats.folder import is_known_image_folder, open_folder
from jit_accel.data.formats.hub_datasets import HUB_ID, open_hub
from jit_accel.data.formats.index import is_prepared
from jit_accel.data.formats.prepared import open_prepared
from jit_accel.data.formats.remote import ending_of, is_url
from jit_accel.data.formats.scan import has_images
from jit_accel.data.formats.source import Request, Source, missing_path
from jit_accel.data.formats.tables import has_saved_dataset, open_builtin, open_parquet, open_saved
from jit_accel.data.formats.tars import open_webdataset

__all__ = ["FORMATS", "Source", "detect_format", "open_images"]

FORMATS = {
    "folder": open_folder,
    "parquet": open_parquet,
    "webdataset": open_webdataset,
    "saved": open_saved,
    "prepared": open_prepared,
    "hub": open_hub,
    "builtin": open_builtin,
}
_BY_ENDING = {".parquet": "parquet", ".tar": "webdataset"}


def open_images(
    data_path: str | os.PathLike,
    *,
    data_format: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool | None = None,
) -> Source:
    """Open `--data_path`: a folder of images, Parquet or tar files, their URLs (`https://host/shard-{000..009}.tar`),
    a saved or prepared data set, a Hub id (`owner/name:config@revision`), `builtin:NAME`.

    Args:
        data_format: a key of `FORMATS`, or "auto" to tell by what is there.
        streaming: read sequentially (True), by random access (False), or as suits the format (None).

    Raises:
        UserError: whatever is wrong with the path, the columns or the labels, found before any training.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what is wrong is raised, and said once
    path = os.fspath(data_path)
    if not path.startswith("builtin:"):
        path = os.path.expanduser(path)
    if data_format == "auto":
        data_format = detect_format(path)
    if data_format not in FORMATS:
        lookup({"auto": None, **FORMATS}, data_format, "data_format")
    if is_url(path):
        lookup(dict.fromkeys(_BY_ENDING.values()), data_format, "data_format", rule="no format of URLs")
    return FORMATS[data_format](Request(path, image_column, label_column, streaming))


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
    if has_saved_dataset(folder):
        return "saved"
    if is_known_image_folder(folder):  # a pattern takes seconds where there are a million files
        return "folder"
    for pattern in ("*", "**/*"):  # shards at the top, then images anywhere, then shards anywhere
        for ending, format in _BY_ENDING.items():
            if glob.glob(os.path.join(glob.escape(folder), pattern + ending), recursive=True):
                return format
        if pattern == "*" and has_images(folder):
            return "folder"
    return "folder"
