"""From an image of the source to the bytes that are stored."""

import contextlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from jit_accel.data.formats.columns import Columns
from jit_accel.data.formats.prepared import PixelStore
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.content import key_of
from jit_accel.data.reading.decode import BadImage, crop_pixels, decode_image, pixels_of
from jit_accel.prepare.settings import PrepareConfig

_BLOCK = 16  # images that are read from the source at a time
# Pillow's options of each encoding. Halved chroma would cost more than quality 95 does: at these sizes it is what one
# sees first. PNG of photos: twice as fast as the default level 6, and 1 % larger.
_OPTIONS = {"jpeg": {"subsampling": 0}, "png": {"compress_level": 4}, "webp": {"exact": True}}


class Original(NamedTuple):
    """One image of the source: its encoded bytes, the path of its file, or pixels, uint8 (3, H, W)."""

    image: bytes | str | np.ndarray | None
    name: str
    label: int
    key: int | None


class Encoded(NamedTuple):
    """One image as it is stored; `data` is None where it is left out, for the `reason`."""

    data: bytes | None
    name: str
    label: int
    key: int
    reason: str = ""


def originals_at(source: Source, indices: np.ndarray) -> Iterator[Original]:
    """Yield images of a source with random access by their numbers, int64 (k,)."""
    images = source.images
    for block in np.split(indices, range(_BLOCK, len(indices), _BLOCK)):
        if isinstance(images, PixelStore):
            pixels = np.empty((len(block), 3, images.img_size, images.img_size), np.uint8)
            labels, _ = images.read(block, pixels)
            keys, names = images.keys()[block].tolist(), images.names()[block]
            yield from map(Original, pixels, names, labels.tolist(), keys)
            continue
        rows = images.dataset[block.tolist()]
        for i, index in enumerate(block.tolist()):
            row = {column: rows[column][i] for column in images.columns.all}
            yield _original(images.columns, row, f"image {index}")


def originals_of(source: Source, unit: int, start: int, stop: int) -> Iterator[Original]:
    """Yield rows `start` to `stop` of a unit of a stream."""
    for number, row in zip(range(start, stop), source.images.rows(unit, start)):
        yield _original(source.images.columns, row, f"shard {unit}, image {number}")


def _original(columns: Columns, row: dict, fallback_name: str) -> Original:
    image, name = columns.image_of(row[columns.image])
    name = row.get(columns.name) or name or fallback_name
    if columns.raw_size is not None:
        with contextlib.suppress(BadImage):  # bytes that are no pixels are no encoded image either
            image = pixels_of(image, columns.raw_size)
    return Original(image, name, columns.label_of(row.get(columns.label)), row.get(columns.key))


def encode(original: Original, config: PrepareConfig, root: str) -> Encoded:
    """Decode, crop, encode. Names of files under the folder `root` are made relative to it."""
    name = original.name.removeprefix(root)
    try:
        if original.label < 0:
            raise BadImage("it has no label")
        if isinstance(original.image, np.ndarray):
            pixels = crop_pixels(original.image, config.img_size)
        else:
            pixels = decode_image(original.image, config.img_size, fast=config.resize == "fast")
        key = key_of(original.image) if original.key is None else original.key
    except BadImage as error:
        reason = str(error)
        return Encoded(None, name, 0, 0, reason.replace(root, ""))
    return Encoded(encoded_bytes(pixels, config.format, config.resolved_quality), name, original.label, key)


def encoded_bytes(pixels: np.ndarray, format: str, quality: int | None) -> bytes:
    """Return pixels, uint8 (3, S, S), as they are stored; WebP of quality 100 is lossless."""
    if format not in _OPTIONS:
        return pixels.tobytes()
    options = _OPTIONS[format] | ({} if quality is None else {"quality": quality})
    if format == "webp":
        options["lossless"] = quality == 100
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format.upper(), **options)
    return buffer.getvalue()
