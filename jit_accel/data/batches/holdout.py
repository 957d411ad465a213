"""Images that are kept from the training to measure the loss on: chosen by their content alone.

An image is held out if its content key is below `share` of all possible keys. So the choice does not change when
files are added, renamed, moved or prepared, and copies of one image are all on the same side.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from jit_accel.base.errors import UserError
from jit_accel.data.batches.batch import decode_row
from jit_accel.data.formats.index_cache import remembered
from jit_accel.data.formats.source import Source, fingerprint_of
from jit_accel.data.reading.decode import BadImage
from jit_accel.data.reading.images import Images, SomeImages, announce_keys
from jit_accel.data.reading.shards import Shard
from jit_accel.data.reading.units import Stream

log = logging.getLogger(__name__)
Decoded = tuple[int, np.ndarray, int]  # key, uint8 (3, H, W), label


@dataclass(frozen=True)
class HeldOut:
    """One process's share of the held-out images.

    images: uint8 (k, 3, H, W). labels: int64 (k,). keys: int64 (k,), 0 or more, one an image, from which its noise and
    time follow.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: np.ndarray


def split_holdout(
    source: Source, share: float, *, max_images: int, img_size: int, rank: int = 0, world_size: int = 1
) -> tuple[Source, HeldOut | None]:
    """Take a share of the images out of `source`, and read those `max_images` of them with the smallest keys.

    Process `rank` gets its part of them; None, with a warning, where the share is too small for any. The fingerprint
    of the rest follows from which images these are.

    Raises:
        UserError: no image is left.
    """
    limit = int(share * 2**64)
    split = _split_stream if source.streaming else _split_images
    rest, decoded = split(source, limit, _Wanted(max_images, img_size, rank, world_size))
    if rest.num_images == 0:
        raise UserError(
            f"holds out all {source.num_images} images of {source.name} (by a hash of their "
            "content): use a smaller share, or more images.",
            about="holdout",
            value=f"{share:g}",
        )
    if rest.num_images == source.num_images:
        log.warning(
            "--holdout %g: holds out none of the %d images of %s (by a hash of their content), so there is no "
            "val/loss: use a larger share, or more images",
            share,
            source.num_images,
            source.name,
        )
        return source, None
    found = list(decoded)
    images = np.stack([pixels for _, pixels, _ in found]) if found else np.empty((0, 3, img_size, img_size), np.uint8)
    keys = np.array([key >> 1 for key, *_ in found], np.int64)
    labels = torch.tensor([label for *_, label in found], dtype=torch.int64)
    return rest, HeldOut(torch.from_numpy(images), labels, keys)


@dataclass(frozen=True)
class _Wanted:
    max_images: int
    img_size: int
    rank: int
    world_size: int

    def of(self, sorted_items: list) -> list:
        """This process's share of the first `max_images`."""
        return sorted_items[: self.max_images][self.rank :: self.world_size]


def _split_images(source: Source, limit: int, wanted: _Wanted) -> tuple[Source, Iterator[Decoded]]:
    images: Images = source.images
    keys = images.keys()
    is_held = keys < np.uint64(limit)
    held = sorted(zip(keys[is_held].tolist(), np.flatnonzero(is_held).tolist()))
    rest = _without(source, is_held, SomeImages(images, np.flatnonzero(~is_held)))
    return rest, _read(images, wanted.of(held), wanted)


def _without(source: Source, is_held: np.ndarray, images: Images | Stream) -> Source:
    kept = hashlib.sha256(np.packbits(is_held)).hexdigest()
    identity = fingerprint_of([source.fingerprint, kept])
    return replace(source, images=images, num_images=int((~is_held).sum()), fingerprint=identity)


def _read(images: Images, chosen: list[tuple[int, int]], wanted: _Wanted) -> Iterator[Decoded]:
    for key, index in chosen:
        out = np.empty((1, 3, wanted.img_size, wanted.img_size), np.uint8)
        labels, bad = images.read(np.array([index]), out)
        if not bad:
            yield key, out[0], int(labels[0])


def _split_stream(source: Source, limit: int, wanted: _Wanted) -> tuple[Source, Iterator[Decoded]]:
    stream: Stream = source.images
    kept = replace(stream, min_key=limit)
    keys = _stream_keys(source)
    is_held = [of_unit < np.uint64(limit) for of_unit in keys]
    sizes = np.array([(~of_unit).sum() for of_unit in is_held], np.int64)
    held = sorted(
        (key, u, row) for u, of_unit in enumerate(keys) for row, key in enumerate(of_unit.tolist()) if key < limit
    )
    chosen = sorted((unit, row, key) for key, unit, row in wanted.of(held))
    rest = _without(source, np.concatenate(is_held), replace(kept, sizes=sizes))
    return rest, _decode(stream, _rows(stream, chosen), wanted)


def _stream_keys(source: Source) -> list[np.ndarray]:
    """The content keys of each unit, read once and then kept, unless they were stored with the images."""
    stream: Stream = source.images
    if not stream.columns.key:
        first = next(stream.rows(int(stream.sizes.argmax())), {}).get(stream.columns.image)
        if not isinstance(stream.columns.image_of(first)[0], str):  # as files of their own are, which change alone
            return _kept_keys(source)
        announce_keys(source.num_images)
    return [stream.keys(unit) for unit in range(stream.num_units)]


def _kept_keys(source: Source) -> list[np.ndarray]:
    stream: Stream = source.images
    files = {shard: number for number, shard in enumerate(stream.shards)}
    is_first = True

    def look(shard: Shard) -> list[str]:
        nonlocal is_first
        if is_first and stream.is_remote:
            log.warning(
                "--holdout: reading all of %s once over the network, since the content of the images decides which are "
                "held out: to avoid it, prepare the data (python -m jit_accel.prepare) or leave --holdout out",
                source.name,
            )
        elif is_first:
            announce_keys(source.num_images)
        is_first = False
        return [_packed(stream.keys(unit)) for unit in stream.units_of(files[shard])]

    found = remembered(f"content keys {stream.columns.image}", stream.shards, look)
    return [_unpacked(keys) for of_file in found for keys in of_file]


def _packed(keys: np.ndarray) -> str:
    return base64.b64encode(keys.astype("<u8").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u8").astype(np.uint64)


def _rows(stream: Stream, chosen: list[tuple[int, int, int]]) -> Iterator[tuple[int, dict]]:
    """Yield (key, row) of these (unit, row number, key), which are sorted."""
    unit, position, rows = -1, 0, iter(())
    for wanted_unit, number, key in chosen:
        if wanted_unit != unit:
            unit, position, rows = wanted_unit, number, stream.rows(wanted_unit, number)
        yield key, next(islice(rows, number - position, None))
        position = number + 1


def _decode(stream: Stream, held: Iterator[tuple[int, dict]], wanted: _Wanted) -> Iterator[Decoded]:
    columns = stream.columns
    for key, row in held:
        try:
            pixels = decode_row(row[columns.image], columns, wanted.img_size)
        except BadImage:
            continue
        yield key, pixels, columns.label_of(row.get(columns.label))
