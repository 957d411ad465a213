"""Columns of tables that hold images as numbers: nested lists, HF's Array2D and Array3D, or bare bytes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
from datasets import Array2D, Array3D, Value

from jit_accel.base.errors import UserError
from jit_accel.data.formats.columns import Columns
from jit_accel.data.formats.source import Request
from jit_accel.data.reading.arrays import ArrayType


def with_arrays(columns: Columns, features: Mapping[str, Any], request: Request) -> Columns:
    """Return the columns with the types of their arrays: as the features say, or, of bare bytes, as is asked for.

    UserError where a type of bytes is asked for, and the images are none.
    """
    image = _array_type(features[columns.image])
    if request.raw_shape:
        if not _is_binary(kind := features[columns.image]):
            rule = (
                f"the images of {request.path}, its column {columns.image!r}, are no bytes but {kind}: leave the flag "
            )
            rule += "out, or name another column with --image_column."
            raise UserError(rule, about="raw_shape", value=" ".join(map(str, request.raw_shape)))
        image = ArrayType(request.raw_dtype, request.raw_shape)
    shown = None if columns.condition is None else _array_type(features[columns.condition])
    return replace(columns, arrays=(image, shown))


def _array_type(feature: Any) -> ArrayType | None:
    """Return the type of the arrays in a column of this type; None where they are something else, or of any type."""
    if isinstance(feature, Array2D | Array3D):
        return ArrayType(feature.dtype)
    depth = 0
    while hasattr(feature, "feature"):
        feature, depth = feature.feature, depth + 1
    is_number = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))
    return ArrayType(feature.dtype) if depth in (2, 3) and is_number else None


def _is_binary(feature: Any) -> bool:
    kind = feature.dtype if isinstance(feature, Value) else str(feature) if isinstance(feature, pa.DataType) else ""
    return "binary" in kind
