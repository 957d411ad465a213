"""What every opener of a data set returns, and the few things they share."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, IterableDataset

from jit_accel.base.errors import UserError, nearest
from jit_accel.data.formats.columns import Columns, Labels
from jit_accel.data.reading.images import Images, TableImages
from jit_accel.data.reading.units import Stream

log = logging.getLogger(__name__)

# Files of other splits that lie beside the training files are not trained on.
_OTHER_SPLIT = re.compile(r"^(test|val|valid|validation|dev|eval)([-_.\d]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What the user asked for, handed to the opener of a format."""

    path: str  # without the prefix `builtin:`
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool | None = None  # None: as suits the format


@dataclass(frozen=True)
class Source:
    """A data set of images, opened but not read.

    `images` gives random access, or is a `Stream`. `num_images` is None where only reading everything would tell,
    `class_names` is () and `max_label` None likewise. `is_labelled` is False where all images are of one class because
    nothing tells them apart. `fingerprint` tells data sets apart at little cost (names, sizes, counts); it does not
    change when the data moves elsewhere. `img_size` is the side in pixels of images that are all squares of one size.
    """

    name: str
    format: str
    images: Images | Stream
    num_images: int | None
    class_names: tuple[str, ...]
    fingerprint: str
    max_label: int | None
    is_labelled: bool = True
    img_size: int | None = None

    @property
    def streaming(self) -> bool:
        return isinstance(self.images, Stream)

    @property
    def is_encoded(self) -> bool:
        """Whether its images have to be decoded; those of a store of pixels have not."""
        return getattr(self.images, "is_encoded", True)

    @property
    def num_classes(self) -> int | None:
        """Smallest number of classes that holds every label; None where the labels are not known yet."""
        return None if self.max_label is None else self.max_label + 1


def make_source(
    name: str,
    format: str,
    dataset: Dataset | IterableDataset,
    columns: Columns,
    labels: Labels,
    num_images: int | None,
    fingerprint: str,
    *,
    groups: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
    files: tuple[str, ...] = (),
    is_remote: bool = False,
    urls: tuple[str, ...] = (),
) -> Source:
    """Keep the two columns we read, undecoded, and wrap them up; of a stream with its units (see `Stream`).

    Raises:
        UserError: there are no images.
    """
    if num_images == 0:
        raise UserError("the data set has no rows: choose one with images.", about="data_path", value=name)
    if list(dataset.features) != columns.all:
        dataset = dataset.select_columns(columns.all)
    feature = dataset.features[columns.image]
    if isinstance(feature, Image) and feature.decode:
        dataset = dataset.cast_column(columns.image, Image(decode=False))
    if isinstance(dataset, IterableDataset):
        images = Stream(dataset, columns, groups, sizes, files, is_remote, urls)
    else:
        images = TableImages(dataset, columns)
    is_labelled = columns.label is not None
    return Source(name, format, images, num_images, labels.names, fingerprint, labels.max_label, is_labelled)


def check_embedded(value, columns: Columns, where: str) -> None:
    """Refuse a table whose first image is only the path of a file that is not there, or nothing like an image.

    Raises:
        UserError: saying how to embed the bytes, or to choose another column.
    """
    data, path = columns.image_of(value)
    if isinstance(data, bytes) or (data is None and not path):  # no image at all is one bad image, not a bad table
        return
    if isinstance(data, str) and os.path.isfile(data):
        return
    if not isinstance(data, str):
        raise UserError(
            f"it holds values like {str(data)[:40]} in {where}, which are no encoded "
            "images (the bytes of a JPEG, PNG, ... file): choose another column.",
            about="image_column",
            value=columns.image,
        )
    raise UserError(
        f"the column {columns.image!r} holds only paths of images ({str(data)[:80]!r}), not the "
        "images, and there is no such file here: give the folder of the images as --data_path, or write the table "
        "again with the bytes embedded ({'bytes': open(path, 'rb').read(), 'path': path} in each row).",
        about="data_path",
        value=where,
    )


def find_shards(path: str, ending: str) -> list[str]:
    """The files behind a file name, a glob or a folder, sorted; those of test and validation splits left out.

    Raises:
        UserError: nothing is there.
    """
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        root = Path(glob.escape(path))
        files = glob.glob(str(root / f"*{ending}")) or glob.glob(str(root / "**" / f"*{ending}"), recursive=True)
    elif glob.has_magic(path):
        return _sorted_or_complain(glob.glob(path, recursive=True), path, "the pattern matches no file")
    else:
        raise missing_path(path)
    kept = [file for file in files if not _OTHER_SPLIT.match(os.path.basename(file))]
    if kept and len(kept) < len(files):
        log.warning("--data_path %s: %d files of other splits are left out", path, len(files) - len(kept))
    return _sorted_or_complain(kept or files, path, f"the folder holds no *{ending} file")


def _sorted_or_complain(files: list[str], path: str, problem: str) -> list[str]:
    if not files:
        raise UserError(f"{problem}: correct the path.", about="data_path", value=path)
    return sorted(files)


def missing_path(path: str, remedy: str = "correct the path.") -> UserError:
    """The error for a path that does not exist, with the nearest name in the folder that does."""
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        return UserError(f"no such file or folder, nor the folder above it: {remedy}", about="data_path", value=path)
    hint = nearest(os.path.basename(os.path.normpath(path)), sorted(os.listdir(parent)))
    return UserError(f"no such file or folder: {remedy}{hint}", about="data_path", value=path)


def fingerprint_of(parts: Iterable[str]) -> str:
    """Sixteen hex digits that tell lists of strings apart."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def shard_names_and_sizes(files: list[str]) -> list[str]:
    """Of each file its name without the folder, and its size: the identity of a sharded data set."""
    return [f"{os.path.basename(file)}:{os.path.getsize(file)}" for file in files]
