"""Which images are to be made: of which classes, how many, under which numbers and names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jit_accel.base.errors import UserError, nearest
from jit_accel.config.settings import MOST_IMAGES
from jit_accel.model.generation import number_of
from jit_accel.model.labels import find_name
from jit_accel.sample.settings import DEFAULT_NUM_IMAGES, SampleConfig

NO_CLASS = "none"
_LONGEST_NAME = 40


class Item(NamedTuple):
    """An image to make. `label` is `num_classes` for an image of no class."""

    number: int
    label: int


@dataclass(frozen=True)
class Plan:
    """`counts` images of `labels`, in ascending order.

    The i-th image of class c has the number i * num_classes + c, whichever classes are chosen; the i-th of no class
    the number i.
    """

    labels: tuple[int, ...]
    counts: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None = None

    def items(self) -> list[Item]:
        """In order of their numbers."""
        pairs = zip(self.labels, self.counts)
        return sorted(self.item(label, index) for label, count in pairs for index in range(count))

    def item(self, label: int, index: int) -> Item:
        """The `index`-th image of a class."""
        return Item(index if label == self.num_classes else number_of(label, index, self.num_classes), label)

    def some(self, max_classes: int, max_images: int) -> list[tuple[int, list[Item]]]:
        """The first images of some classes, evenly spread over them: to look at."""
        count = min(len(self.labels), max_classes)
        places = [k * len(self.labels) // count for k in range(count)]
        return [
            (self.labels[k], [self.item(self.labels[k], i) for i in range(min(self.counts[k], max_images))])
            for k in places
        ]

    def name(self, label: int) -> str:
        """The class as people know it."""
        if label == self.num_classes:
            return NO_CLASS
        return self.class_names[label] if self.class_names else str(label)

    def folder(self, label: int) -> str:
        """The class as a name that is safe on every file system, and distinct: it begins with the label."""
        if label == self.num_classes:
            return NO_CLASS
        number = f"{label:0{max(3, len(str(self.num_classes - 1)))}d}"
        name = safe_name(self.class_names[label]) if self.class_names else ""
        return f"{number}_{name}" if name else number

    def classes(self) -> list[dict]:
        """What stands in samples.json."""
        return [
            {"label": label, "name": self.name(label), "folder": self.folder(label), "num_images": count}
            for label, count in zip(self.labels, self.counts)
        ]


def plan_images(config: SampleConfig, num_classes: int, class_names: Sequence[str] | None) -> Plan:
    """The plan that the settings ask for.

    Raises:
        UserError: no such class.
    """
    labels = tuple(range(num_classes)) or (0,)  # without classes 0 is "no class"
    if config.classes:
        labels = tuple(sorted({label_of(name, num_classes, class_names) for name in _split(config, class_names)}))
        if not labels:
            raise UserError(
                "names no class: give some, or leave the flag out.",
                about="classes",
                value=f"{' '.join(config.classes)}",
            )
    if config.images_per_class is not None:
        counts = (config.images_per_class,) * len(labels)
    else:
        share, rest = divmod(config.num_images or DEFAULT_NUM_IMAGES, len(labels))
        counts = tuple(share + (k < rest) for k in range(len(labels)))
    if sum(counts) > MOST_IMAGES:
        raise UserError(
            f"{sum(counts):,} images are more than {MOST_IMAGES:,}: make "
            "them in several folders, each with its own --seed.",
            about="images_per_class",
            value=config.images_per_class,
        )
    kept = [(label, count) for label, count in zip(labels, counts) if count]
    return Plan(*zip(*kept), num_classes, tuple(class_names) if class_names else None)


def _split(config: SampleConfig, class_names: Sequence[str] | None) -> list[str]:
    """Also `0,1,2`; names with commas in them stay whole."""
    known = {name.lower() for name in class_names or ()}
    names = []
    for word in config.classes:
        names += [word] if word.lower() in known else [part.strip() for part in word.split(",") if part.strip()]
    return names


def label_of(name: str, num_classes: int, class_names: Sequence[str] | None) -> int:
    """The label of a class by its name (case does not matter) or number; `num_classes` for "none"."""
    names = list(class_names or ())
    if name == NO_CLASS and NO_CLASS not in names:  # though there may be a class "None"
        return num_classes
    if (label := find_name(name, names)) is not None:
        return label
    if name.lower() == NO_CLASS:
        return num_classes
    if num_classes == 0:
        raise UserError("the model knows no classes: leave the flag out.", about="classes", value=name)
    if re.fullmatch(r"\d+", name, re.ASCII) and int(name) < num_classes:
        return int(name)
    rule = f"use 0 to {num_classes - 1}" if num_classes > 1 else "use 0"
    if names:
        rule += f", or a name: {', '.join(names[:10])}" + (", ..." if len(names) > 10 else "")
    raise UserError(f"no such class; {rule}; or none.{nearest(name, names)}", about="classes", value=name)


def safe_name(name: str) -> str:
    """Plain ASCII letters, digits and single dashes of a class name; may be empty."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain)[:_LONGEST_NAME].strip("-")
