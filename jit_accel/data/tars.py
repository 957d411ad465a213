"""WebDataset: tar files whose neighbouring members with one stem are one sample (0001.jpg, 0001.cls)."""

from __future__ import annotations

import json
import os
import re
import tarfile
from typing import BinaryIO

import datasets
import numpy as np
from datasets import Image

from jit_accel.data.columns import ONE_CLASS, Columns, read_labels
from jit_accel.data.index_cache import remembered
from jit_accel.data.source import Request, Source, find_shards, fingerprint_of, make_source, shard_names_and_sizes
from jit_accel.errors import UserError, nearest

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
JSON_LABELS = ("label", "class", "cls", "class_id")
_STEM_AND_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as HF datasets and webdataset split names


def open_webdataset(request: Request) -> Source:
    """Open .tar files (a file, a glob, a folder), as a stream unless `streaming` is False.

    `--label_column` is the ending that holds the label (cls, by default), or for .json files the name of the
    entry in them (label or class, by default).

    Raises:
        UserError: missing, not tar files, no images in them, labels that are not whole numbers from 0.
    """
    files = find_shards(request.path, ".tar")
    members = first_sample(files[0])
    columns = columns_of(members, request)
    counts, values = _scan(files, columns)
    num_images = sum(counts)
    labels = ONE_CLASS
    if columns.label is not None:
        feature = datasets.Value("int64" if all(isinstance(v, int) or v is None for v in values) else "string")
        labels = read_labels(feature, values, columns.label_key or columns.label, request.path)
        columns = Columns(columns.image, columns.label, columns.label_key, labels.ids)
    streaming = request.streaming is not False
    try:
        dataset = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=streaming)
    except Exception as error:
        raise UserError(f"--data_path {request.path}: HF datasets cannot read these tar files: {error}") from error
    if columns.image not in dataset.features or not isinstance(dataset.features[columns.image], Image):
        raise UserError(
            f"--image_column {columns.image}: the members .{columns.image} of {request.path} are no images."
        )
    identity = fingerprint_of(["webdataset", str(num_images), *shard_names_and_sizes(files)])
    sizes = np.array(counts, np.int64) if streaming else None
    return make_source(request.path, "webdataset", dataset, columns, labels, num_images, identity, sizes=sizes)


def _members(file: str, opened: BinaryIO | None = None):
    """Yield (tar, member, stem, key) of the members that HF datasets sees too; `opened` is read front to back."""
    try:
        with tarfile.open(file, "r:") if opened is None else tarfile.open(fileobj=opened, mode="r|") as tar:
            for member in tar:
                match = _STEM_AND_KEY.match(member.name)
                if member.isfile() and match and not os.path.basename(member.name).startswith((".", "__")):
                    yield tar, member, match[1], match[2]
    except (tarfile.TarError, OSError) as error:
        if opened is not None:
            raise  # it may be the network's
        raise UserError(f"--data_path {file}: not a readable tar file ({error}): remove or replace it.") from error


def first_sample(file: str, opened: BinaryIO | None = None) -> dict[str, bytes]:
    """The members of the first sample by their endings, of a tar file that may be `opened` already."""
    sample, first_stem = {}, None
    for tar, member, stem, key in _members(file, opened):
        if first_stem not in (None, stem):
            break
        first_stem = stem
        sample[key] = tar.extractfile(member).read()
    return sample


def columns_of(sample: dict[str, bytes], request: Request) -> Columns:
    """Choose the endings of the images and the labels.

    Raises:
        UserError: there are no images, or not what the user named.
    """
    keys = ", ".join(f".{key}" for key in sample) or "nothing"
    image = request.image_column or next((key for key in IMAGE_KEYS if key in sample), None)
    if image is None or image not in sample:
        raise UserError(
            f"--image_column {image or '(not given)'}: the first sample of {request.path} consists of {keys}: name the "
            f"ending of the images.{nearest(image or '', sample)}"
        )
    wanted = request.label_column
    if (wanted is None and "cls" in sample) or wanted == "cls":
        return Columns(image, "cls")
    if "json" in sample:
        entries = _load_json(sample["json"])
        key = wanted if wanted in entries else next((k for k in JSON_LABELS if wanted is None and k in entries), None)
        if key is not None:
            return Columns(image, "json", key)
        keys += f" (in .json: {', '.join(entries)})"
    if wanted is not None:
        raise UserError(
            f"--label_column {wanted}: the first sample of {request.path} consists of {keys}: choose from these."
        )
    return Columns(image)


def _load_json(data: bytes) -> dict:
    try:
        entries = json.loads(data)
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}


def _scan(files: list[str], columns: Columns) -> tuple[list[int], set]:
    """The images of each file by the tars' headers, as counted now or before, and the different labels."""
    kind = f"tar {columns.image} {columns.label} {columns.label_key}"
    found = remembered(kind, files, lambda file: _scan_one(file, columns))
    return [count for count, _ in found], {value for _, values in found for value in values}


def _scan_one(file: str, columns: Columns) -> tuple[int, list]:
    count, values = 0, set()
    for tar, member, _, key in _members(file):
        count += key == columns.image
        if key == columns.label:
            values.add(label_in(tar.extractfile(member).read(), columns, f"{file}, {member.name}"))
    return count, list(values)


def label_in(data: bytes, columns: Columns, where: str) -> int | str | None:
    """The label in the bytes of a member.

    Raises:
        UserError: a .cls file that holds no number.
    """
    if columns.label_key is not None:
        value = _load_json(data).get(columns.label_key)
        return value if value is None or isinstance(value, int) else str(value)
    try:
        return int(data)
    except ValueError as error:
        raise UserError(
            f"--data_path {where}: the class {data[:40]!r} is not a whole number, as .cls files must hold: write "
            'class numbers, or put the names in .json files under "label".'
        ) from error
