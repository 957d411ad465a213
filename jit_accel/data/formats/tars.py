"""WebDataset: tar files whose neighbouring members with one stem are one sample (0001.jpg, 0001.cls).

HF's own reader decodes all members, of which any that is broken ends the reading, and skips rows by reading them.
"""

import itertools
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from datasets.packaged_modules.webdataset.webdataset import IMAGE_EXTENSIONS

from jit_accel.base.errors import UserError, nearest
from jit_accel.data.formats.columns import FOLDER, Columns, named_classes, read_labels
from jit_accel.data.formats.numbers import Tally, Vectors, numbers_of, tally_of, vectors_of_tallies
from jit_accel.data.formats.source import Request, Source, fingerprint_of, source_of, table_images
from jit_accel.data.formats.tar_samples import IMAGE_KEYS, is_image, joined_endings, label_in, load_json, samples_in
from jit_accel.data.reading import servers
from jit_accel.data.reading.arrays import ARRAY_EXTENSIONS
from jit_accel.data.reading.images import Stream
from jit_accel.data.reading.shards import Shard, at_hand, find_shards, remembered
from jit_accel.data.reading.splits import ALL, TRAIN, choose_folders, choose_splits, has_split_word

log = logging.getLogger(__name__)

JSON_LABELS = ("label", "class", "cls", "class_id")
_MOST_SAMPLES = 20  # that are looked at to find the endings


def open_tars(request: Request, format: str = "webdataset", shards: Sequence[Shard] = ()) -> Source:
    """Open .tar files (a file, a glob, a folder, URLs; or `shards`), as a stream unless `streaming` is False.

    `--label_column` is the ending of the labels (cls, by default), or their name in .json files (label or class);
    `--condition_column` the ending of pictures that go with the images, such as cond.png. UserError for no images in
    them, and labels that are not whole numbers from 0.
    """
    split = ALL
    request.refuse("condition_path", reason="is tar files, whose conditions --condition_column names")
    if not shards:
        shards, split = find_shards(request.path, ".tar", request.split)
    asked = request.image_column
    joined, condition = None if asked and "." in asked else joined_endings(shards[0]), request.condition_column
    if joined is not None and condition:
        joined |= {condition.lstrip("."), "." + condition.lstrip(".")}
    stem, sample = _first_sample(shards[0], joined, condition)
    columns = replace(_find_columns(sample, request), joined=joined)
    _report_unread(sample, columns, request.path)
    for about, key in zip(("image_column", "condition_column"), columns.pictures):
        if "." + (ending := key.rsplit(".", 1)[-1].lower()) not in ARRAY_EXTENSIONS and ending not in IMAGE_EXTENSIONS:
            rule = f"the members .{key} of {request.path} are no images: choose another ending."
            raise UserError(rule, about=about, value=key)
    counts, values, kind, folders = _listed_counts(shards, columns, stem, sample), set(), Value("int64"), {}
    if counts is None:
        columns, counts, values, folders = _scan(shards, columns, split, request.path)
        if any(value is not None and (isinstance(value, str) or not float(value).is_integer()) for value in values):
            kind, values = Value("string"), {value if value is None else str(value) for value in values}
    else:
        choose_splits({TRAIN: sum(counts)}, split, request.path)
    if columns.label == FOLDER:
        columns, names = _classes_of_folders(folders, columns, request.path)
    else:
        asked, renumber = request.label_column, request.renumber_labels
        columns, names = read_labels(kind, values, columns, request.path, asked, renumber)
    columns, vectors = _with_numbers(shards, columns, request.path)
    identity = fingerprint_of(["webdataset", str(sum(counts)), *request.other_split], shards)
    if request.streaming is False:
        images = table_images(_load(shards, columns, kind, identity), columns)
    else:
        images = Stream(tuple(shards), partial(_rows, columns), columns, np.array(counts, np.int64))
    return source_of(request.path, format, images, names, identity, vectors=vectors)


def _report_unread(sample: dict[str, bytes], columns: Columns, where: str) -> None:
    """Say which members of the samples are not read, by those of the first one."""
    joined = {key for key in columns.joined or () if not key.startswith(".")}
    if pictures := ", ".join(f".{key}" for key in sorted(joined.difference(columns.pictures))):
        rule = "--data_path %s: samples have several pictures; .%s is read and %s is not: --image_column chooses"
        log.warning(rule, where, columns.image, pictures)
    used = {columns.image, columns.label, *(name.partition(".")[0] for name in columns.vectors)}
    others = [key for key in sample if key not in used and not is_image(key)]
    if others and columns.label == FOLDER:
        table = next((key for key in others if key.lower() == "json"), None)
        found = f" (.{table} has {', '.join(load_json(sample[table])) or 'no entries'})" if table else ""
        rule = "--data_path %s: %s%s is not read: labels come from .cls files, from one of %s in .json files, or from "
        rule += "folders; --label_column names another entry"
        log.warning(rule, where, ", ".join(f".{key}" for key in others), found, ", ".join(JSON_LABELS))


def _first_sample(shard: Shard, joined: frozenset[str] | None, condition: str | None) -> tuple[str, dict[str, bytes]]:
    """Return the stem of the first sample with an image, or of the very first, and its members by their endings.

    It has a `condition`, where one of those with images has.
    """
    with at_hand(shard) as path:
        samples = itertools.islice(samples_in(path, joined), _MOST_SAMPLES)
        first = next(samples, ("", {}))
        pictured = (found for found in itertools.chain([first], samples) if any(map(is_image, found[1])))
        if condition is None:
            return next(pictured, first)
        pictured, ending = list(pictured), condition.lstrip(".").lower()
    return next((found for found in pictured if ending in map(str.lower, found[1])), [*pictured, first][0])


def _find_columns(sample: dict[str, bytes], request: Request) -> Columns:
    """Choose the endings of the images and the labels; UserError if there is no such member."""

    def spelled(key: str) -> str | None:  # in whatever case
        return key if key in sample else next((other for other in sample if other.lower() == key.lower()), None)

    keys = ", ".join(f".{key}" for key in sample) or "nothing"
    asked, condition = request.image_column, request.condition_column
    if condition is not None:
        named, condition = condition, spelled(condition.lstrip("."))
        if condition is None:
            rule = f"the first sample of {request.path} consists of {keys}: name the ending of the conditions."
            raise UserError(rule + nearest(named, sample), about="condition_column", value=named)
        sample = {key: data for key, data in sample.items() if key != condition}
    image = next(filter(None, map(spelled, [asked] if asked else IMAGE_KEYS)), None)
    if asked is None and len(pictures := [key for key in sample if is_image(key)]) == 1:
        (image,) = pictures
    if image is None:
        rule = f"the first sample of {request.path} consists of {keys}: name the ending of the images."
        raise UserError(rule + nearest(asked or "", sample), about="image_column", value=asked or "(not given)")
    wanted, classes, table, label, label_key = request.label_column, spelled("cls"), spelled("json"), None, None
    # Where there are several pictures, as of a photo and its mask, one does not stand for the other.
    any_image = asked is None and sum(key.lower() in IMAGE_KEYS for key in sample) == 1
    if classes and (wanted or "cls").lower() == "cls":
        label = classes
    elif table:
        entries = load_json(sample[table])
        label_key = next((key for key in ([wanted] if wanted else JSON_LABELS) if key in entries), None)
        label = table if label_key is not None else None
        keys += f" (in .json: {', '.join(entries)})"
    if wanted is not None and label is None:
        rule = f"the first sample of {request.path} consists of {keys}: choose from these."
        raise UserError(rule, about="label_column", value=wanted)
    entries = load_json(sample[table]) if table else {}
    for name in request.vector_column:
        if name not in entries:
            rule = f"numbers are entries of .json files, and that of the first sample of {request.path} has "
            rule += f"{', '.join(entries) or 'none'}: choose from these.{nearest(name, entries)}"
            raise UserError(rule, about="vector_column", value=name)
    more = {"condition": condition, "vectors": tuple(f"{table}.{name}" for name in request.vector_column)}
    if wanted is not None and isinstance(entries.get(label_key), list):
        more["most_labels"] = 0  # until all are read
    return Columns(image, label or FOLDER, label_key, any_image=any_image, **more)


def _with_numbers(shards: Sequence[Shard], columns: Columns, where: str) -> tuple[Columns, Vectors | None]:
    """Return the columns with how many numbers each has, and their statistics, from all samples, read now or before."""

    def look(shard: Shard) -> list[Tally]:
        with at_hand(shard) as path:
            rows = [numbers for _, (image, *_), _, numbers in _read(columns, path, has_bytes=False) if image]
        return [tally_of([row[name] for row in rows]) for name in columns.vectors]

    if not columns.vectors:
        return columns, None
    joined = columns.joined if columns.joined is None else sorted(columns.joined)
    kind = f"tar numbers {columns.vectors} {columns.image} {columns.any_image} {joined} {sorted(columns.left_out)}"
    names = [name.partition(".")[2] for name in columns.vectors]
    vectors = vectors_of_tallies(names, remembered(kind, shards, look), where)
    return replace(columns, vector_sizes=vectors.sizes), vectors


def _classes_of_folders(folders: dict[str, str], columns: Columns, where: str) -> tuple[Columns, tuple[str, ...]]:
    """Return the columns with the classes of folders, as of a folder on disk that is the one around all images.

    `folders`: each as it is without those that name splits.
    """
    around = posixpath.commonpath(folders.values() or [""])
    below = {folder: inner[len(around) :].strip("/").partition("/")[0] for folder, inner in folders.items()}
    names = {folder: name for folder, name in below.items() if name}
    classes, found = named_classes(set(names.values()), where) if len(set(names.values())) > 1 else ({}, ())
    if not found or len(names) < len(below):
        if found:
            log.warning("--data_path %s: some images lie beside the class folders: all train unlabelled", where)
        return replace(columns, label=None), ("image",)
    log.warning("--data_path %s: the classes are the folders in the tar files: %s", where, ", ".join(found[:10]))
    return replace(columns, label_ids={folder: classes[name] for folder, name in names.items()}), found


def _listed_counts(shards: Sequence[Shard], columns: Columns, stem: str, sample: dict[str, bytes]) -> np.ndarray | None:
    """Return the images of each remote file as listed beside them, where no label has to be read to know its class.

    `sizes.json` maps file names to numbers; `index.json` of wids is {"shardlist": [{"url": ..., "nsamples": ...}]}.
    """
    data = sample.get(columns.label)
    is_text = (
        "/" in stem
        if data is None or has_split_word(stem)
        else isinstance(label_in(data, columns, str(shards[0])), str | list)
    )
    if is_text or not shards[0].is_remote:
        return None
    folders, query = {shard.url.partition("?")[0].rpartition("/")[0] for shard in shards}, shards[0].url.partition("?")
    for name in ("sizes.json", "index.json") if len(folders) == 1 else ():
        counts = _read_counts(f"{min(folders)}/{name}" + "".join(query[1:]))
        if counts is None:
            continue
        missing = next((shard for shard in shards if type(counts.get(shard.name)) is not int), None)
        if missing is None:
            return np.array([counts[shard.name] for shard in shards], np.int64)
        log.warning("%s beside %s does not say how many images it has, and is not used", name, missing)
    rule = "--data_path: %d tar files are fetched once to count their images, since no sizes.json that lists them, as "
    log.warning(rule + '{"%s": 1000}, lies beside them', len(shards), shards[0].name)
    return None


def _read_counts(url: str) -> dict[str, int] | None:
    files, inside = servers.file_system(url)
    try:
        entries = json.loads(servers.patiently(lambda: files.cat_file(inside), url, servers.OPENING_PATIENCE_S))
    except (UserError, ValueError):  # there is none, or it is another's
        return None
    if isinstance(entries, dict) and isinstance(entries.get("shardlist"), list):
        shards = [shard for shard in entries["shardlist"] if isinstance(shard, dict)]
        return {servers.file_name(str(shard.get("url"))): shard.get("nsamples") for shard in shards}
    return entries if isinstance(entries, dict) else None


def _scan(
    shards: Sequence[Shard], columns: Columns, split: str | None, where: str
) -> tuple[Columns, list[int], set, dict[str, str]]:
    """Read the tars' headers, now or before: what is in the splits that `split` means, by the folders in the tars.

    Returns the columns, which know of folders that are left out; the samples of each file; the different labels; and
    the folders with images, as `choose_folders` does.
    """
    joined = columns.joined if columns.joined is None else sorted(columns.joined)
    kind = f"tar folders {columns.image} {columns.any_image} {columns.label} {columns.label_key} {joined}"
    kind += " lists" * (columns.most_labels is not None)
    found = remembered(kind, shards, lambda shard: _scan_one(shard, columns))
    sizes: Counter = Counter()
    for facts in found:
        sizes.update({folder: count for folder, (count, *_) in facts.items()})
    kept, rest = choose_folders({folder + "/" if folder else "": n for folder, n in sizes.items()}, split, where)
    choose_splits({TRAIN: len(sizes)}, rest, where)
    kept = {folder.removesuffix("/"): inner.removesuffix("/") for folder, inner in kept.items()}
    if left_out := sizes.keys() - kept.keys():
        columns = replace(columns, left_out=frozenset(left_out))
    found = [{folder: of_folder for folder, of_folder in facts.items() if folder in kept} for facts in found]
    _report_lacking(shards, found)
    labels = [label for facts in found for _, labels, _, _ in facts.values() for label in labels]
    if columns.most_labels is not None:
        columns = replace(columns, most_labels=max(1, *map(len, labels)))
        labels = itertools.chain(*labels)
    pictured = {folder for facts in found for folder, (count, _, lacking, _) in facts.items() if count > lacking}
    counts = [sum(count for count, *_ in facts.values()) for facts in found]
    return columns, counts, set(labels), {folder: inner for folder, inner in kept.items() if folder in pictured}


def _report_lacking(shards: Sequence[Shard], found: Sequence[dict]) -> None:
    lacking = sum(lacking for facts in found for _, _, lacking, _ in facts.values())
    if lacking:
        samples = ((shard, example) for shard, facts in zip(shards, found) for *_, example in facts.values() if example)
        rule, count = "--data_path: %d of %d samples have no image and count as bad ones, as %s in %s", 0
        count = sum(count for facts in found for count, *_ in facts.values())
        shard, example = next(samples)
        log.warning(rule, lacking, count, example, shard)


def _scan_one(shard: Shard, columns: Columns) -> dict[str, list]:
    """Return of each folder how many samples it has, the labels of those with images, how many lack one, and which."""
    found: dict[str, tuple] = {}
    with at_hand(shard) as path:
        for stem, (image, *_), label, _ in _read(columns, path, has_bytes=False):
            folder = _folder_of(stem)
            count, labels, lacking, example = found.get(folder, (0, {}, 0, ""))
            if image is None:
                lacking, example = lacking + 1, example or stem
            if label is not None or (columns.label is not None and image is not None):
                labels[label if columns.most_labels is None else tuple(label or ())] = None
            found[folder] = count + 1, labels, lacking, example
    return {folder: [count, list(labels), *rest] for folder, (count, labels, *rest) in found.items()}


def _folder_of(stem: str) -> str:
    return posixpath.dirname(posixpath.normpath(stem)).lstrip("/")


def _load(shards: Sequence[Shard], columns: Columns, kind: Value, version: str) -> Dataset:
    """Return all samples as a table in the cache of HF datasets, which is made anew for each `version`."""
    features = {name: Image(decode=False) for name in columns.pictures}
    if columns.label is not None:
        kind = kind if columns.most_labels is None else List(kind)
        features[columns.label] = kind if columns.label_key is None else {columns.label_key: kind}
    features |= {name: List(Value("float64")) for name in columns.vectors}
    states = [shard.identity() for shard in shards]
    how = {"shards": list(shards), "columns": columns, "version": (version, *map(str, states))}
    return Dataset.from_generator(_all_rows, features=Features(features), gen_kwargs=how)


def _all_rows(shards: list[Shard], columns: Columns, version: tuple[str, ...]) -> Iterator[dict]:
    for shard in shards:
        with at_hand(shard) as path:
            yield from _rows(columns, path)


def _rows(columns: Columns, file: str, _: int = 0, start: int = 0) -> Iterator[dict]:
    """Yield the rows of a tar file from number `start` on, with pictures, label and numbers alone."""
    for _, pictures, label, numbers in _read(columns, file, start):
        row = dict(zip(columns.pictures, pictures)) | numbers
        if columns.label is not None:
            label = [_as_known(one, columns) for one in label] if isinstance(label, list) else _as_known(label, columns)
            row[columns.label] = label if columns.label_key is None else {columns.label_key: label}
        yield row


def _as_known(label: float | str | None, columns: Columns) -> int | str | None:
    """Return a label as it is known: as text, where some labels are."""
    if not isinstance(label, int | float):
        return label
    return int(label) if columns.label_ids is None or label in columns.label_ids else str(label)


def _read(
    columns: Columns, file: str, start: int = 0, has_bytes: bool = True
) -> Iterator[tuple[str, list[dict | None], float | str | None, dict[str, list[float] | None]]]:
    """Yield (stem, [image, condition, where there are such], label, numbers) of each sample from number `start` on."""
    places = [(name, *name.split(".", 1)) for name in columns.vectors]

    def is_wanted(number: int, key: str) -> bool:
        is_told = key == columns.label or any(key == table for _, table, _ in places)
        return number >= start and (is_told or (has_bytes and (is_image(key) or key in columns.pictures)))

    samples = samples_in(file, columns.joined, is_wanted)
    if columns.left_out:
        samples = ((stem, sample) for stem, sample in samples if _folder_of(stem) not in columns.left_out)
    for stem, sample in itertools.islice(samples, start, None):
        image = columns.image if columns.image in sample else None
        if image is None and columns.any_image:
            image = next((key for key in sample if key.lower() in IMAGE_KEYS and key != columns.condition), None)
        data, label = sample.get(columns.label), None
        if columns.label == FOLDER:
            label = _folder_of(stem) if image else None
        elif data is not None:
            label = label_in(data, columns, f"{file}, {stem}.{columns.label}")
        entries = {table: load_json(sample.get(table, b"")) for table in {table for _, table, _ in places}}
        numbers = {name: numbers_of(entries[table].get(key)) for name, table, key in places}
        found = [image, *(key if key in sample else None for key in columns.pictures[1:])]
        yield stem, [key and {"bytes": sample[key], "path": f"{stem}.{key}"} for key in found], label, numbers
