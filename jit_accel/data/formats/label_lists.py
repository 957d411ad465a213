"""Columns whose rows hold lists of labels, for images that have several."""

import ast
import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

AnyColumns = TypeVar("AnyColumns")


def split_cells(columns: Sequence[pa.ChunkedArray], separator: str) -> list[pa.Array | pa.ChunkedArray]:
    """Return columns of text as lists of the labels in each cell: of numbers, where all of them are whole ones.

    A cell that is a JSON list is that; others are cut at the separator, without the spaces around a label. An empty one
    has no label. Columns that are lists already stay.
    """
    found = [None if hasattr(column.type, "value_type") else _lists_in(column, separator) for column in columns]
    labels = [label for rows in found if rows for row in rows for label in row]
    are_numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in labels)
    kind = pa.list_(pa.int64() if are_numbers else pa.string())
    return [
        column if rows is None else pa.array([list(map(int, row)) if are_numbers else row for row in rows], kind)
        for column, rows in zip(columns, found)
    ]


def _lists_in(column: pa.ChunkedArray, separator: str) -> list[list[str]]:
    return [_labels_in(cell or "", separator) for cell in column.cast(pa.string()).to_pylist()]


def _labels_in(cell: str, separator: str) -> list[str]:
    with contextlib.suppress(ValueError):  # else it is a name that begins so
        if (text := cell.strip())[:1] + text[-1:] == "[]":
            return list(map(str, _parsed(text)))
    return [label for part in cell.split(separator) if (label := part.strip())]


def item_of(feature: Any) -> Any:
    """Return the type of a list's items; any other type as it is."""
    return getattr(feature, "feature", feature)


def parsed_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of text as lists where each of its cells has the brackets of one; any other column as it is.

    A cell is JSON or, as pandas writes lists, Python. Raises `ValueError` for one that is no list of labels.
    """
    if not pa.types.is_string(column.type):
        return column
    cells = [cell and cell.strip() for cell in column.to_pylist()]
    if not any(cells) or not all(cell[0] + cell[-1] == "[]" for cell in cells if cell):
        return column
    lists = [_parsed(cell) if cell else None for cell in cells]
    if len({type(label) for labels in lists for label in labels or ()}) > 1:  # as elsewhere in such files
        lists = [labels and list(map(str, labels)) for labels in lists]
    return pa.chunked_array([pa.array(lists)])


def _parsed(cell: str) -> list[str | int]:
    try:
        try:
            labels = json.loads(cell)
        except ValueError:
            labels = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(type(label) in (str, int) for label in labels):
        raise ValueError(f'{cell!r} is no list of labels, such as ["cat", "wet"] or [0, 3]')
    return labels


def different_labels(column: pa.Array | pa.ChunkedArray) -> list:
    """Return the labels that differ in a column; of lists a list of these, and the length of the longest one."""
    if not hasattr(column.type, "value_type") or pa.types.is_dictionary(column.type):
        return pc.unique(column).to_pylist()
    return [pc.unique(pc.list_flatten(column)).to_pylist(), pc.max(pc.list_value_length(column)).as_py() or 0]


def of_items(columns: AnyColumns, feature: Any, parts: list[list]) -> tuple[AnyColumns, Any, set]:
    """Return the columns, the type of the labels, and those that differ in parts of a data set, for `read_labels`.

    Of lists the type is that of the items, and the columns know how long the longest one is.
    """
    if item_of(feature) is feature:
        return columns, feature, set().union(*parts)
    values, lengths = zip(*parts)
    return replace(columns, most_labels=max(1, *lengths)), item_of(feature), set().union(*values)
