"""The samples in a tar file, grouped as HF datasets and webdataset group them.

HF's own reader decodes all members, of which any that is broken ends the reading, and skips rows by reading them.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator

from jit_accel.base.errors import UserError
from jit_accel.data.formats.columns import Columns

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
_HF_KEYS = ("__key__", "__url__")  # which HF datasets adds to each sample
_STEM_AND_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as HF datasets and webdataset split names


def is_image(key: str) -> bool:
    """Return whether members of this ending are images."""
    return key.rsplit(".", 1)[-1].lower() in IMAGE_KEYS


def image_key(sample: Iterable[str], columns: Columns) -> str | None:
    """Return the ending of the member that is the image of this sample, if there is any."""
    if columns.image in sample:
        return columns.image
    return next((key for key in sample if columns.any_image and key.lower() in IMAGE_KEYS), None)


def sample_rows(columns: Columns, file: str, _: int = 0, start: int = 0) -> Iterator[dict]:
    """Yield the rows of a tar file from number `start` on, with the image and the label alone.

    Raises:
        UserError: the file is damaged, or a label no number.
    """

    def is_wanted(number: int, key: str) -> bool:
        return number >= start and (key == columns.label or is_image(key))

    for number, (stem, sample) in enumerate(samples_in(file, is_wanted)):
        if number >= start:
            key = image_key(sample, columns)
            row = {columns.image: None if key is None else {"bytes": sample[key], "path": f"{stem}.{key}"}}
            if columns.label is not None:
                row[columns.label] = _label_value(sample.get(columns.label), columns, f"{file}, {stem}")
            yield row


def _label_value(data: bytes | None, columns: Columns, where: str) -> int | str | dict | None:
    label = None if data is None else label_in(data, columns, where)
    if label is not None and columns.label_ids is not None:
        label = str(label)
    return label if columns.label_key is None else {columns.label_key: label}


def _members(file: str):
    """Yield (tar, member, stem, key) of the members that HF datasets sees too."""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                match = _STEM_AND_KEY.match(member.name)
                if member.isfile() and match and not os.path.basename(member.name).startswith((".", "__")):
                    yield tar, member, match[1], match[2]
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"not a readable tar file ({error}): remove or replace it.", about="data_path", value=file
        ) from error


def _check_end(file: str, offset: int) -> None:
    """Python takes the end of a file, and a header that it cannot read, for the end of the archive."""
    with open(file, "rb") as opened:
        opened.seek(offset)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"the tar file was cut short or is damaged: at byte {offset:,} there is neither "
                "another member nor the block of zeros that ends it: restore it.",
                about="data_path",
                value=file,
            )


def samples_in(
    file: str, is_wanted: Callable[[int, str], bool] = lambda number, key: True
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (stem, the members by their endings) of each row that HF datasets makes of a tar file.

    Only the members for which `is_wanted(number of the sample, ending)` holds are read; the others are b"".
    """
    sample, stem, number = {}, None, 0
    for tar, member, next_stem, key in _members(file):
        if sample and next_stem != stem:
            yield stem, sample
            sample, number = {}, number + 1
        stem = next_stem
        if key in sample or key in _HF_KEYS:
            raise UserError(
                f"the sample {stem} has a second member {member.name}, or one of a name that HF "
                "datasets does not allow: write the file again without it.",
                about="data_path",
                value=file,
            )
        sample[key] = tar.extractfile(member).read() if is_wanted(number, key) else b""
    if sample:
        yield stem, sample


def load_json(data: bytes) -> dict:
    try:
        entries = json.loads(data)
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}


def label_in(data: bytes, columns: Columns, where: str) -> int | str | None:
    """Return the label in the bytes of a member.

    Raises:
        UserError: a .cls file that holds no number.
    """
    if columns.label_key is not None:
        value = load_json(data).get(columns.label_key)
        return value if value is None or isinstance(value, int) else str(value)
    try:
        return int(data)
    except ValueError as error:
        raise UserError(
            f"the class {data[:40]!r} is not a whole number, as .cls files must hold: write "
            'class numbers, or put the names in .json files under "label".',
            about="data_path",
            value=where,
        ) from error
