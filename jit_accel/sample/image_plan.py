"""The images that are to be made: of which classes, how many, under which numbers and names."""

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


class ImageId(NamedTuple):
    """An image to make. `label` is `num_classes` for an image of no class."""

    number: int
    label: int


@dataclass(frozen=True)
class SamplePlan:
    """`counts` images of `labels`, in ascending order.

    The i-th image of class c has the number i * num_classes + c, whichever classes are chosen; the i-th of no class
    the number i.
    """

    labels: tuple[int, ...]
    counts: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None = None

    @property
    def num_images(self) -> int:
        return sum(self.counts)

    def ids(self) -> list[ImageId]:
        """Return all images in the order of their numbers."""
        return sorted(self.id_of(label, i) for label, count in zip(self.labels, self.counts) for i in range(count))

    def id_of(self, label: int, index: int) -> ImageId:
        """Return the `index`-th image of a class."""
        return ImageId(index if label == self.num_classes else number_of(label, index, self.num_classes), label)

    def some(self, max_classes: int, max_images: int) -> list[tuple[int, list[ImageId]]]:
        """Return labels, evenly spread over the classes, each with its first images: to look at."""
        count = min(len(self.labels), max_classes)
        places = [k * len(self.labels) // count for k in range(count)]
        chosen = [(self.labels[k], min(self.counts[k], max_images)) for k in places]
        return [(label, [self.id_of(label, i) for i in range(most)]) for label, most in chosen]

    def name(self, label: int) -> str:
        """Return the class as people know it."""
        if label == self.num_classes:
            return NO_CLASS
        return self.class_names[label] if self.class_names else str(label)

    def folder(self, label: int) -> str:
        """Return the name of the class's folder, safe on every file system and distinct: the label comes first."""
        if label == self.num_classes:
            return NO_CLASS
        number = f"{label:0{max(3, len(str(self.num_classes - 1)))}d}"
        plain = unicodedata.normalize("NFKD", self.class_names[label] if self.class_names else "")
        name = re.sub(r"[^A-Za-z0-9]+", "-", plain.encode("ascii", "ignore").decode())[:_LONGEST_NAME].strip("-")
        return f"{number}_{name}" if name else number

    def classes(self) -> list[dict]:
        """Return the classes as they stand in samples.json."""
        return [
            {"label": label, "name": self.name(label), "folder": self.folder(label), "num_images": count}
            for label, count in zip(self.labels, self.counts)
        ]


def plan_images(config: SampleConfig, num_classes: int, class_names: Sequence[str] | None) -> SamplePlan:
    """Return the plan that the settings ask for; raise `UserError` for a class that does not exist."""
    labels = tuple(range(num_classes)) or (0,)  # without classes 0 is "no class"
    if config.classes:
        labels = tuple(sorted({label_of(name, num_classes, class_names) for name in _split(config, class_names)}))
        if not labels:
            value = " ".join(config.classes)
            raise UserError("names no class: give some, or leave the flag out.", about="classes", value=value)
    share, rest = divmod(config.num_images or DEFAULT_NUM_IMAGES, len(labels))
    counts = [config.images_per_class or share + (k < rest) for k in range(len(labels))]
    if sum(counts) > MOST_IMAGES:
        raise UserError(
            f"{sum(counts):,} images are more than {MOST_IMAGES:,}: make them in several folders, each with its own "
            "--seed.",
            about="images_per_class",
            value=config.images_per_class,
        )
    kept = [(label, count) for label, count in zip(labels, counts) if count]
    return SamplePlan(*zip(*kept), num_classes, tuple(class_names) if class_names else None)


def _split(config: SampleConfig, class_names: Sequence[str] | None) -> list[str]:
    """Return the names of `--classes`, split at commas unless the commas belong to a class's name."""
    known = {name.lower() for name in class_names or ()}
    parts = [[word] if word.lower() in known else word.split(",") for word in config.classes]
    return [part.strip() for words in parts for part in words if part.strip()]


def label_of(name: str, num_classes: int, class_names: Sequence[str] | None) -> int:
    """Return the label of a class by its name (case does not matter) or number; `num_classes` for "none"."""
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
