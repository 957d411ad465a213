"""Columns whose rows hold lists of labels, for images that have several."""

from dataclasses import replace
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

AnyColumns = TypeVar("AnyColumns")


def item_of(feature: Any) -> Any:
    """Return the type of a list's items; any other type as it is."""
    return getattr(feature, "feature", feature)


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
