"""WebDataset: tar files whose neighbouring members with one stem are one sample (0001.jpg, 0001.cls)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import BinaryIO

import datasets
import numpy as np
from datasets.packaged_modules.webdataset.webdataset import IMAGE_EXTENSIONS

from jit_accel.base.errors import UserError, nearest
from jit_accel.data.formats.columns import ONE_CLASS, Columns, read_labels
from jit_accel.data.formats.index_cache import remembered
from jit_accel.data.formats.source import (
    Request,
    Source,
    find_shards,
    fingerprint_of,
    make_source,
    shard_names_and_sizes,
)
from jit_accel.data.formats.tar_samples import IMAGE_KEYS, image_key, is_image, label_in, load_json, samples_in

log = logging.getLogger(__name__)

JSON_LABELS = ("label", "class", "cls", "class_id")
_MOST_SAMPLES = 20  # that are looked at to find the endings


def open_webdataset(request: Request) -> Source:
    """Open .tar files (a file, a glob, a folder), as a stream unless `streaming` is False.

    `--label_column` is the ending that holds the label (cls, by default), or for .json files the name of the
    entry in them (label or class, by default).

    Raises:
        UserError: missing, not tar files, no images in them, labels that are not whole numbers from 0.
    """
    files = find_shards(request.path, ".tar")
    columns = columns_of(first_sample(files[0]), request)
    if columns.image.rsplit(".", 1)[-1].lower() not in IMAGE_EXTENSIONS:
        raise UserError(
            f"the members .{columns.image} of {request.path} are no images: choose another ending.",
            about="image_column",
            value=columns.image,
        )
    counts, values = _scan(files, columns)
    num_images = sum(counts)
    # HF would infer the columns from the first five samples, and refuse those that lack one
    features, labels = {columns.image: datasets.Image(decode=False)}, ONE_CLASS
    if columns.label is not None:
        is_text = any(isinstance(value, str) for value in values)
        feature = datasets.Value("string" if is_text else "int64")
        features[columns.label] = {columns.label_key: feature} if columns.label_key is not None else feature
        values = {str(v) if is_text and v is not None else v for v in values}
        labels = read_labels(feature, values, columns.label_key or columns.label, request.path)
        columns = replace(columns, label_ids=labels.ids)
    streaming = request.streaming is not False
    how = {"split": "train", "streaming": streaming, "features": datasets.Features(features)}
    try:
        dataset = datasets.load_dataset("webdataset", data_files=files, **how)
    except Exception as error:
        raise UserError(
            f"HF datasets cannot read these tar files: {error}", about="data_path", value=request.path
        ) from error
    identity = fingerprint_of(["webdataset", str(num_images), *shard_names_and_sizes(files)])
    how = {"sizes": np.array(counts, np.int64), "files": tuple(files)} if streaming else {}
    return make_source(request.path, "webdataset", dataset, columns, labels, num_images, identity, **how)


def first_sample(file: str, opened: BinaryIO | None = None) -> dict[str, bytes]:
    """The members by their endings of the first sample with an image, of a tar file that may be `opened` already.

    Of the very first where none of twenty seems to have one.
    """
    first: dict[str, bytes] = {}
    for number, (_, sample) in enumerate(samples_in(file, opened)):
        if any(map(is_image, sample)):
            return sample
        first = first or sample
        if number + 1 == _MOST_SAMPLES:
            break
    return first


def _spelled(key: str, sample: dict[str, bytes]) -> str | None:
    """The ending of the sample that is `key`, in whatever case."""
    return key if key in sample else next((other for other in sample if other.lower() == key.lower()), None)


def columns_of(sample: dict[str, bytes], request: Request) -> Columns:
    """Choose the endings of the images and the labels.

    Raises:
        UserError: there are no images, or not what the user named.
    """
    keys = ", ".join(f".{key}" for key in sample) or "nothing"
    asked = request.image_column
    image = next(filter(None, (_spelled(key, sample) for key in ([asked] if asked else IMAGE_KEYS))), None)
    if image is None:
        raise UserError(
            f"the first sample of {request.path} consists of {keys}: name the "
            f"ending of the images.{nearest(asked or '', sample)}",
            about="image_column",
            value=f"{asked or '(not given)'}",
        )
    wanted, classes, table = request.label_column, _spelled("cls", sample), _spelled("json", sample)
    # Where there are several pictures, as of a photo and its mask, one does not stand for the other.
    any_image = asked is None and sum(key.lower() in IMAGE_KEYS for key in sample) == 1
    if classes and (wanted or "cls").lower() == "cls":
        return Columns(image, classes, any_image=any_image)
    if table:
        entries = load_json(sample[table])
        key = wanted if wanted in entries else next((k for k in JSON_LABELS if wanted is None and k in entries), None)
        if key is not None:
            return Columns(image, table, key, any_image=any_image)
        keys += f" (in .json: {', '.join(entries)})"
    if wanted is not None:
        raise UserError(
            f"the first sample of {request.path} consists of {keys}: choose from these.",
            about="label_column",
            value=wanted,
        )
    return Columns(image, any_image=any_image)


def _scan(files: list[str], columns: Columns) -> tuple[list[int], set]:
    """The samples of each file by the tars' headers, as counted now or before, and the different labels."""
    kind = f"tar samples {columns.image} {columns.any_image} {columns.label} {columns.label_key}"
    found = remembered(kind, files, lambda file: _scan_one(file, columns))
    counts, lacking = ([facts[n] for facts in found] for n in (0, 2))
    if sum(lacking):
        file, example = next((file, facts[3]) for file, facts in zip(files, found) if facts[2])
        log.warning(
            "--data_path: %d of %d samples have no image and count as bad ones, as %s in %s",
            sum(lacking),
            sum(counts),
            example,
            file,
        )
    return counts, {value for facts in found for value in facts[1]}


def _scan_one(file: str, columns: Columns) -> tuple[int, list, int, str]:
    """How many samples there are, the labels of those with images, how many have none, and the stem of one of these."""
    count, values, lacking, example = 0, set(), 0, ""
    for stem, sample in samples_in(file, read=lambda _, key: key == columns.label):
        count += 1
        if columns.label in sample:
            values.add(label_in(sample[columns.label], columns, f"{file}, {stem}.{columns.label}"))
        elif columns.label is not None and image_key(sample, columns):
            values.add(None)
        if not image_key(sample, columns):
            lacking += 1
            example = example or stem
    return count, list(values), lacking, example
