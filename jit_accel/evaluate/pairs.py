"""Pairs of an image and a condition, as a network wants them: from data with both, or made of images."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.config.groups import ConditionConfig
from jit_accel.config.presets import Size, sides_of
from jit_accel.data.batches.batch import PixelBatch, labels_in, listed, ready
from jit_accel.data.batches.degradations import Degradation, check_size, degradation_of
from jit_accel.data.formats.numbers import Vectors
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.evaluate.image_sets import ImageSet, open_image_set
from jit_accel.model.pipeline import JiTPipeline


@dataclass(frozen=True)
class Part:
    """A batch of pairs."""

    numbers: list[int]  # of the images in their data set
    keys: np.ndarray  # int64 (B,): one an image, from its content, from which all that is random about it follows
    labels: list[int | list[int] | None]  # as the network knows them
    vectors: list[list[float]] | None  # the numbers beside them, in the units of the data
    truths: Tensor  # uint8 (B, C, H, W)
    conditions: Tensor  # (B, C, H, W) in [0, 1]


@dataclass(frozen=True)
class Pairs:
    """Images and their conditions, opened but not read."""

    images: ImageSet
    num_images: int  # to be scored: the first ones
    label_of: Callable[[int | None], int | None]  # as the network knows it
    degradation: Degradation | None  # what makes conditions of the images
    are_pictures: bool  # the conditions have the images' channels, or are grey

    def parts(self, batch_size: int, rank: int, world_size: int) -> Iterator[tuple[Part | None, list[str]]]:
        """Yield the pairs of one process, each once, and the names of those that cannot be read."""
        for share in self.images.shares(batch_size, rank, world_size):
            chosen = share.numbers < self.num_images
            if len(chosen) and not chosen.any():  # numbers grow
                return
            numbers, pixels, facts = share.numbers[chosen], share.images[chosen], share.facts[chosen.numpy()]
            yield self._part(numbers, pixels, facts) if len(numbers) else None, share.bad_images

    def _part(self, numbers: Tensor, pixels: Tensor, facts: np.ndarray) -> Part:
        digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in pixels.numpy()]
        keys = np.array([int.from_bytes(digest, "little") >> 1 for digest in digests], np.int64)
        read = PixelBatch(pixels, torch.zeros(len(keys), dtype=torch.int64), keys, pixels=self.images.pixels)
        batch = ready(read, "cpu", self.degradation)
        labels = [
            [self.label_of(one) for one in label] if isinstance(label, list) else self.label_of(label)
            for label in listed(labels_in(facts))
        ]
        vectors = facts["vectors"].tolist() if "vectors" in (facts.dtype.names or ()) else None
        truths = ((batch.images + 1) * 127.5).round().to(torch.uint8)
        return Part(numbers.tolist(), keys, labels, vectors, truths, (batch.condition + 1) / 2)


def open_pairs(
    path: str,
    conditions: ConditionConfig,
    pipeline: JiTPipeline,
    img_size: Size,
    most: int,
    *,
    split: str | None = None,
    **reading: Any,
) -> Pairs:
    """Open images of any kind that training reads, with the conditions and numbers that the network wants.

    reading: further settings of `open_images`, such as `label_column`. Conditions of the data come before
    `conditions.condition_from`. Raises `UserError`: there are none, or others than it was trained with.
    """
    made_from, degradation, wanted = conditions.condition_from, None, pipeline.transformer.config
    how = {name: getattr(conditions, name) for name in ("condition_path", "condition_column")}
    standards = Vectors.of_record(pipeline.config.vectors)
    how |= {"in_channels": wanted.in_channels, "value_range": pipeline.config.value_range}
    how |= reading | {"split": split, "vector_column": standards.names if standards else ()}
    with renamed_settings(data_path="pairs", vector_column="pairs"):
        source = open_images(path, **how)
    if standards and source.vectors.sizes != standards.sizes:
        rule = f"has {source.vectors.sizes} numbers in {standards.names}, the model was trained with {standards.sizes}."
        raise UserError(rule, about="pairs", value=path)
    images, channels = open_image_set(source, "pairs", img_size, has_pairs=True), source.condition_channels
    if not channels:
        if made_from is None:
            rule = "has no condition, and the model's folder does not say how its training made them: add "
            raise UserError(
                f"{rule}--condition_path, --condition_column or --condition_from.", about="pairs", value=path
            )
        degradation = degradation_of(made_from)
        check_size(degradation, sides_of(img_size))
        channels = degradation.channels(wanted.in_channels)
    if channels != wanted.condition_channels:
        rule = f"the conditions have {channels} channels, and the model was trained with {wanted.condition_channels}: "
        about, value = ("condition_from", made_from) if degradation else ("pairs", path)
        raise UserError(f"{rule}give such as it was trained with.", about=about, value=value)
    are_pictures = channels in (1, wanted.in_channels)
    label_of = label_function(source, pipeline)
    return Pairs(images, min(most, images.num_images), label_of, degradation, are_pictures)


def label_function(source: Source, pipeline: JiTPipeline) -> Callable[[int | None], int | None]:
    """Return what gives a label of the data as the network knows it: by its name, else by its number.

    Raises `UserError` for data with more classes than the network, by other names.
    """
    count = pipeline.transformer.config.num_classes
    if count <= 1 or not source.is_labelled:
        return lambda label: 0 if count == 1 else None
    try:
        ids = pipeline.label_ids(list(source.class_names)) if source.class_names else range(count)
    except ValueError:  # other names
        ids = range(count)
    if (source.num_classes or 0) > len(ids):
        rule = f"has {source.num_classes} classes, and the model knows {count}, by other names: give other data."
        raise UserError(rule, about="pairs", value=source.name)
    return lambda label: None if label is None or not 0 <= label < len(ids) else ids[label]
