"""The columns of a table that are its images and labels, and the meaning of the labels."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Array2D, Array3D, ClassLabel, Features, Image, Value

from jit_accel.base.errors import UserError, nearest
from jit_accel.config.presets import Size
from jit_accel.data import data_error
from jit_accel.data.formats.label_lists import item_of
from jit_accel.data.formats.numbers import vector_of
from jit_accel.data.reading.arrays import ArrayType

log = logging.getLogger(__name__)

IMAGE_CHANNELS = 3  # of a picture that is read as colour
IMAGE_NAMES = ("image", "img", "png", "jpg", "jpeg", "webp", "picture", "photo", "pixel_values", "bytes")
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label", "category", "class_label", "target")
FOLDER = "/"  # in place of a label column: the label is the folder in a tar file that a sample is in
MAX_CLASSES = 1_000_000  # more distinct numbers than this are ids, not classes
_NO_CLASS = (
    "--data_path %s: the column %r is %s, which is no class: the images train unlabelled. Write it as whole numbers or "
    "text, or name another column with --label_column"
)


@dataclass(frozen=True)
class PixelFormat:
    """The numbers that images are decoded to: how many channels, and in what range."""

    channels: int = IMAGE_CHANNELS  # of an image; those of its condition, if it has one, come behind them
    condition_channels: int = IMAGE_CHANNELS
    value_range: tuple[float, float] | None = None  # as float32, in the data's units; None: uint8, 0 to 255

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the numbers."""
        return np.dtype(np.uint8 if self.value_range is None else np.float32)


COLOUR = PixelFormat()


@dataclass(frozen=True)
class Columns:
    """The columns that one row is read by: `image`, `label`, `condition`, `key` and `name` are column names."""

    image: str
    label: str | None = None
    label_key: str | None = None  # where the label column holds JSON objects
    label_ids: dict[str | int, int] | None = None  # the class of each label, where that is not the label itself
    raw_size: Size | None = None  # where images are bare numbers (C, H, W), as `pixels` says
    key: str | None = None  # where `content_key` was stored
    name: str | None = None  # where names are not stored with the images
    any_image: bool = False  # a sample of a tar file without `image` may have one of another ending
    left_out: frozenset[str] = frozenset()  # folders in tar files with samples of other splits
    split: tuple[str, tuple[str | None, ...]] | None = None  # a column, and its values in the rows that are read
    joined: frozenset[str] | None = None  # endings like "seg.png" of pictures that are no samples; None: all with dots
    condition: str | None = None  # of a picture that goes with the image
    vectors: tuple[str, ...] = ()  # columns of numbers
    vector_sizes: tuple[int, ...] = ()  # how many numbers a row has in each
    most_labels: int | None = None  # of a row, where the label column holds lists of them
    pixels: PixelFormat = COLOUR  # to which pictures are decoded
    arrays: tuple[ArrayType | None, ArrayType | None] = (None, None)  # of the image and the condition, if no files

    @property
    def all(self) -> list[str]:
        """Return the names of the columns that are read."""
        names = (self.image, self.label, self.condition, self.key, self.name, self.split and self.split[0])
        return list(dict.fromkeys(column for column in (*names, *self.vectors) if column is not None))

    @property
    def pictures(self) -> list[str]:
        """Return the names of the columns of pictures."""
        return [self.image] if self.condition is None else [self.image, self.condition]

    @property
    def channels(self) -> int:
        """Return the channels of what a row is decoded to, the image's first."""
        return self.pixels.channels + (0 if self.condition is None else self.pixels.condition_channels)

    @property
    def facts_type(self) -> np.dtype:
        """The type of what is read of an image beside its pixels: its class or classes, and its numbers."""
        return facts_type(sum(self.vector_sizes), self.most_labels)

    def facts_of(self, row: Mapping[str, Any]) -> Any:
        """Return a value of this type. Raises `ValueError` for a row without the numbers that it should have."""
        label = self.label_of(row.get(self.label))
        if not self.vectors:
            return label if self.most_labels is None else (label,)
        return label, vector_of((name, row.get(name), n) for name, n in zip(self.vectors, self.vector_sizes))

    def chosen(self, table: pa.Table | pa.RecordBatch) -> pa.Table | pa.RecordBatch:
        """Return the rows of the splits that are read."""
        if self.split is None:
            return table
        name, values = self.split
        return table.filter(pc.is_in(table[name].cast(pa.string()), value_set=pa.array(values, pa.string())))

    def image_of(self, value: Any) -> tuple[bytes | str | None, str]:
        """Take the undecoded value of the image column apart into (bytes or path, name to report)."""
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path") or ""
            return (path or None) if data is None else data, path
        return value, value if isinstance(value, str) else ""

    def label_of(self, value: Any) -> int | list[int]:
        """Return the class of one value of the label column; -1 where there is none.

        Of a column of lists it is the classes, filled up by -1. Raises `ValueError` for more than there may be.
        """
        if self.label is None:
            return 0
        if self.label_key is not None:
            value = value.get(self.label_key) if isinstance(value, dict) else None
        if self.most_labels is not None:
            one_each = replace(self, label_key=None, most_labels=None)
            found = list(dict.fromkeys(map(one_each.label_of, value or ())))
            if len(found) > self.most_labels:
                raise ValueError(f"it has {len(found)} labels, and none had more than {self.most_labels}")
            return [*found, *[-1] * (self.most_labels - len(found))]
        if self.label_ids is not None:
            return self.label_ids.get(value, -1)
        return -1 if value is None else int(value)


def facts_type(num_numbers: int, most_labels: int | None) -> np.dtype:
    """Return the type of images' classes, int64, one or `most_labels`, and of so many numbers beside them."""
    if not num_numbers and most_labels is None:
        return np.dtype(np.int64)
    label = ("label", np.int64, () if most_labels is None else (most_labels,))
    return np.dtype([label, ("vectors", np.float64, (num_numbers,))] if num_numbers else [label])


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the columns as HF datasets describes them, or by Arrow's type where it knows none like it."""
    found = {}
    for field in schema:
        try:
            found |= Features.from_arrow_schema(pa.schema([field], schema.metadata))
        except ValueError:
            found[field.name] = field.type
    return found


def find_columns(
    features: Mapping[str, Any],
    image_column: str | None,
    label_column: str | None,
    where: str,
    condition_column: str | None = None,
    vector_columns: Sequence[str] = (),
) -> Columns:
    """Choose the image column and the label column, if any, by the user's names, else by type, else by name.

    UserError if a named column does not exist or holds something else, or no image column can be recognised.
    """
    names = ", ".join(features)
    image_column, label_column, condition, *vectors = (
        None if wanted is None else named_column(features, wanted, about, where)
        for about, wanted in (
            ("image_column", image_column),
            ("label_column", label_column),
            ("condition_column", condition_column),
            *(("vector_column", name) for name in vector_columns),
        )
    )
    everything, features = features, {name: kind for name, kind in features.items() if name != condition}
    if condition is not None and condition in (image_column, label_column):
        rule = "is the column of the images or of the labels already: choose another."
        raise UserError(rule, about="condition_column", value=condition)
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    arrays = [name for name, feature in features.items() if isinstance(feature, Array2D | Array3D)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    by_name = [name for name in IMAGE_NAMES if name in features and name not in classes]
    guesses = [*(name for name in by_name if name in typed), *typed, *by_name, *arrays, None]
    image = image_column or guesses[0]
    if image is None:
        rule = f"none of the columns ({names}) is recognisable as the image: name it with --image_column."
        raise data_error(where, rule)
    named = [name for name in LABEL_NAMES if name in features and name not in (image, *vectors)]
    classes = [name for name in classes if name not in vectors]
    kinds = {name: kind for name in (*named, *classes) if (kind := label_kind(features[name]))}
    label = label_column or min(kinds, key=lambda name: kinds[name] == "float", default=None)  # floats may be scores
    is_image = not isinstance(features[image], pa.DataType)  # as which HF has no type
    kind = label and label_kind(item_of(features[label]) if label_column else features[label])
    is_label = label is None or (label != image and kind is not None)
    is_condition = condition is None or _may_be_pictures(everything[condition])
    for about, column, is_fit, rule in (
        ("image_column", image, is_image, "images are JPEG, PNG, ... files as bytes"),
        ("label_column", label, is_label, "labels are class labels, whole numbers or text"),
        ("condition_column", condition, is_condition, "conditions are JPEG, PNG, ... files as bytes, or their paths"),
        *(
            ("vector_column", v, has_numbers(everything[v]), "numbers are floats, whole numbers or lists")
            for v in vectors
        ),
    ):
        if not is_fit:
            rule = f"its type is {everything[column]}; {rule}: choose another of the columns {names}."
            raise UserError(rule, about=about, value=column)
    if label is None and named:
        log.warning(_NO_CLASS, where, named[0], features[named[0]])
    return Columns(image, label, condition=condition, vectors=tuple(vectors))


def named_column(names: Iterable[str], wanted: str, about: str, where: str) -> str:
    """Return the column of this name, in whatever form of Unicode; UserError if there is none."""
    spelled = {unicodedata.normalize("NFC", name): name for name in names}
    if wanted in spelled.values():
        return wanted
    if (found := spelled.get(unicodedata.normalize("NFC", wanted))) is None:
        rule = f"{where} has no such column; choose from {', '.join(names)}.{nearest(wanted, names)}"
        raise UserError(rule, about=about, value=wanted)
    return found


def has_numbers(feature: Any) -> bool:
    """Return True for a type whose values may be numbers, or lists of them; text may be, too."""
    return label_kind(item_of(feature)) is not None


def _may_be_pictures(feature: Any) -> bool:
    """Return whether a column of this type may hold encoded pictures, or the paths of such."""
    if isinstance(feature, Value):
        return any(word in feature.dtype for word in ("string", "binary"))
    return isinstance(feature, Image) or (isinstance(feature, Mapping) and bool(feature.keys() & {"bytes", "path"}))


def label_kind(feature: Any) -> str | None:
    """Return the kind of labels of type `feature`: "class", "int", "float" or "text"; None where they are no labels."""
    if isinstance(feature, ClassLabel):
        return "class"
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if "int" in dtype or dtype == "bool":
        return "int"
    if "float" in dtype or "decimal" in dtype:
        return "float"
    return "text" if "string" in dtype else None


def read_labels(
    feature: Any, values: Iterable, columns: Columns, where: str, asked: str | None = None, renumber: bool = False
) -> tuple[Columns, tuple[str, ...]]:
    """Return the columns with the classes of labels, and the names of the classes, () where there are no values.

    `feature` is the type of the labels, `values` holds all that differ. Floats that are no whole numbers are no labels.
    `renumber`: numbers that occur are numbered 0, 1, ...; else those that do not are warned of. UserError if labels are
    missing or negative, text and numbers are mixed, numbers are ids and not classes, or the `asked` column has none.
    """
    if columns.label is None:
        return columns, ("image",)
    kind, values = label_kind(feature), [None if value != value else value for value in values]  # NaN
    if any(kind == "float" and value is not None and not float(value).is_integer() for value in values):
        if asked:
            rule = f"its type is {feature}, and not all are whole numbers: choose another column."
            raise UserError(rule, about="label_column", value=asked)
        log.warning(_NO_CLASS, where, columns.label, f"{feature} with fractions")
        return replace(columns, label=None), ("image",)
    numbers = [value for value in values if value is not None and not isinstance(value, str)]
    odd = [value for value in values if isinstance(value, str) != (kind == "text")]
    least, largest = min(numbers, default=0), max(numbers, default=0)
    problems = {
        f"some images of {where} have no label: label or remove them, or choose another column.": None in values,
        f"no image of {where} has a label there: choose another column.": not values and columns.most_labels,
        f"in {where} some labels are text and others are numbers ({odd[:1]} is no "
        f"{'text' if kind == 'text' else 'number'}): write all in one type.": odd,
        f"{where} has the label {least}; labels are 0, 1, 2, ... (-1 marks unlabelled images, as in test splits): "
        "remove these images or choose another column.": least < 0,
        f"{where} has the label {largest}, which looks like an id and not like one of at most {MAX_CLASSES:,} classes: "
        "choose another column.": largest >= MAX_CLASSES,
        f"{where} has the label {largest}, but only {getattr(feature, 'num_classes', 0)} class names: "
        "correct the data.": kind == "class" and values and largest >= feature.num_classes,
    }
    for rule, is_there in problems.items():
        if is_there:
            raise UserError(rule, about="label_column", value=columns.label_key or columns.label)
    if kind == "text":
        label_ids, names = named_classes(values, where)
        return replace(columns, label_ids=label_ids), names
    names = tuple(feature.names) if kind == "class" else numbered_classes(int(largest) + 1 if values else 0)
    found = sorted({int(value) for value in values})
    if renumber and values:
        return replace(columns, label_ids={n: i for i, n in enumerate(found)}), tuple(names[n] for n in found)
    if values and len(found) < len(names):
        unused = [names[n] for n in sorted(set(range(len(names))).difference(found))]
        rule = "--data_path %s: no image is of %d of the %d classes (%s%s), and samples of these will be noise: "
        rule += "--renumber_labels leaves them out"
        log.warning(rule, where, len(unused), len(names), ", ".join(unused[:5]), ", ..." * (len(unused) > 5))
    return columns, names


def named_classes(spellings: Iterable[str], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the class of each spelling, and the names: numbers in their order, else sorted by text.

    A name is one class in whatever form of Unicode it is spelled.
    """
    spellings = list(spellings)
    are_numbers = all(re.fullmatch(r"-?\d{1,99}", text) for text in spellings)
    spellings.sort(key=lambda text: (int(text) if are_numbers else 0, text))
    names = tuple(dict.fromkeys(unicodedata.normalize("NFC", text) for text in spellings))
    ids = {name: i for i, name in enumerate(names)}
    if are_numbers and len(names) > 1 and (other := next((name for name in names if int(name) != ids[name]), None)):
        rule = "--data_path %s: the classes' names are numbers, but not those of the classes: class %d is %r: use names"
        log.warning(rule, where, ids[other], other)
    return {text: ids[unicodedata.normalize("NFC", text)] for text in spellings}, names


def numbered_classes(count: int) -> tuple[str, ...]:
    """Return the names of classes that are bare numbers: "0", "1", ..."""
    return tuple(map(str, range(count)))
