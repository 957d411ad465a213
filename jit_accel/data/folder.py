"""Folders of image files: one class a subfolder, or one class in all.

Our own walk, because HF's `imagefolder` takes folders named train or test for splits and streams in class order.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image

from jit_accel.data.columns import Columns, Labels
from jit_accel.data.source import Request, Source, fingerprint_of, make_source, missing_path
from jit_accel.errors import UserError

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    }
)
SPLIT_NAMES = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "dev"])


@dataclass
class FolderScan:
    """Relative paths (with /) of the images under a folder, sorted, and what else was met on the way."""

    images: list[str] = field(default_factory=list)
    other_endings: Counter = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)


def scan_folder(root: str) -> FolderScan:
    """Walk `root`, following links but no loops; hidden files and folders are ignored."""
    scan = FolderScan()
    scan.images = sorted(_walk(root, "", (), scan))
    return scan


def has_images(root: str) -> bool:
    """Whether `scan_folder` would find any; stops at the first."""
    return next(_walk(root, "", (), FolderScan()), None) is not None


def _walk(folder: str, prefix: str, ancestors: tuple, scan: FolderScan) -> Iterator[str]:
    try:
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in ancestors:  # a link back up; links to elsewhere are followed
            return
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        scan.unreadable.append(f"{folder} ({error.strerror})")
        return
    ancestors = (*ancestors, (info.st_dev, info.st_ino))
    for entry in found:
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if _is_dir(entry):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", ancestors, scan)
            continue
        ending = os.path.splitext(entry.name)[1].lower()
        if ending not in IMAGE_EXTENSIONS:
            scan.other_endings[ending or "no ending"] += 1
        elif not _is_utf8(entry.path):
            scan.unreadable.append(f"{entry.path!a} (its name is not UTF-8)")
        else:
            yield prefix + entry.name


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Arrow holds only UTF-8
        return False
    return True


def open_folder(request: Request) -> Source:
    """Open a folder of class folders, or a flat folder as one class named after it.

    Raises:
        UserError: missing, empty, without images, holding splits instead of classes; columns or streaming asked for.
    """
    root = request.path
    if not os.path.isdir(root):
        raise missing_path(root)
    for flag, value in (("--image_column", request.image_column), ("--label_column", request.label_column)):
        if value is not None:
            raise UserError(f"{flag} {value}: {root} is a folder of images, which has no columns: leave the flag out.")
    if request.streaming:
        raise UserError(
            f"--streaming true: {root} is a folder of images, which is read by random access (better shuffled, and "
            "any number of processes can resume): leave the flag out."
        )
    scan = scan_folder(root)
    _report_unreadable(root, scan)
    if not scan.images:
        raise _no_images(root, scan)
    images, labels, names = _classify(root, scan.images)
    paths = [os.path.join(os.path.abspath(root), image) for image in images]
    dataset = _as_dataset(paths, labels, names)
    identity = fingerprint_of(["folder", str(len(images)), *images])
    return make_source(
        root, "folder", dataset, Columns("image", "label"), Labels(names, len(names) - 1), len(images), identity
    )


def _classify(root: str, images: list[str]) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    in_folders = [image for image in images if "/" in image]
    if not in_folders:
        name = os.path.basename(os.path.abspath(root)) or "image"
        return images, np.zeros(len(images), np.int64), (name,)
    folders = [image.partition("/")[0] for image in in_folders]
    names = tuple(sorted(set(folders)))
    if all(name.lower() in SPLIT_NAMES for name in names):
        best = next((name for name in names if name.lower().startswith("train")), names[0])
        raise UserError(
            f"--data_path {root}: its folders are splits ({', '.join(names)}), not classes: "
            f"use --data_path {os.path.join(root, best)}."
        )
    strays = len(images) - len(in_folders)
    if strays:
        log.warning("--data_path %s: %d images beside the class folders have no class: skipped", root, strays)
    number = {name: i for i, name in enumerate(names)}
    return in_folders, np.fromiter((number[f] for f in folders), np.int64, len(folders)), names


def _as_dataset(paths: list[str], labels: np.ndarray, names: tuple[str, ...]) -> Dataset:
    """Build the Arrow table by columns: `Dataset.from_dict` would encode a million paths one by one."""
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(names))})
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )
    table = pa.table({"image": images, "label": pa.array(labels)}).cast(features.arrow_schema)
    return Dataset(table)


def _no_images(root: str, scan: FolderScan) -> UserError:
    looked_for = " ".join(sorted(IMAGE_EXTENSIONS))
    if scan.other_endings:
        found = ", ".join(f"{count} x {ending}" for ending, count in scan.other_endings.most_common(5))
        return UserError(
            f"--data_path {root}: no images found. Looked for {looked_for} here and in all subfolders, and found "
            f"{found}: give a folder of images, of Parquet files or of .tar files."
        )
    return UserError(
        f"--data_path {root}: the folder is empty. Put images in it (one subfolder a class, or none): {looked_for}."
    )


def _report_unreadable(root: str, scan: FolderScan) -> None:
    if scan.unreadable:
        log.warning(
            "--data_path %s: %d files or folders cannot be read and are skipped, the first: %s",
            root,
            len(scan.unreadable),
            scan.unreadable[0],
        )
