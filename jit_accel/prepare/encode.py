"""From images of the source to the bytes that are stored; those of a stream, read in its order, wait in a spool."""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file
from jit_accel.config.presets import sides_of
from jit_accel.data.formats.columns import COLOUR, Columns, PixelFormat
from jit_accel.data.formats.pixel_store import PixelStore
from jit_accel.data.formats.prepared import MAPPED
from jit_accel.data.formats.source import Source
from jit_accel.data.formats.sources import open_images
from jit_accel.data.reading.arrays import channels_first, in_units
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
_FIELDS = {name: getattr(pa, type)() for name, type in _TYPES.items()}  # as the fields of `Encoded`
_FIELDS["vectors"] = pa.list_(pa.float64())


Picture = bytes | str | np.ndarray | None


Label = int | list[int]  # the latter where images may have several


class Original(NamedTuple):
    """One image of the source: its encoded bytes, the path of its file, or numbers (C, H, W)."""

    image: Picture
    name: str
    label: Label
    key: int | None
    condition: tuple[Picture, str] | None = None  # and its name, where images have conditions
    vectors: list[float] | None = None
    problem: str = ""  # in what is known of it, for which it is left out


class Encoded(NamedTuple):
    """One image as it is stored; `data` is None where it is left out, for the `reason`.

    `condition` is what goes with it, where that is not at the end of `data`, as among bare pixels.
    """

    data: bytes | None
    name: str
    label: Label
    key: int
    reason: str = ""
    condition: bytes | None = None
    vectors: list[float] | None = None  # its numbers, in the units of the data


def originals_at(source: Source, indices: np.ndarray) -> Iterator[Original]:
    """Yield images of a source with random access by their numbers, int64 (k,)."""
    images = source.images
    for block in np.split(indices, range(_BLOCK, len(indices), _BLOCK)):
        if isinstance(images, PixelStore):
            pixels = np.empty((len(block), images.channels, *sides_of(images.img_size)), source.pixels.dtype)
            facts, _ = images.read(block, pixels)
            keys, names = images.keys()[block].tolist(), images.names()[block]
            for numbers, fact, key, name in zip(pixels, facts.tolist(), keys, names):
                alone, shown = np.split(numbers, [source.pixels.channels])
                label, vectors = _parts_of(fact)
                condition = (shown, "") if source.condition_channels else None
                yield Original(alone, name, label, key, condition, vectors)
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
    name, key, problem = row.get(columns.name) or pictures[0][1] or number, row.get(columns.key), ""
    if columns.arrays[0] and key is None:
        key = key_of(pictures[0][0])  # before it is an array
    for place, (data, of) in enumerate(pictures):
        try:
            pictures[place] = _numbers(data, columns, place > 0), of
        except BadImage as error:
            problem = problem or f"its condition: {error}" if place else str(error)
    label, vectors = 0, None
    try:
        label, vectors = _parts_of(columns.facts_of(row))
    except ValueError as error:
        problem = str(error)
    return Original(pictures[0][0], name, label, key, pictures[1] if len(pictures) > 1 else None, vectors, problem)


def _numbers(data: Picture | list, columns: Columns, is_condition: bool) -> Picture | list:
    """Return numbers of a table as (C, H, W), in the format that they are read in; a file as it is; or `BadImage`."""
    if columns.raw_size is not None:
        return pixels_of(data, columns.raw_size, columns.pixels, is_condition)
    kind, pixels = columns.arrays[is_condition], columns.pixels
    if not kind or not isinstance(found := kind.read(data), np.ndarray):
        return data
    planes = channels_first(found, pixels.condition_channels if is_condition else pixels.channels)
    return in_units(planes, pixels.value_range, is_condition)


def _parts_of(fact: int | tuple) -> tuple[Label, list[float] | None]:
    """Return the label, or labels, and the numbers in a value of a data set's `facts_type`."""
    label, *vectors = fact if isinstance(fact, tuple) else (fact,)
    if not isinstance(label, int):
        label = [int(one) for one in label if one >= 0]
    return label, list(vectors[0]) if vectors else None


def encode(original: Original, config: PrepareConfig, root: str, pixels: PixelFormat = COLOUR) -> Encoded:
    """Decode to numbers of this format, crop, encode. Names of files under the folder `root` are made relative."""
    name = original.name.removeprefix(root)

    def decode(picture: Picture, is_condition: bool = False) -> Decoded:
        if isinstance(picture, np.ndarray):
            return Decoded(crop_pixels(picture, config.img_size), picture.shape[:0:-1])
        return decode_sized(picture, config.img_size, config.resize == "fast", pixels, is_condition)

    try:
        if original.problem:
            raise BadImage(original.problem)
        if original.label == -1:
            raise BadImage("it has no label")
        if original.condition is None:
            numbers = decode(original.image).pixels
        else:
            numbers = decode_pair(original.image, *original.condition, decode, partial(decode, is_condition=True))
        key = key_of(original.image) if original.key is None else original.key
    except BadImage as error:
        reason = str(error)
        return Encoded(None, name, [] if isinstance(original.label, list) else 0, 0, reason.replace(root, ""))
    if config.format in MAPPED:
        data, condition = stored_numbers(numbers, config.format).tobytes(), ()
    else:
        parts = np.split(numbers, [pixels.channels])[: 1 if original.condition is None else 2]
        data, *condition = (encoded_bytes(part, config.format, config.resolved_quality) for part in parts)
    return Encoded(data, name, original.label, key, "", *condition or [None], original.vectors)


def encode_all(originals: Iterable[Original], config: PrepareConfig, source: Source) -> Iterator[Encoded]:
    """Encode images of a source; `UserError` where it cannot be read."""
    root = os.path.join(os.path.abspath(source.name), "") if source.format == "folder" else ""
    try:
        for original in originals:
            yield encode(original, config, root, source.pixels)
    except (OSError, pa.ArrowException) as error:
        rule = f"cannot be read ({error}). What is finished is kept: repair it and run the same command again."
        raise UserError(rule, about="data_path", value=config.data_path) from error


def stored_numbers(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Return numbers in the type that they are stored in, rounded and cut off where that is of whole ones."""
    if numbers.dtype == dtype:
        return numbers
    ends = np.iinfo(dtype)
    return np.rint(numbers).clip(ends.min, ends.max).astype(dtype)


def encoded_bytes(pixels: np.ndarray, format: str, quality: int | None) -> bytes:
    """Return pixels (C, H, W) as they are stored; WebP of quality 100 is lossless, PNGs of floats have 16 bits."""
    if format not in _OPTIONS:
        return pixels.tobytes()
    options = _OPTIONS[format] | ({} if quality is None else {"quality": quality})
    if format == "webp":
        options["lossless"] = quality == 100
    if pixels.dtype != np.uint8:
        pixels = stored_numbers(pixels, "uint16")
    planes = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes)).save(buffer, format.upper(), **options)
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


def write_part(path: Path, images: Iterable[Encoded], most_labels: int | None = None) -> None:
    """Write a part that is there whole or not at all."""
    schema = _schema(most_labels)
    with atomic_file(path) as temporary, open(temporary, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batched(images, 2**16, 2**24):
            writer.write_batch(pa.RecordBatch.from_pylist([image._asdict() for image in batch], schema))


def _schema(most_labels: int | None) -> pa.Schema:
    """Return the columns of a spool; labels are lists of them where images may have several."""
    return pa.schema(_FIELDS if most_labels is None else _FIELDS | {"label": pa.list_(pa.int64())})


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
    """Open what is to be prepared. UserError for data that is not there, or not as the settings say."""
    names = "data_format", "image_column", "label_column", "renumber_labels", "split", "vector_column"
    names += (
        "condition_path",
        "condition_column",
        "in_channels",
        "value_range",
        "raw_shape",
        "raw_dtype",
        "label_separator",
    )
    return open_images(config.data_path, **{name: getattr(config, name) for name in names})


def with_format(config: PrepareConfig, source: Source) -> PrepareConfig:
    """Return the settings with a format that holds the numbers of this data; UserError where the one given does not."""
    pixels, wanted = source.pixels, config.format
    channels = {pixels.channels} | ({pixels.condition_channels} if source.condition_channels else set())
    if pixels.value_range is None:
        if wanted in MAPPED[1:]:
            rule = f"the images of {source.name} have 8 bits: use uint8, which is the default."
        elif wanted in _OPTIONS and not channels <= {1, 3}:
            rule = f"holds 1 or 3 channels, and there are {max(channels)}: use uint8 or raw."
        else:
            return replace(config, format=wanted or "uint8")
        raise UserError(rule, about="format", value=wanted)
    low, high = pixels.value_range
    ends = np.iinfo("int16" if wanted == "int16" else "uint16")
    if wanted in ("uint16", "int16", "png"):
        if wanted == "png" and channels != {1}:
            rule = f"holds 16 bits of 1 channel alone, and there are {max(channels)}"
        elif wanted == "png" and source.condition_channels and (low, high) != (0, ends.max):
            rule = "holds conditions of 16 bits beside such images alone"
        elif low < ends.min or high > ends.max or high - low < 255:
            rule = f"holds whole numbers from {ends.min} to {ends.max}, and the values go from {low:g} to {high:g}"
        else:
            return config
    elif wanted in (None, "float32", "raw"):
        return replace(config, format=wanted or "float32")
    else:
        rule = f"holds numbers of 8 bits, and those of {source.name} have more"
    raise UserError(f"{rule}: use float32 or raw.", about="format", value=wanted)


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
        tables = [file.read_all() for file in files] or [_schema(None).empty_table()]
        return pa.concat_tables(tables, promote_options="default")  # older parts have fewer columns

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
