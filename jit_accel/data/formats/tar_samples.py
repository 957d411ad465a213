"""The samples in a tar file: neighbouring members with one stem, told apart from pictures with dots in their names."""

import contextlib
import itertools
import json
import logging
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jit_accel.data import data_error
from jit_accel.data.formats.columns import Columns
from jit_accel.data.reading.shards import Shard, at_hand

log = logging.getLogger(__name__)

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "jp2")
_HF_KEYS = ("__key__", "__url__")  # which HF datasets adds to each sample
_STEM_AND_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as HF datasets and webdataset split names
_MOST_MEMBERS = 10_000  # that are looked at to find which endings with dots there are


def joined_endings(shard: Shard) -> frozenset[str]:
    """Return the endings of pictures, such as seg.png, that are parts of samples: beside one of a plain ending.

    It is that of several samples, as of a photo and its mask, or of the only picture beside a label. Else dots in front
    of an ending belong to a name, as in "Screenshot at 10.15.30.png"; those that several names have are said.
    """
    rows: dict[str, list[str]] = {}
    with at_hand(shard) as path:
        for _, _, stem, key in itertools.islice(_members(path), _MOST_MEMBERS):
            rows.setdefault(stem, []).append(key)
    lone, joined, apart = set(), Counter(), Counter()
    for keys in rows.values():
        pictures = [key for key in keys if is_image(key)]
        if len(pictures) != 1:
            (joined if any("." not in key for key in keys) else apart).update(pictures)
        elif not all(key.startswith(pictures[0][: pictures[0].rfind(".") + 1]) for key in keys):
            lone.add(pictures[0])
    kept = lone.union(filter(lambda key: "." not in key or _are_alike(key, joined[key]), joined))
    if named := sorted(key for key, count in apart.items() if key not in kept and _are_alike(key, count)):
        rule = "--data_path %s: pictures of one name, .%s, are samples of their own: --image_column %s takes one"
        log.warning(rule, shard, " and .".join(named[:3]), named[0])
    return frozenset(kept)


def _are_alike(key: str, count: int) -> bool:
    """Return True for an ending of several names, unless it begins with a number, as that of a copy does."""
    return count > 1 and not key.partition(".")[0].isdigit()


def samples_in(
    file: str, joined: frozenset[str] | None, is_wanted: Callable[[int, str], bool] = lambda number, key: True
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (stem, the members by their endings) of each row that HF datasets makes of a tar file.

    It is several rows where pictures with dots in their names are not `joined`. Members for which `is_wanted(number of
    the sample, ending)` does not hold are b"". UserError if it is damaged.
    """
    rows = itertools.groupby(_members(file), key=lambda found: found[2])
    parts = (part for stem, row in rows if stem for part in _parts(list(row), joined))
    for number, (stem, of_stem) in enumerate(parts):
        sample = {}
        for tar, member, key in of_stem:
            if key in sample or key in _HF_KEYS:
                rule = f"the sample {stem} has a second member {member.name}, or one of a name that HF datasets does "
                raise data_error(file, rule + "not allow: write the file again without it.")
            sample[key] = tar.extractfile(member).read() if is_wanted(number, key) else b""
        yield stem, sample


def _parts(row: list[tuple], joined: frozenset[str] | None) -> Iterable[tuple[str, list[tuple]]]:
    """Return the samples (stem, [(tar, member, ending), ...]) in members that have one stem up to its first dot."""

    ends = tuple(end for end in joined or () if end.startswith("."))  # of whatever name is in front of them

    def is_picture_of_its_own(key: str) -> bool:
        return "." in key and joined is not None and key not in joined and is_image(key) and not key.endswith(ends)

    stems = {f"{stem}.{key.rpartition('.')[0]}" for *_, stem, key in row if is_picture_of_its_own(key)}
    parts: dict[str, list[tuple]] = {}
    for tar, member, stem, key in row:
        words = key.split(".") if stems else ()
        longer = (f"{stem}.{'.'.join(words[:n])}" for n in range(len(words) - 1, 0, -1))
        whole = next((name for name in longer if name in stems), stem)
        parts.setdefault(whole, []).append((tar, member, f"{stem}.{key}"[len(whole) + 1 :]))
    return parts.items()


def _members(file: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str, str]]:
    """Yield (tar, member, stem, key) of the members that HF datasets sees too, and one without a stem."""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                match = _STEM_AND_KEY.match(member.name)
                if member.isfile() and match and not os.path.basename(member.name).startswith((".", "__")):
                    yield tar, member, unicodedata.normalize("NFC", match[1]), match[2]
            yield tar, None, "", ""  # so that the file is open while the last members are read
            # Python takes the end of a file, and a header that it cannot read, for the end of the archive.
            with open(file, "rb") as opened:
                opened.seek(tar.offset)
                is_complete = opened.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise data_error(file, f"not a readable tar file ({error}): remove or replace it.") from error
    if not is_complete:
        rule = f"the tar file was cut short or is damaged: at byte {tar.offset:,} there is neither another member nor "
        raise data_error(file, rule + "the block of zeros that ends it: restore it.")


def is_image(key: str) -> bool:
    return key.rsplit(".", 1)[-1].lower() in IMAGE_KEYS


def label_in(data: bytes, columns: Columns, where: str) -> float | str | list | None:
    """Return the label in the bytes of a member, or a list of them; UserError for a .cls file that holds no number."""
    if columns.label_key is not None:
        value = load_json(data).get(columns.label_key)
        if columns.most_labels is None:
            return _as_label(value)
        return [_as_label(one) for one in (value if isinstance(value, list) else [] if value is None else [value])]
    with contextlib.suppress(ValueError):
        if (number := float(data)).is_integer():
            return int(number)
    rule = f"the class {data[:40]!r} is not a whole number, as .cls files must hold: write class numbers, or put "
    raise data_error(where, rule + 'the names in .json files under "label".')


def _as_label(value: Any) -> float | str | None:
    return value if value is None or isinstance(value, int | float) else str(value)


def load_json(data: bytes) -> dict:
    """Return the entries of a .json member; {} where it is none."""
    try:
        entries = json.loads(data)
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}
