"""Images that are kept from the training to measure the loss on: those whose content key is below a share of all.

So the choice does not change when files are added, renamed, moved or prepared, and copies of one image stay together.
"""

import base64
import contextlib
import hashlib
import logging
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch

from jit_accel.base.errors import UserError
from jit_accel.base.shared_tables import shared_arrays
from jit_accel.config.presets import Size, sides_of
from jit_accel.data.batches.batch import PixelBatch, labels_in, renumbered, vectors_in
from jit_accel.data.formats.columns import COLOUR, PixelFormat
from jit_accel.data.formats.source import Source, fingerprint_of
from jit_accel.data.reading.content import announce_keys
from jit_accel.data.reading.decode import BadImage, decode_row, facts_in_row
from jit_accel.data.reading.images import SomeImages, Stream
from jit_accel.data.reading.shards import Shard, remembered

log = logging.getLogger(__name__)
Decoded = tuple[int, np.ndarray, Any]  # index, uint8 (3 + C, H, W), what else is known of it


@dataclass(frozen=True)
class HeldOut:
    """One process's share of the held-out images."""

    images: torch.Tensor  # (k, C + C', H, W), as in `PixelBatch`
    labels: torch.Tensor  # int64 (k,), or several of each as in `PixelBatch`
    keys: np.ndarray  # int64 (k,), 0 or more: one an image, from which its noise and time follow
    vectors: torch.Tensor | None = None  # float32 (k, n), standardised
    pixels: PixelFormat = COLOUR

    def or_grey(self) -> "HeldOut":
        """Return the same, or one grey image where there is none: a process must go along with the others."""
        if len(self.keys):
            return self
        grey = torch.full((1, *self.images.shape[1:]), 128, dtype=self.images.dtype)
        known = (None if one is None else one.new_zeros(1, *one.shape[1:]) for one in (self.labels, self.vectors))
        labels, vectors = known
        return HeldOut(grey, labels, np.zeros(1, np.int64), vectors, self.pixels)

    def batch(self, places: torch.Tensor, draws: torch.Tensor | int = 0) -> PixelBatch:
        """Return the images at these places; another draw of one is a neighbouring number, as different as any."""
        vectors = None if self.vectors is None else self.vectors[places]
        positions = self.keys[places.numpy()] + np.asarray(draws)
        return PixelBatch(self.images[places], self.labels[places], positions, vectors=vectors, pixels=self.pixels)


def split_holdout(
    source: Source, share: float, *, max_images: int, img_size: Size, rank: int = 0, world_size: int = 1
) -> tuple[Source, HeldOut | None]:
    """Take a share of the images out of `source`, and read those `max_images` of them with the smallest keys.

    Process `rank` gets its part of them; None, with a warning, where the share is too small for any. The fingerprint of
    the rest follows from which images these are. Raises `UserError` where no image is left.
    """
    limit = int(share * 2**64)
    name = f"holdout {source.name} {source.fingerprint} {share} {max_images}"
    found = shared_arrays(name, lambda: _divided(source, np.uint64(limit), max_images))
    (num_held,) = found["num_held"].tolist()
    if num_held == source.num_images:
        rule = f"holds out all {source.num_images} images of {source.name} (by a hash of their content): use a smaller "
        raise UserError(rule + "share, or more images.", about="holdout", value=f"{share:g}")
    if not num_held:
        rule = "--holdout %g: holds out none of the %d images of %s (by a hash of their content), so there is no "
        log.warning(rule + "val/loss: use a larger share, or more images", share, source.num_images, source.name)
        return source, None
    if source.streaming:
        images = replace(source.images, min_key=limit, sizes=found["sizes"])
    else:
        images = SomeImages(source.images, found["trained"])
    identity = fingerprint_of([source.fingerprint, found["digest"].tobytes().hex()])
    rest = replace(source, images=images, num_images=source.num_images - num_held, fingerprint=identity)
    return rest, _read(source, found, img_size, slice(rank, None, world_size))


def _divided(source: Source, limit: np.uint64, max_images: int) -> dict[str, np.ndarray]:
    """Return which images are held out, with keys below `limit`, by a digest, and what of them and of the rest is used.

    trained: of random access the numbers of the rest. sizes: of a stream so many of the rest in each unit. `_smallest`.
    """
    by_unit = _keys_by_unit(source)
    is_held = np.concatenate(by_unit) < limit
    held, trained, sizes = np.flatnonzero(is_held), np.empty(0, np.int64), np.empty(0, np.int64)
    if source.streaming:
        ends = np.cumsum([len(of_unit) for of_unit in by_unit])
        sizes = np.array([(~part).sum() for part in np.split(is_held, ends[:-1])], np.int64)
    else:
        trained = np.flatnonzero(~is_held)
    digest = np.frombuffer(hashlib.sha256(np.packbits(is_held)).digest(), np.uint8)
    counted = {"num_held": np.array([len(held)]), "trained": trained, "sizes": sizes, "digest": digest}
    return counted | _smallest(by_unit, held, max_images)


def held_by_split(
    source: Source, other: Source, *, max_images: int, img_size: Size, rank: int = 0, world_size: int = 1
) -> HeldOut:
    """Read those images of another split that `split_holdout` would, with the classes of `source` by their names.

    UserError for classes that are not trained.
    """
    name = f"split {other.name} {other.fingerprint} {max_images}"
    found = shared_arrays(name, lambda: _smallest(_keys_by_unit(other), np.arange(other.num_images), max_images))
    held = _read(replace(other, vectors=source.vectors), found, img_size, slice(rank, None, world_size))
    if not source.is_labelled:
        return replace(held, labels=torch.zeros_like(held.labels))
    number_of = {name: number for number, name in enumerate(source.class_names)}
    if not other.is_labelled and other.class_names[0] not in number_of:
        raise UserError("that split has no labels, and the images to train on have: label it.", about="split")
    if unknown := [name for name in other.class_names if source.class_names and name not in number_of]:
        rule = f"that split has images of the class {unknown[0]}, which no image to train on has: choose another split."
        raise UserError(rule, about="split")
    numbers = [number_of.get(name, number) for number, name in enumerate(other.class_names)]
    return replace(held, labels=renumbered(held.labels, torch.tensor(numbers))) if numbers else held


def _smallest(by_unit: list[np.ndarray], held: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return, of images of these numbers, those with the smallest content keys, smallest first, and the keys."""
    keys = np.concatenate(by_unit)
    chosen = held[np.argsort(keys[held], kind="stable")][:count]
    ends = np.cumsum([len(of_unit) for of_unit in by_unit])
    return {"chosen": chosen, "keys": keys[chosen], "ends": ends}


def _read(source: Source, found: dict[str, np.ndarray], img_size: Size, part: slice) -> HeldOut:
    """Read `part` of the images that `_smallest` has found."""
    chosen, key_of = found["chosen"][part], dict(zip(found["chosen"].tolist(), found["keys"]))
    if source.streaming:
        images = list(_read_stream(source.images, np.sort(chosen), found["ends"], img_size))
    else:
        images = list(_read_images(source, chosen, img_size))
    shape = (len(images), source.channels, *sides_of(img_size))
    pixels = np.stack([one for _, one, _ in images]) if images else np.empty(shape, source.pixels.dtype)
    facts = np.array([of_image for *_, of_image in images], source.facts_type)
    keys = (np.array([key_of[index] for index, *_ in images], np.uint64) >> np.uint64(1)).astype(np.int64)
    vectors = vectors_in(facts, source.vectors)
    return HeldOut(torch.from_numpy(pixels), labels_in(facts), keys, vectors, source.pixels)


def _read_images(source: Source, chosen: np.ndarray, img_size: Size) -> Iterator[Decoded]:
    for index in chosen.tolist():
        out = np.empty((1, source.channels, *sides_of(img_size)), source.pixels.dtype)
        facts, bad = source.images.read(np.array([index]), out)
        if not bad:
            yield index, out[0], facts[0]


def _read_stream(stream: Stream, chosen: np.ndarray, ends: np.ndarray, img_size: Size) -> Iterator[Decoded]:
    """Read the images of these numbers, which are sorted; `ends`: of each unit the number behind its last image."""
    columns, unit, rows, position = stream.columns, -1, iter(()), 0
    for index in chosen.tolist():
        if unit < 0 or index >= ends[unit]:
            unit, position = int(np.searchsorted(ends, index, side="right")), index
            rows = stream.rows(unit, index - (int(ends[unit - 1]) if unit else 0))
        row = next(islice(rows, index - position, None))
        position = index + 1
        with contextlib.suppress(BadImage):
            yield index, decode_row(row, columns, img_size), facts_in_row(row, columns)


def _keys_by_unit(source: Source) -> list[np.ndarray]:
    """The content keys of each unit, read once and then kept, unless they were stored with the images."""
    stream: Stream = source.images
    if not source.streaming:
        return [copy(stream).keys()]  # a copy, as it may keep them
    if not stream.columns.key:
        first = next(stream.rows(int(stream.sizes.argmax())), {}).get(stream.columns.image)
        if not isinstance(stream.columns.image_of(first)[0], str):  # as files of their own are, which change alone
            return _kept_keys(source)
        announce_keys(source.num_images)
    return [stream.keys(unit) for unit in range(stream.num_units)]


def _kept_keys(source: Source) -> list[np.ndarray]:
    stream: Stream = source.images
    files = {shard: number for number, shard in enumerate(stream.shards)}

    @cache
    def announce() -> None:
        if not stream.is_remote:
            return announce_keys(source.num_images)
        rule = "--holdout: reading all of %s once over the network, since the content of the images decides which are "
        rule += "held out: to avoid it, prepare the data (python -m jit_accel.prepare) or leave --holdout out"
        log.warning(rule, source.name)

    def look(shard: Shard) -> list[str]:
        announce()
        keys = map(stream.keys, stream.units_of(files[shard]))
        return [base64.b64encode(of_unit.astype("<u8").tobytes()).decode() for of_unit in keys]

    found = remembered(f"content keys {stream.columns.image}", stream.shards, look)
    return [np.frombuffer(base64.b64decode(keys), "<u8").astype(np.uint64) for of_file in found for keys in of_file]
