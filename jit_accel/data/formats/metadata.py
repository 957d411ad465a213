"""Labels of a folder's images from metadata.csv, .tsv, .jsonl and .parquet, as HF's `imagefolder` reads them."""

import codecs
import json
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from jit_accel.base.errors import UserError
from jit_accel.data import data_error
from jit_accel.data.formats.columns import (
    LABEL_NAMES,
    Columns,
    features_of,
    find_columns,
    named_column,
    read_labels,
)
from jit_accel.data.formats.label_lists import different_labels, of_items, parsed_lists, split_cells
from jit_accel.data.formats.numbers import numbers_of
from jit_accel.data.formats.scan import FolderScan, OfSplits
from jit_accel.data.formats.split_columns import choose_values, counts_of, split_column

log = logging.getLogger(__name__)

FILE_NAME = "file_name"


class Listed(NamedTuple):
    """Images that metadata files list, and what these say of them."""

    images: pa.ChunkedArray  # relative paths, sorted
    ids: pa.Array | None  # their classes, int64 (N,), or lists of them; None for unlabelled ones
    names: tuple[str, ...]  # of the classes; () for unlabelled ones
    numbers: pa.Table  # for each column of numbers that is asked for a list of them, or null, an image


def listed_in_metadata(
    root: str,
    chosen: OfSplits,
    label_column: str | None,
    renumber: bool = False,
    condition_column: str | None = None,
    vector_columns: Sequence[str] = (),
    label_separator: str | None = None,
) -> Listed:
    """Return the `chosen` images that the metadata files under `root` list, their labels, and their numbers.

    A metadata file speaks for its own folder and those below: its column `file_name` holds paths relative to it. The
    labels come from `label_column`, or from the first column named label, class, ...: whole numbers as they are, text
    by its place among the sorted texts. Without such a column the images are unlabelled, whatever folders they are in.
    Listed files that are no images here are skipped, images that are not listed left out; both are counted and said.
    Not so images of other splits, by the names of folders, or by a column named split.

    UserError if a file cannot be read, lacks columns, gives one image two labels, or fits no image at all.
    """
    scan, first_file = chosen.scan, os.path.join(root, chosen.scan.metadata[0])
    needed = (FILE_NAME, *([label_column] if label_column else LABEL_NAMES), *vector_columns)
    in_brackets = label_column if label_separator is None else None
    tables = [_read(os.path.join(root, name), needed, in_brackets) for name in scan.metadata]
    if label_separator is not None:
        name = named_column(_shared(tables), label_column, "label_column", first_file)
        tables = _with_lists(tables, name, label_separator)
    columns = _find_columns(tables, first_file, label_column, condition_column, vector_columns)
    listed = [_paths(table, name) for table, name in zip(tables, scan.metadata)]
    shown = [_paths(table, name, condition_column) for table, name in zip(tables, scan.metadata) if condition_column]
    are_wanted = [pc.invert(_are_in(chosen.left_out, paths)) for paths in listed]
    tables, listed = _filtered(tables, are_wanted), _filtered(listed, are_wanted)
    are_wanted = _are_of_split(tables, chosen.split, root)
    unwanted = _filtered(listed, map(pc.invert, are_wanted))
    tables, listed = _filtered(tables, are_wanted), _filtered(listed, are_wanted)
    paths = pa.chunked_array(listed, pa.string())
    places = _places(paths, scan.images)
    others = pc.unique(_places(pa.chunked_array([*unwanted, *shown], pa.string()), scan.images).drop_null())
    _report(root, scan, paths, places, len(others))
    is_there = places.is_valid()
    rows, places = _numbers(tables, columns.vectors).filter(is_there), places.filter(is_there).to_numpy()
    kept, first, which = np.unique(places, return_index=True, return_inverse=True)
    images, numbers = scan.images.take(kept), rows.take(first)
    if columns.vectors and not rows.equals(numbers.take(which)):
        rule = f"{first_file} lists images twice, with different numbers: remove one of the rows."
        raise UserError(rule, about="vector_column", value=" ".join(columns.vectors))
    if columns.label is None:
        return Listed(images, None, (), numbers)
    values = _as_one([table.column(columns.label) for table in tables]).filter(is_there)
    feature = features_of(pa.schema([(columns.label, values.type)]))[columns.label]
    columns, feature, found = of_items(columns, feature, [different_labels(values)])
    columns, names = read_labels(feature, found, columns, first_file, label_column, renumber)
    if columns.label is None:
        return Listed(images, None, (), numbers)
    if columns.most_labels is not None:
        by_row = map(columns.label_of, values.to_pylist())
        ids = pa.array([[label for label in labels if label >= 0] for labels in by_row], pa.list_(pa.int64()))
    elif columns.label_ids is not None:
        ids = pa.array(list(columns.label_ids.values()))
        ids = ids.take(pc.index_in(values, value_set=pa.array(list(columns.label_ids), values.type)))
    else:
        ids = values.cast(pa.int64())
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    again = np.flatnonzero(first[which] != np.arange(len(which)))  # rows about images that have one already
    pairs = zip(places[again].tolist(), ids.take(again).to_pylist(), ids.take(first[which][again]).to_pylist())
    if differing := sorted({place for place, now, then in pairs if now != then}):
        rule = f"{first_file} lists {scan.images[differing[0]]} with two different labels"
        rule += f" ({len(differing)} such images): remove one of the rows."
        raise UserError(rule, about="label_column", value=columns.label)
    return Listed(images, ids.take(first), names, numbers)


def _with_lists(tables: list[pa.Table], name: str, separator: str) -> list[pa.Table]:
    """Return the tables with the cells of the label column taken apart."""
    lists = split_cells([table.column(name) for table in tables], separator)
    return [table.set_column(table.column_names.index(name), name, column) for table, column in zip(tables, lists)]


def _as_one(parts: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Return one column of those of several files; numbers in one and text in another are text."""
    if len({of_file.type for of_file in parts}) > 1:
        parts = [of_file.cast(pa.string()) for of_file in parts]
    return pa.chunked_array([chunk for of_file in parts for chunk in of_file.chunks], parts[0].type)


def _numbers(tables: list[pa.Table], names: Sequence[str]) -> pa.Table:
    """Return columns of numbers as lists of them, null where there are none."""
    kind = pa.list_(pa.float64())
    columns = {}
    for name in names:
        parts = [[numbers_of(value) for value in table.column(name).to_pylist()] for table in tables]
        columns[name] = pa.chunked_array([pa.array(part, kind) for part in parts], kind)
    return pa.table({"row": range(sum(map(len, tables)))} | columns).select(list(names))


def _read(file: str, needed: Sequence[str], label_column: str | None = None) -> pa.Table:
    """Return a metadata file, without the columns of which there are several of one name, if none of them is needed.

    In the `label_column` that users name, text in brackets is lists.
    """
    try:
        table = READERS[os.path.splitext(file)[1].lower()](file)
        counts = Counter(table.column_names)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = _foreign_encoding(file) or error
        raise data_error(file, f"cannot be read ({reason}): repair it, save it as UTF-8, or remove it.") from error
    if FILE_NAME not in counts:
        found = ", ".join(table.column_names) or "nothing"
        rule = f"it has no column {FILE_NAME!r} that says which image a row is about, only {found}: rename the column, "
        raise data_error(file, rule + "or rename the file if it is not meant for the images.")
    if not table.num_rows:
        raise data_error(file, "it lists no files: add rows, or remove it.")
    for name in needed:
        if counts[name] > 1:
            raise data_error(file, f"it has two columns named {name!r}: rename or remove one.")
        if counts[name] and pa.types.is_binary(table.schema.field(name).type):  # what Arrow makes of it
            rule = f"its column {name!r} is not in UTF-8 but in another encoding, such as Latin-1: save it as UTF-8."
            raise data_error(file, rule)
    table = table.select([number for number, name in enumerate(table.column_names) if counts[name] == 1])
    if label_column not in table.column_names:
        return table
    try:
        labels = parsed_lists(table.column(label_column))
    except (ValueError, pa.ArrowException) as error:
        raise data_error(file, f"its column {label_column!r} has lists, and {error}: repair the cell.") from error
    return table.set_column(table.column_names.index(label_column), label_column, labels)


def _foreign_encoding(file: str) -> str | None:
    """Return what is wrong with the encoding of a text file, if anything is."""
    data = Path(file).read_bytes() if os.path.isfile(file) else b""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it is in UTF-16"
    try:
        data.decode()
    except UnicodeDecodeError:
        return (
            None if file.lower().endswith(".parquet") else "it is not in UTF-8 but in another encoding, such as Latin-1"
        )
    return None


def _delimiter(file: str) -> str:
    """Return what stands between the columns of a table of this ending; ValueError where the first line differs."""
    usual = "\t" if file.lower().endswith(".tsv") else ","
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        head = opened.readline(2**16).strip()
    for mark in ",;\t|":
        if mark in head and usual not in head and FILE_NAME in [name.strip('" ') for name in head.split(mark)]:
            raise ValueError(f"its columns are separated by {mark!r} and not by {usual!r}, so it has only {head}")
    return usual


def _read_csv(file: str) -> pa.Table:
    return pyarrow.csv.read_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(use_threads=False),  # errors then tell the row
        parse_options=pyarrow.csv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={FILE_NAME: pa.string()}, null_values=[""], strings_can_be_null=True
        ),
    )


def _read_jsonl(file: str) -> pa.Table:
    """By lines and not by Arrow, which stops at a column of mixed types even if nobody needs it."""
    rows = []
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME, ""), str):
                raise ValueError(f'line {number} is not like {{"{FILE_NAME}": "a.png", "label": 3}}')
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):  # numbers and text are text, other mixtures no labels
            if all(value is None or isinstance(value, str | int | float) for value in values):
                columns[name] = pa.array([value if value is None else str(value) for value in values])
            else:
                columns[name] = pa.nulls(len(rows))
    return pa.table(columns)


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": lambda file: pyarrow.parquet.read_table(file, use_threads=False),
}


def _shared(tables: list[pa.Table]) -> list[str]:
    return [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]


def _filtered(some: Iterable, masks: Iterable) -> list:
    return [one.filter(mask) for one, mask in zip(some, masks)]


def _are_in(folders: list[str], paths: pa.Array) -> pa.Array:
    """Return whether each path is in one of the folders, in whatever form of Unicode."""
    of_path = pc.utf8_normalize(pc.replace_substring_regex(paths, "[^/]*$", ""), form="NFC")
    return pc.is_in(of_path, value_set=pc.utf8_normalize(pa.array(folders, pa.string()), form="NFC"))


def _are_of_split(tables: list[pa.Table], wanted: str | None, root: str) -> list[pa.Array]:
    """Return whether each row is of the splits that `wanted` means, by the column that says of what split an image is.

    All rows are, where there is no such column with a word for a split in it; see `choose_splits`.
    """
    name = split_column(features_of(tables[0].select(_shared(tables)).schema))
    found = [table.column(name).cast(pa.string()) for table in tables] if name else []
    counts = counts_of(pa.chunked_array([chunk for column in found for chunk in column.chunks], pa.string()))
    kept = choose_values(counts or {None: sum(map(len, tables))}, wanted, root)
    if kept is None:
        return [np.ones(len(table), bool) for table in tables]
    return [pc.is_in(column, value_set=pa.array(kept, pa.string())) for column in found]


def _places(paths: pa.ChunkedArray, images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the number of each path among the images, null where it is none of them."""
    places = pc.index_in(paths, value_set=images)
    if places.null_count:  # disks and files spell accents in different forms of Unicode
        images, paths = (pc.utf8_normalize(some, form="NFC") for some in (images, paths))
        places = pc.coalesce(places, pc.index_in(paths, value_set=images))
    return places


def _find_columns(
    tables: list[pa.Table], where: str, wanted: str | None, condition: str | None, vectors: Sequence[str]
) -> Columns:
    shared = _shared(tables)
    columns = find_columns(features_of(tables[0].select(shared).schema), FILE_NAME, wanted, where, condition, vectors)
    if columns.label is None and not set(shared).difference({columns.condition, *vectors}).intersection(LABEL_NAMES):
        others = [name for name in shared if name not in (FILE_NAME, columns.condition)]
        others = ", ".join(others) or "no column but " + " and ".join([FILE_NAME, *columns.pictures[1:]])
        rule = "%s has no column of labels (%s): the images train unlabelled; name one with --label_column."
        log.warning(rule, where, others)
    return columns


def _paths(table: pa.Table, metadata: str, column: str = FILE_NAME) -> pa.Array:
    """Return the listed paths relative to the root."""
    folder, column = posixpath.dirname(metadata), named_column(table.column_names, column, "condition_column", metadata)
    try:
        listed = table.column(column).cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise data_error(metadata, f"its column {column!r} holds no paths ({error}): choose another.") from error
    listed = (path and path.replace("\\", "/") for path in listed)
    return pa.array([path and posixpath.normpath(posixpath.join(folder, path)) for path in listed], pa.string())


def listed_paths(root: str, metadata: list[str], images: pa.ChunkedArray, column: str) -> pa.ChunkedArray:
    """Return the path that a column of metadata files has for each of the images, relative to `root`; null for none.

    UserError where one image has two.
    """
    tables = [_read(os.path.join(root, name), (FILE_NAME, column)) for name in metadata]
    listed, values = (
        pa.chunked_array([_paths(table, name, of) for table, name in zip(tables, metadata)], pa.string())
        for of in (FILE_NAME, column)
    )
    path_of: dict[int, str | None] = {}
    for place, path in zip(_places(listed, images).to_pylist(), values.to_pylist()):
        if place is not None and path_of.setdefault(place, path) != path:
            rule = (
                f"{os.path.join(root, metadata[0])} lists {images[place]} with two of them, {path_of[place]} and {path}"
            )
            raise UserError(f"{rule}: remove one of the rows.", about="condition_column", value=column)
    return pa.chunked_array([pa.array([path_of.get(place) for place in range(len(images))], pa.string())])


def _report(
    root: str, scan: FolderScan, paths: pa.ChunkedArray, places: pa.ChunkedArray, num_of_other_splits: int
) -> None:
    where, missing = ", ".join(scan.metadata[:3]), places.null_count
    examples = ", ".join(str(path) for path in paths.filter(places.is_null()).slice(0, 3))
    if missing == len(paths):
        rule = f"none of the {missing} files that {where} lists is an image there (the first: {examples}): "
        raise data_error(root, f"{rule}{FILE_NAME} must be relative to the folder of the metadata file.")
    if missing:
        log.warning("--data_path %s: %d images listed in %s are missing: %s ...", root, missing, where, examples)
    left_out = len(scan.images) - len(pc.unique(places.drop_null())) - num_of_other_splits
    if left_out > 0:
        log.warning("--data_path %s: %d images not listed in %s are left out", root, left_out, where)
