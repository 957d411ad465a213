"""An opened data set, and the few things that its openers share."""

import hashlib
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, Image

from jit_accel.base.errors import UserError, shown
from jit_accel.config.presets import Size
from jit_accel.data import data_error
from jit_accel.data.formats.columns import COLOUR, FOLDER, IMAGE_CHANNELS, Columns, PixelFormat, facts_type
from jit_accel.data.formats.numbers import Vectors
from jit_accel.data.reading.images import Images, Stream, TableImages
from jit_accel.data.reading.shards import Shard
from jit_accel.data.reading.splits import ALL, TRAIN, canonical

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The user's wishes, handed to the opener of a format."""

    path: str  # without the prefix `builtin:`
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool | None = None  # None: as suits the format
    renumber_labels: bool = False
    split: str | None = None  # None: train, where there are several
    condition_path: str | None = None  # a folder
    condition_column: str | None = None
    vector_column: tuple[str, ...] = ()
    raw_shape: tuple[int, ...] = ()  # of images that are bare bytes
    raw_dtype: str | None = None
    label_separator: str | None = None  # in cells of metadata files

    @property
    def other_split(self) -> list[str]:
        """Return what tells a split from that of other runs, in a fingerprint, where files may be alike."""
        return [split] if (split := canonical(self.split)) not in (TRAIN, ALL) else []

    def refuse(self, *settings: str, reason: str) -> None:
        """Raise UserError if one of these settings, which make no sense for what is at the path, is given."""
        for name in settings:
            value = getattr(self, name)
            if value not in (None, False, ()):
                given = "true" if value is True else shown(value)
                raise UserError(f"{self.path} {reason}: leave the flag out.", about=name, value=given)


@dataclass(frozen=True)
class Source:
    """A data set of images, opened but not read."""

    name: str
    format: str
    images: Images | Stream  # by random access, or in order
    num_images: int
    class_names: tuple[str, ...]  # () where labels are numbers that only reading everything would show
    fingerprint: str  # of names, sizes and counts; stays when the data moves elsewhere
    max_label: int | None  # None where `class_names` is ()
    is_labelled: bool = True  # False where all are of one class for lack of labels
    img_size: Size | None = None  # in pixels, of images that are all of one size
    vectors: Vectors | None = None  # the columns of numbers
    most_labels: int | None = None  # of an image, where they may have several
    pixels: PixelFormat = COLOUR  # of what is read

    @property
    def vector_record(self) -> dict[str, list] | None:
        """Return the columns of numbers, as checkpoints and pipelines keep them."""
        return self.vectors and self.vectors.record()

    @property
    def facts_type(self) -> np.dtype:
        """The type of what is read of an image beside its pixels, as of its `Columns`."""
        return facts_type(len(self.vectors.mean) if self.vectors else 0, self.most_labels)

    @property
    def streaming(self) -> bool:
        return isinstance(self.images, Stream)

    @property
    def is_encoded(self) -> bool:
        """Return whether its images have to be decoded; those of a store of pixels have not."""
        return getattr(self.images, "is_encoded", True)

    @property
    def channels(self) -> int:
        """Return the channels of what is read: the image's, and behind them those of its condition."""
        return getattr(self.images, "channels", IMAGE_CHANNELS)

    @property
    def condition_channels(self) -> int:
        """Return the channels of the pictures that go with the images; 0 where there are none."""
        return self.channels - self.pixels.channels

    @property
    def num_classes(self) -> int | None:
        """Return the smallest number of classes that holds every label; None where the labels are not known yet."""
        return None if self.max_label is None else self.max_label + 1


def source_of(
    name: str,
    format: str,
    images: Images | Stream,
    names: tuple[str, ...],
    identity: str,
    size: Size | None = None,
    vectors: Vectors | None = None,
) -> Source:
    """Return the data set of these images, all of one `size` if that is given; UserError if there are none."""
    columns = getattr(images, "columns", Columns(""))
    if condition := columns.condition:
        identity = fingerprint_of([identity, "condition", condition])
    if columns.arrays[0] and columns.arrays[0].shape:
        identity = fingerprint_of([identity, str(columns.arrays[0])])
    count = int(images.sizes.sum()) if isinstance(images, Stream) else len(images)
    if not count:
        raise data_error(name, "the data set has no rows: choose one with images.")
    max_label = len(names) - 1 if names else None
    identity = fingerprint_of([identity, str(vectors)]) if vectors else identity
    given = name, format, images, count, names, identity, max_label, images.is_labelled
    return Source(*given, img_size=size, vectors=vectors, most_labels=columns.most_labels)


def in_class_order(source: Source, names: Sequence[str]) -> Source:
    """Return the data set with its classes in the order of `names`, in which a run began; as it is if they differ.

    Earlier versions sorted folders that are numbers as text, and took no folders in tar files for classes.
    """
    then, now = (
        [unicodedata.normalize("NFC", name) for name in some]
        for some in (names[: len(source.class_names)], source.class_names)
    )
    columns = getattr(source.images, "columns", None)
    if columns is not None and columns.label == FOLDER and then == ["image"]:
        log.warning("--data_path %s: the run began without the classes that folders in tar files are now", source.name)
        images = replace(source.images, columns=replace(columns, label=None, label_ids=None))
        return replace(source, images=images, class_names=("image",), max_label=0, is_labelled=False)
    if columns is None or then == now or sorted(then) != sorted(set(now)):
        return source
    log.warning("--data_path %s: the classes stay in the order in which the run began: %s ...", source.name, then[:12])
    places, ids = {name: i for i, name in enumerate(then)}, columns.label_ids or {i: i for i in range(len(now))}
    columns = replace(columns, label_ids={label: places[now[i]] for label, i in ids.items()})
    return replace(source, images=replace(source.images, columns=columns), class_names=tuple(then))


def standardised_as(source: Source, before: Vectors | None) -> Source:
    """Return the data set with its numbers standardised as these were, where its columns have the same names."""
    now = source.vectors
    if before is None or now is None or (now.names, now.sizes) != (before.names, before.sizes):
        return source
    return replace(source, vectors=before)


def table_images(dataset: Dataset, columns: Columns) -> TableImages:
    """Return the columns of a table that are read, undecoded."""
    if list(dataset.features) != columns.all:
        dataset = dataset.select_columns(columns.all)
    for name in columns.pictures:
        if isinstance(feature := dataset.features[name], Image) and feature.decode:
            dataset = dataset.cast_column(name, Image(decode=False))
    return TableImages(dataset, columns)


def fingerprint_of(parts: Iterable[str], shards: Iterable[Shard] = ()) -> str:
    """Return sixteen hex digits that tell lists of strings, and files by names and sizes, apart wherever they are."""
    texts = [*parts, *(f"{shard.name}:{shard.size}" for shard in shards)]
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
