"""The images to make, under which numbers and names, and the folder, begun and continued, that is theirs alone."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jit_accel.base.errors import UserError, changed_settings, nearest
from jit_accel.base.image_rows import legible
from jit_accel.config.groups import MOST_IMAGES
from jit_accel.data.formats.scan import SAMPLES_RECORD
from jit_accel.model.call_arguments import find_name
from jit_accel.model.generation import number_of
from jit_accel.sample.settings import DEFAULT_NUM_IMAGES, SampleConfig

NO_CLASS = "none"
VERSION = 1


class ImageId(NamedTuple):
    """An image to make. `label` is `num_classes` for an image of no class, and larger for one of several classes."""

    number: int
    label: int


@dataclass(frozen=True)
class SamplePlan:
    """`counts` images of `labels`, in ascending order.

    The i-th image of class c has the number i * num_classes + c, whichever are chosen; that of no class, or of several
    (see `label_of_several`), the number i.
    """

    labels: tuple[int, ...]
    counts: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    names: tuple[str, ...] = ()  # of the pictures that the images are made from, in turn

    @property
    def num_images(self) -> int:
        return sum(self.counts)

    def ids(self) -> list[ImageId]:
        """Return all images in the order of their numbers."""
        return sorted(self.id_of(label, i) for label, count in zip(self.labels, self.counts) for i in range(count))

    def id_of(self, label: int, index: int) -> ImageId:
        """Return the `index`-th image of a class."""
        return ImageId(index if label >= self.num_classes else number_of(label, index, self.num_classes), label)

    def index_of(self, image: ImageId) -> int:
        """Return the place of an image among those of its class."""
        return image.number if image.label >= self.num_classes else image.number // self.num_classes

    def file_name(self, image: ImageId) -> str:
        """Return the name of an image's file, without ending: its number, and the name of what it is made from."""
        name = _plain(self.names[self.index_of(image) % len(self.names)]) if self.names else ""
        return f"{image.number:06d}{'_' * bool(name)}{name}"

    def some(self, max_classes: int, max_images: int) -> list[tuple[int, list[ImageId]]]:
        """Return labels, evenly spread over the classes, each with its first images: to look at."""
        count = min(len(self.labels), max_classes)
        places = [k * len(self.labels) // count for k in range(count)]
        chosen = [(self.labels[k], min(self.counts[k], max_images)) for k in places]
        return [(label, [self.id_of(label, i) for i in range(most)]) for label, most in chosen]

    def name(self, label: int) -> str:
        """Return the class as people know it."""
        names = self.class_names or range(self.num_classes)
        if label > self.num_classes:
            return "+".join(str(names[one]) for one in classes_of(label, self.num_classes))
        return NO_CLASS if label == self.num_classes else str(names[label])

    def legible(self, label: int) -> str:
        """Return the class as it can be drawn."""
        return legible(self.name(label), label)

    def folder(self, label: int) -> str:
        """Return the name of the class's folder, safe on every file system and distinct: the label comes first."""
        if label == self.num_classes:
            return NO_CLASS
        labels = classes_of(label, self.num_classes)
        number = "+".join(f"{one:0{max(3, len(str(self.num_classes - 1)))}d}" for one in labels)
        name = _plain(" ".join(self.class_names[one] for one in labels) if self.class_names else "")
        return f"{number}_{name}" if name else number

    def classes(self) -> list[dict]:
        """Return the classes as they stand in samples.json."""
        return [
            {"label": label, "name": self.name(label), "folder": self.folder(label), "num_images": count}
            for label, count in zip(self.labels, self.counts)
        ]


def _plain(name: str) -> str:
    """Return a name that is safe on every file system: its letters, with their accents, and numbers."""
    plain = unicodedata.normalize("NFC", name)
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in plain).split()
    # a file system's 255 bytes hold 40 of any
    return "-".join(word for word in words if any(map(str.isalnum, word)))[:40].strip("-")


def label_of_several(labels: Sequence[int], num_classes: int) -> int:
    """Return the number above `num_classes` that stands for two classes or more: their digits to a base above it."""
    found = 0
    for label in sorted(set(labels)):
        found = found * (num_classes + 1) + label + 1
    return found


def classes_of(label: int, num_classes: int) -> list[int]:
    """Return the classes of an image: none, one, or those that `label_of_several` made a number of."""
    if label <= num_classes:
        return [label] if label < num_classes else []
    found = []
    while label:
        label, digit = divmod(label, num_classes + 1)
        found.insert(0, digit - 1)
    return found


def plan_images(
    config: SampleConfig,
    num_classes: int,
    class_names: Sequence[str] | None,
    num_given: int | None = None,
    stems: Sequence[str] = (),
    has_several: bool = False,
) -> SamplePlan:
    """Return the plan that the settings ask for; raise `UserError` for a class that does not exist.

    num_given: how many pictures or rows of numbers there are to make images of; None for none.
    stems: the names of the pictures' files, without endings. has_several: images may have several classes.
    """
    labels = tuple(range(num_classes)) or (0,)  # without classes 0 is "no class"
    if num_given and num_classes > 1:
        labels = (num_classes,)
    if config.classes:
        # Commas divide names unless they belong to one.
        known = class_names or ()
        parts = [word.split(",") if find_name(word, known) is None else [word] for word in config.classes]
        names = [part.strip() for words in parts for part in words if part.strip()]
        labels = tuple(sorted({labels_of(name, num_classes, class_names, has_several) for name in names}))
        if not labels:
            value = " ".join(config.classes)
            raise UserError("names no class: give some, or leave the flag out.", about="classes", value=value)
    usual = DEFAULT_NUM_IMAGES if num_given is None else num_given * len(labels)
    share, rest = divmod(config.num_images or usual, len(labels))
    counts = [config.images_per_class or share + (k < rest) for k in range(len(labels))]
    if sum(counts) > MOST_IMAGES:
        rule = f"{sum(counts):,} images are more than {MOST_IMAGES:,}: make them in several folders, each with its own "
        raise UserError(f"{rule}--seed.", about="images_per_class", value=config.images_per_class)
    kept = [(label, count) for label, count in zip(labels, counts) if count]
    return SamplePlan(*zip(*kept), num_classes, tuple(class_names) if class_names else None, tuple(stems))


def labels_of(name: str, num_classes: int, class_names: Sequence[str] | None, has_several: bool) -> int:
    """Return the label of a class, or of several with + between them, unless a name has it."""
    parts = [part.strip() for part in name.split("+")]
    if len(parts) == 1 or find_name(name, class_names or ()) is not None:
        return label_of(name, num_classes, class_names)
    if not has_several:
        rule = "the model was trained with one class an image: name one."
        raise UserError(rule, about="classes", value=name)
    found = {label_of(part, num_classes, class_names) for part in parts}
    if num_classes in found or "" in parts:
        raise UserError("names no class beside others: leave that out.", about="classes", value=name)
    return label_of_several(list(found), num_classes) if len(found) > 1 else found.pop()


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
    if re.fullmatch(r"\d{1,9}", name, re.ASCII) and int(name) < num_classes:
        return int(name)
    rule = f"use 0 to {num_classes - 1}" if num_classes > 1 else "use 0"
    if names:
        rule += f", or a name: {', '.join(names[:10])}" + (", ..." if len(names) > 10 else "")
    raise UserError(f"no such class; {rule}; or none.{nearest(name, names)}", about="classes", value=name)


def open_folder(folder: Path, record: dict, resume: bool) -> None:
    """Make the folder, or make sure that it is for the images of `record`; what it holds stays as it is.

    UserError if it holds anything and `resume` is not set, or other images; OSError if it cannot be written to.
    """
    problem = None
    if folder.exists() and not folder.is_dir():
        problem = "is a file: give a new folder."
    elif (folder / SAMPLES_RECORD).is_file():
        begun = "holds samples already: add --resume to go on, or give another folder."
        problem = _difference(folder, record) if resume else begun
    elif found := [path.name for path in sorted(folder.glob("*")) if holds_files(path)]:
        missing = f"holds no {SAMPLES_RECORD} of a sampling to go on with"
        problem = f"is not empty ({found[0]}) and {missing}: give a new folder."
    if problem:
        raise UserError(problem, about="output_dir", value=folder)
    folder.mkdir(parents=True, exist_ok=True)


def begun_precision(folder: Path) -> str | None:
    """Return the precision that the images in a folder were begun in; None where no record there says it."""
    try:
        return json.loads((folder / SAMPLES_RECORD).read_text(encoding="utf-8"))["settings"]["mixed_precision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def holds_files(path: Path) -> bool:
    """Return whether a path is more than empty folders, as a stopped sampling leaves them; hidden ones do not count."""
    is_empty = path.is_dir() and all(part.is_dir() for part in path.rglob("*"))
    return not is_empty and not path.name.startswith(".")


def _difference(folder: Path, now: dict) -> str | None:
    """Return how the images in a folder differ from those that are asked for now; more of them are no difference."""
    counts = {entry["label"]: entry["num_images"] for entry in now["classes"]}
    folders = {entry["label"]: entry["folder"] for entry in now["classes"]}
    try:
        then = json.loads((folder / SAMPLES_RECORD).read_text(encoding="utf-8"))
        changed = changed_settings(then["settings"], dict.fromkeys(then["settings"]) | now["settings"])
        if then["model"]["fingerprint"] != now["model"]["fingerprint"]:
            models = now["model"], then["model"]
            new, old = (f"{it['path']} with --ema {it['ema']}" if it["ema"] else it["path"] for it in models)
            changed.append(f"--model: the weights of {new} are not those of {old} at that time")
        for entry in then["classes"]:
            before, count = entry["num_images"], counts.get(entry["label"], 0)
            if folders.get(entry["label"], entry["folder"]) != entry["folder"]:
                changed.append(f"an earlier version named a folder {entry['folder']}")
            if count < before and not changed:
                images = f"{before} images of class {entry['name']} belong to it and {count} are asked for now"
                changed = [f"{images} (--classes, --num_images, --images_per_class)"]
        if then["version"] != VERSION:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {SAMPLES_RECORD} is broken, or of another version of this program: give a new folder."
    return f"was begun otherwise: {'; '.join(changed)}: use the same settings, or another folder." if changed else None
