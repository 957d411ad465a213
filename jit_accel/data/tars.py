"""WebDataset: tar files whose neighbouring members with one stem are one sample (0001.jpg, 0001.cls)."""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import BinaryIO

import datasets
import numpy as np
from datasets.packaged_modules.webdataset.webdataset import IMAGE_EXTENSIONS

from jit_accel.data.columns import ONE_CLASS, Columns, read_labels
from jit_accel.data.index_cache import remembered
from jit_accel.data.source import Request, Source, find_shards, fingerprint_of, make_source, shard_names_and_sizes
from jit_accel.errors import UserError, nearest

log = logging.getLogger(__name__)

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
JSON_LABELS = ("label", "class", "cls", "class_id")
_HF_KEYS = ("__key__", "__url__")  # which HF datasets adds to each sample
_MOST_SAMPLES = 20  # that are looked at to find the endings
_STEM_AND_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as HF datasets and webdataset split names


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
            f"--image_column {columns.image}: the members .{columns.image} of {request.path} are no images: choose "
            "another ending."
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
        raise UserError(f"--data_path {request.path}: HF datasets cannot read these tar files: {error}") from error
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
            if opened is None:
                _check_end(file, tar.offset)
    except (tarfile.TarError, OSError) as error:
        if opened is not None:
            raise  # it may be the network's
        raise UserError(f"--data_path {file}: not a readable tar file ({error}): remove or replace it.") from error


def _check_end(file: str, offset: int) -> None:
    """Python takes the end of a file, and a header that it cannot read, for the end of the archive."""
    with open(file, "rb") as opened:
        opened.seek(offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"--data_path {file}: the tar file was cut short or is damaged: at byte {offset:,} there is neither "
                "another member nor the block of zeros that ends it: restore it."
            )


def _samples(
    file: str, opened: BinaryIO | None = None, read: Container[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (stem, the members by their endings) of each row that HF datasets makes of the file.

    Only the members with the endings in `read` are read, all where it is None; the others are b"".
    """
    sample, stem = {}, None
    for tar, member, next_stem, key in _members(file, opened):
        if sample and next_stem != stem:
            yield stem, sample
            sample = {}
        stem = next_stem
        if key in sample or key in _HF_KEYS:
            raise UserError(
                f"--data_path {file}: the sample {stem} has a second member {member.name}, or one of a name that HF "
                "datasets does not allow: write the file again without it."
            )
        sample[key] = tar.extractfile(member).read() if read is None or key in read else b""
    if sample:
        yield stem, sample


def first_sample(file: str, opened: BinaryIO | None = None) -> dict[str, bytes]:
    """The members by their endings of the first sample with an image, of a tar file that may be `opened` already.

    Of the very first where none of twenty seems to have one.
    """
    first: dict[str, bytes] = {}
    for number, (_, sample) in enumerate(_samples(file, opened)):
        if any(key.rsplit(".", 1)[-1].lower() in IMAGE_KEYS for key in sample):
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
            f"--image_column {asked or '(not given)'}: the first sample of {request.path} consists of {keys}: name the "
            f"ending of the images.{nearest(asked or '', sample)}"
        )
    wanted, classes, table = request.label_column, _spelled("cls", sample), _spelled("json", sample)
    if classes and (wanted or "cls").lower() == "cls":
        return Columns(image, classes)
    if table:
        entries = _load_json(sample[table])
        key = wanted if wanted in entries else next((k for k in JSON_LABELS if wanted is None and k in entries), None)
        if key is not None:
            return Columns(image, table, key)
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
    """The samples of each file by the tars' headers, as counted now or before, and the different labels."""
    kind = f"tar samples {columns.image} {columns.label} {columns.label_key}"
    found = remembered(kind, files, lambda file: _scan_one(file, columns))
    counts, lacking = ([facts[n] for facts in found] for n in (0, 2))
    if sum(lacking):
        file, example = next((file, facts[3]) for file, facts in zip(files, found) if facts[2])
        log.warning(
            "--data_path: %d of %d samples have no .%s and count as bad images, as %s in %s: name all images alike",
            sum(lacking),
            sum(counts),
            columns.image,
            example,
            file,
        )
    return counts, {value for facts in found for value in facts[1]}


def _scan_one(file: str, columns: Columns) -> tuple[int, list, int, str]:
    """How many samples there are, the labels of those with images, how many have none, and the stem of one of these."""
    count, values, lacking, example = 0, set(), 0, ""
    for stem, sample in _samples(file, read=(columns.label,)):
        count += 1
        if columns.label in sample:
            values.add(label_in(sample[columns.label], columns, f"{file}, {stem}.{columns.label}"))
        elif columns.label is not None and columns.image in sample:
            values.add(None)
        if columns.image not in sample:
            lacking += 1
            example = example or stem
    return count, list(values), lacking, example


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
