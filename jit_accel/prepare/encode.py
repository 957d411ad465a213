"""From images of the source to the bytes that are stored; those of a stream, read in its order, wait in a spool."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file
from jit_accel.config.presets import sides_of
from jit_accel.data.formats.columns import COLOUR, IMAGE_CHANNELS, Columns
from jit_accel.data.formats.prepared import PixelStore
from jit_accel.data.formats.source import Source
from jit_accel.data.formats.sources import open_images
from jit_accel.data.reading.content import key_of
from jit_accel.data.reading.decode import BadImage, Decoded, crop_pixels, decode_pair, decode_sized, pixels_of
from jit_accel.data.reading.images import Stream
from jit_accel.prepare.settings import PrepareConfig

_BLOCK = 16  # images that are read from the source at a time
# Pillow's options of each encoding. Halved chroma would cost more than quality 95 does: at these sizes it is what one
# sees first. PNG of photos: twice as fast as the default level 6, and 1 % larger.
_OPTIONS = {"jpeg": {"subsampling": 0}, "png": {"compress_level": 4}, "webp": {"exact": True}}

MOST_PARTS = 256  # files that are open at once later
FEWEST_PARTS = 32  # for processes to share
MOST_CUTS = 8  # of one unit: what comes before a cut is read in vain
_TYPES = {"data": "large_binary", "name": "string", "label": "int64", "key": "uint64", "reason": "string"}
_TYPES["condition"] = "large_binary"
_SCHEMA = pa.schema([(name, getattr(pa, type)()) for name, type in _TYPES.items()])  # as the fields of `Encoded`


Picture = bytes | str | np.ndarray | None


class Original(NamedTuple):
    """One image of the source: its encoded bytes, the path of its file, or pixels, uint8 (3, H, W)."""

    image: Picture
    name: str
    label: int
    key: int | None
    condition: tuple[Picture, str] | None = None  # and its name, where images have conditions


class Encoded(NamedTuple):
    """One image as it is stored; `data` is None where it is left out, for the `reason`.

    `condition` is what goes with it, where that is not at the end of `data`, as among bare pixels.
    """

    data: bytes | None
    name: str
    label: int
    key: int
    reason: str = ""
    condition: bytes | None = None


def originals_at(source: Source, indices: np.ndarray) -> Iterator[Original]:
    """Yield images of a source with random access by their numbers, int64 (k,)."""
    images = source.images
    for block in np.split(indices, range(_BLOCK, len(indices), _BLOCK)):
        if isinstance(images, PixelStore):
            pixels = np.empty((len(block), images.channels, *sides_of(images.img_size)), np.uint8)
            labels, _ = images.read(block, pixels)
            keys, names = images.keys()[block].tolist(), images.names()[block]
            images_alone, conditions = pixels[:, :IMAGE_CHANNELS], [(one, "") for one in pixels[:, IMAGE_CHANNELS:]]
            conditions = conditions if source.condition_channels else [None] * len(block)
            yield from map(Original, images_alone, names, labels.tolist(), keys, conditions)
            continue
        rows = images.dataset[block.tolist()]
        for i, index in enumerate(block.tolist()):
            row = {column: rows[column][i] for column in images.columns.all}
            yield _original(images.columns, row, f"image {index}")


def originals_of(source: Source, unit: int, start: int, stop: int) -> Iterator[Original]:
    """Yield rows `start` to `stop` of a unit of a stream."""
    for number, row in zip(range(start, stop), source.images.rows(unit, start)):
        yield _original(source.images.columns, row, source.images.name_of(unit, number))


def _original(columns: Columns, row: dict, number: str) -> Original:
    pictures = [columns.image_of(row[column]) for column in columns.pictures]
    name = row.get(columns.name) or pictures[0][1] or number
    if columns.raw_size is not None:
        with contextlib.suppress(BadImage):  # bytes that are no pixels are no encoded image either
            pictures = [(pixels_of(data, columns.raw_size), of) for data, of in pictures]
    label, key = columns.label_of(row.get(columns.label)), row.get(columns.key)
    return Original(pictures[0][0], name, label, key, *pictures[1:])


def encode(original: Original, config: PrepareConfig, root: str) -> Encoded:
    """Decode, crop, encode. Names of files under the folder `root` are made relative to it."""
    name = original.name.removeprefix(root)

    def decode(picture: Picture) -> Decoded:
        if isinstance(picture, np.ndarray):
            return Decoded(crop_pixels(picture, config.img_size), picture.shape[:0:-1])
        return decode_sized(picture, config.img_size, fast=config.resize == "fast")

    try:
        if original.label < 0:
            raise BadImage("it has no label")
        if original.condition is None:
            pixels = decode(original.image).pixels
        else:
            pixels = decode_pair(original.image, *original.condition, decode)
        key = key_of(original.image) if original.key is None else original.key
    except BadImage as error:
        reason = str(error)
        return Encoded(None, name, 0, 0, reason.replace(root, ""))
    if config.format == "uint8":
        return Encoded(pixels.tobytes(), name, original.label, key)
    parts = np.split(pixels, len(pixels) // IMAGE_CHANNELS)
    data, *condition = (encoded_bytes(part, config.format, config.resolved_quality) for part in parts)
    return Encoded(data, name, original.label, key, "", *condition)


def encode_all(originals: Iterable[Original], config: PrepareConfig, source: Source) -> Iterator[Encoded]:
    """Encode images of a source; `UserError` where it cannot be read."""
    root = os.path.join(os.path.abspath(source.name), "") if source.format == "folder" else ""
    try:
        for original in originals:
            yield encode(original, config, root)
    except (OSError, pa.ArrowException) as error:
        rule = f"cannot be read ({error}). What is finished is kept: repair it and run the same command again."
        raise UserError(rule, about="data_path", value=config.data_path) from error


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


def parts_of(stream: Stream) -> list[list[tuple[int, int, int]]]:
    """Divide a stream into up to 256 parts in its own order, lists of (unit, first row, row behind the last)."""
    cuts = 1 if stream.is_remote else max(1, min(MOST_CUTS, FEWEST_PARTS // stream.num_units))
    pieces = []
    for unit, size in enumerate(stream.sizes.tolist()):
        edges = [size * n // cuts for n in range(cuts + 1)]
        pieces += [(unit, a, b) for a, b in pairwise(edges) if a != b]
    count = min(MOST_PARTS, len(pieces))
    return [pieces[len(pieces) * n // count : len(pieces) * (n + 1) // count] for n in range(count)]


def write_part(path: Path, images: Iterable[Encoded]) -> None:
    """Write a part that is there whole or not at all."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batched(images, 2**16, 2**24):
            writer.write_batch(pa.RecordBatch.from_pylist([image._asdict() for image in batch], _SCHEMA))


def batched(images: Iterable[Encoded], most_images: int, most_bytes: int) -> Iterator[list[Encoded]]:
    """Yield images in lists of at most so many images and bytes, or of a single larger image."""
    batch, num_bytes = [], 0
    for image in images:
        size = len(image.data or b"") + len(image.condition or b"")
        if batch and (len(batch) == most_images or num_bytes + size > most_bytes):
            yield batch
            batch, num_bytes = [], 0
        batch.append(image)
        num_bytes += size
    if batch:
        yield batch


def open_source(config: PrepareConfig) -> Source:
    """Open what is to be prepared. UserError for data that no store can hold."""
    names = "data_format", "image_column", "label_column", "renumber_labels", "split"
    names += "condition_path", "condition_column"
    try:
        source = open_images(config.data_path, **{name: getattr(config, name) for name in names})
    except UserError as error:
        if error.about not in ("in_channels", "value_range"):  # which there are no flags for
            raise
        source = None
    if source is None or source.pixels != COLOUR:
        rule = "holds numbers of more than 8 bits, and what is prepared is colour of 8: train on it as it is."
        raise UserError(rule, about="data_path", value=config.data_path)
    if source.most_labels is not None:
        rule = "its rows hold lists of labels, and what is prepared has one label an image: train on the data as it is."
        raise UserError(rule, about="label_column", value=config.label_column)
    return source


@dataclass
class Spool:
    """Random access to the images in all parts of a spool, numbered as in the stream without those left out."""

    parts: list[Path]

    def __reduce__(self):
        return Spool, (self.parts,)  # the mapped files are not sent to processes

    @cached_property
    def table(self) -> pa.Table:
        """All images, also those that are left out, mapped into memory."""
        files = [pa.ipc.open_file(pa.memory_map(str(part))) for part in self.parts]
        tables = [file.read_all() for file in files] or [_SCHEMA.empty_table()]
        return pa.concat_tables(tables, promote_options="default")  # older parts have no conditions

    @cached_property
    def kept(self) -> np.ndarray:
        """The row of each image, int64 (n,)."""
        return np.flatnonzero(self.table["data"].is_valid().to_numpy())

    def __len__(self) -> int:
        return len(self.kept)

    def skipped(self) -> list[dict]:
        """Return `name` and `reason` of the images that are left out."""
        return self.table.select(["name", "reason"]).filter(self.table["data"].is_null()).to_pylist()

    def images_at(self, numbers: np.ndarray) -> Iterator[Encoded]:
        """Yield the images with these numbers, int64 (k,), in their order."""
        columns = {name: self.table[name] for name in self.table.column_names}
        for row in self.kept[numbers].tolist():
            yield Encoded(**{name: column[row].as_py() for name, column in columns.items()})
