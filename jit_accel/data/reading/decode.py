"""Bytes to pixels: any usual picture, or array, becomes one of a size and a `PixelFormat`, or a `BadImage`."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from jit_accel.base.errors import LONGEST_VALUE
from jit_accel.config.presets import Size, sides_of
from jit_accel.data.formats.columns import COLOUR, Columns, PixelFormat
from jit_accel.data.reading.arrays import (
    BadImage,
    channels_first,
    in_units,
    is_array,
    numbers_in,
    numbers_of,
    read_array,
)
from jit_accel.data.reading.crop import bands_of, center_crop, crop_pixels, fast_crop, pixels_of

# Pillow reads more, but EPS by starting an interpreter, and others are no pictures of one's own.
Image.init()
_KNOWN = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000"]
_FORMATS = [name for name in (*_KNOWN, "ICO", "PCX", "QOI", "SGI", "TGA") if name in Image.OPEN]  # not all in each
MOST_ASPECT_DIFFERENCE = 0.01  # of an image and its condition
_HEIF_BRANDS = frozenset([b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"])
# Pillow refuses PNGs with more than 1 MiB in one chunk of text or colour profile, and profiles of scanners are larger.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20

try:
    import simplejpeg
except ImportError:  # the extra "fast"
    simplejpeg = None

_JPEG_START = b"\xff\xd8\xff"


class BadCondition(BadImage):
    """The picture that goes with an image is bad, and so both are."""


class OtherAspect(BadCondition):
    """It has another aspect than the image."""


class Decoded(NamedTuple):
    """Decoded pixels (C, H, W), and the width and height of what it was cut out of."""

    pixels: np.ndarray
    size: tuple[int, int]


def decode_image(
    data: bytes | str | os.PathLike | None, size: Size, fast: bool = False, pixels: PixelFormat = COLOUR
) -> np.ndarray:
    """Decode an image file (its bytes, or its path) to (C, H, W) by ADM's centre crop: uint8 RGB, or as `pixels`.

    One channel is grey, as Pillow's L; other counts than 1 and 3 are those of arrays, or of the bands or pages of a
    TIFF. With `fast` the crop is `fast_crop`, and JPEGs are decoded at half, a quarter or an eighth of their size where
    that is enough. The EXIF orientation is applied; of an animation the first frame is taken; transparency is put on
    white; 16-bit grey is scaled to 8 bits; CMYK, palette and the like are converted as Pillow does. Up to 179 million
    pixels (twice Pillow's limit, which cameras of 100 megapixels pass) are decoded.

    BadImage if empty, unreadable, truncated, no image, no file, a decompression bomb, or of floating-point pixels.
    """
    return decode_sized(data, size, fast, pixels).pixels


def decode_sized(
    data: bytes | str | os.PathLike | None,
    size: Size,
    fast: bool = False,
    pixels: PixelFormat = COLOUR,
    is_condition: bool = False,
    at: float | None = None,
) -> Decoded:
    """`decode_image`, with the size that the whole picture has, upright; nested lists are taken for arrays.

    at: where the crop lies, which `fast_crop` cannot choose; see `center_crop`.
    """
    if data is None or (isinstance(data, bytes) and not data):
        raise BadImage("empty")
    channels = pixels.condition_channels if is_condition else pixels.channels
    wanted = (size, channels, pixels.value_range, is_condition, at)
    try:
        if isinstance(data, list | np.ndarray):
            return _cut(numbers_in(data), *wanted)
        with _opened(data) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about damaged EXIF, large images, palettes: one a file
            plain = None if fast or channels != 3 or pixels.value_range else plain_jpeg(file)
            if plain is None:
                return _decode(file, fast, *wanted)
            return Decoded(crop_pixels(plain.transpose(2, 0, 1), size, at), plain.shape[1::-1])
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise BadImage(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error


def raw_numbers(data: Any) -> np.ndarray | Image.Image:
    """Return an array, or a picture with other numbers than 8 bits or of many pages, as numbers; another as it is.

    BadImage for what cannot be read.
    """
    if data is None or (isinstance(data, bytes | list) and not data):
        raise BadImage("empty")
    try:
        if isinstance(data, list | np.ndarray):
            return numbers_in(data)
        with _opened(data) as file:
            if is_array(file.read(12)):
                file.seek(0)
                return read_array(file)
            file.seek(0)
            image = Image.open(file, formats=_FORMATS)
            is_plain = not image.mode.startswith(("I", "F")) and getattr(image, "n_frames", 1) == 1
            if is_plain and len(image.getbands()) <= 3:
                image.load()
                return image
            return numbers_of(image)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise BadImage(str(error)) from error


def decode_row(
    row: Mapping[str, Any],
    columns: Columns,
    img_size: Size,
    fallback_name: Callable[[], str] = str,
    at: float | None = None,
) -> np.ndarray:
    """Decode the image of a row to (C, H, W) of this size, and behind it its condition, if it has one, cropped alike.

    Raises `BadImage` with the message "name: reason"; `fallback_name` is asked for where it has no name of its own.
    """
    data, name = columns.image_of(row.get(columns.image))
    try:
        if columns.condition is not None:
            decode = partial(_decode_value, columns=columns, img_size=img_size, at=at)
            condition = columns.image_of(row.get(columns.condition))
            return decode_pair(data, *condition, decode, partial(decode, is_condition=True))
        if columns.raw_size is not None:  # fifty times as fast as decoding: each call counts
            return crop_pixels(pixels_of(data, columns.raw_size, columns.pixels), img_size, at)
        return _decode_value(data, columns, img_size, at).pixels
    except BadImage as error:
        raise type(error)(f"{name or fallback_name()}: {error}") from error


def _decode_value(
    data: bytes | str | None, columns: Columns, img_size: Size, at: float | None, is_condition: bool = False
) -> Decoded:
    if columns.raw_size is None:
        data = kind.read(data) if (kind := columns.arrays[is_condition]) else data
        return decode_sized(data, img_size, False, columns.pixels, is_condition, at)
    stored = pixels_of(data, columns.raw_size, columns.pixels, is_condition)
    return Decoded(crop_pixels(stored, img_size, at), stored.shape[:0:-1])


def decode_pair(
    image: Any,
    condition: Any,
    name: str,
    decode: Callable[[Any], Decoded],
    decode_condition: Callable[[Any], Decoded] | None = None,
) -> np.ndarray:
    """Decode an image and the condition `name` that goes with it to (C, H, W), the image's channels first.

    BadImage if one of them is bad; BadCondition if it is the condition, or that is missing or of another aspect.
    """
    pixels, size = decode(image)
    whose = f"its condition {name[-LONGEST_VALUE:]}" if name else "its condition"
    if condition is None:
        raise BadCondition(f"{whose} is missing")
    try:
        shown, other = (decode_condition or decode)(condition)
    except BadImage as error:
        raise BadCondition(f"{whose}: {error}") from error
    if not have_one_aspect(size, other):
        words = f"{whose} has {other[0]} x {other[1]} pixels, another aspect than the image's"
        raise OtherAspect(f"{words} {size[0]} x {size[1]}")
    return np.concatenate([pixels, shown])


def have_one_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes have one aspect up to 1 %, or up to the rounding of the smaller one to whole pixels."""
    (width, height), (wide, high) = sorted((size, other), key=lambda of_one: -of_one[0] * of_one[1])
    ratio = width * high / (height * wide)
    is_rounded = (wide - 0.5) / width < (high + 0.5) / height and (high - 0.5) / height < (wide + 0.5) / width
    is_reduced = width * height >= 2 * wide * high
    return (is_reduced and is_rounded) or max(ratio, 1 / ratio) <= 1 + MOST_ASPECT_DIFFERENCE


def facts_in_row(row: Mapping[str, Any], columns: Columns, fallback_name: Callable[[], str] = str) -> Any:
    """Return what a row says of its image beside the pixels, of `columns.facts_type`; raises `BadImage` as above."""
    if not columns.vectors and columns.most_labels is None:  # as fast as can be
        return columns.label_of(row.get(columns.label))
    try:
        return columns.facts_of(row)
    except ValueError as error:
        name = columns.image_of(row.get(columns.image))[1]
        raise BadImage(f"{name or fallback_name()}: {error}") from error


def plain_jpeg(file: BinaryIO) -> np.ndarray | None:
    """Decode a JPEG to uint8 (H, W, 3), where simplejpeg is installed and gives what Pillow would, but sooner.

    None for all else: Pillow then judges what is damaged, turns what is rotated, and converts what is no plain colour.
    """
    if simplejpeg is None or file.read(3) != _JPEG_START:
        file.seek(0)
        return None
    data = _JPEG_START + file.read()
    file.seek(0)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        may_be_rotated = b"Exif\0\0" in data or b"tiff:Orientation" in data  # the latter by XMP
        is_plain = colours == "YCbCr" and not may_be_rotated and height * width <= Image.MAX_IMAGE_PIXELS
        return simplejpeg.decode_jpeg(data) if is_plain else None
    except ValueError:
        return None


def _opened(data: bytes | str | os.PathLike) -> BinaryIO:
    if isinstance(data, bytes):
        return io.BytesIO(data)
    # Without O_NONBLOCK, opening a named pipe waits for ever.
    descriptor = os.open(data, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb")
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return file
    file.close()
    raise BadImage("neither a file nor a link to one")


def _decode(
    file: BinaryIO,
    fast: bool,
    size: Size,
    channels: int,
    value_range: tuple[float, float] | None,
    is_condition: bool,
    at: float | None,
) -> Decoded:
    try:
        image = Image.open(file, formats=_FORMATS)
        if image.format == "PNG":  # Pillow decodes pixels without a look at their checksums
            image.verify()
            file.seek(0)
            image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(12)
        if not head:
            raise BadImage("empty") from error
        if is_array(head):
            file.seek(0)
            return _cut(read_array(file), size, channels, value_range, is_condition, at)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            raise BadImage("HEIC, which cannot be decoded here: convert it to JPEG or PNG") from error
        raise BadImage(f"{type(error).__name__}: not an image") from error
    with image:
        full_size, is_turned = image.size, False
        is_plain = value_range is None and channels in (1, 3)
        with contextlib.suppress(Exception):  # damaged EXIF does not make pixels bad; damaged pixels fail again
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        if fast and is_plain:
            image.draft(None, sides_of(size)[:: 1 if is_turned else -1])
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        if not is_plain:
            has_bits = channels in (1, 3) and not image.mode.startswith(("I", "F"))
            numbers = np.asarray(to_grey(image) if channels == 1 else to_rgb(image)) if has_bits else numbers_of(image)
            return _cut(numbers, size, channels, value_range, is_condition, at)
        upright = to_rgb(image) if channels == 3 else to_grey(image)
        cropped = fast_crop(upright, size, full_size) if fast else center_crop(upright, size, at)
        return Decoded(bands_of(cropped), full_size[::-1] if is_turned else full_size)


def _cut(
    numbers: np.ndarray,
    size: Size,
    channels: int,
    value_range: tuple[float, float] | None,
    is_condition: bool,
    at: float | None,
) -> Decoded:
    """Return what is cut out of an array that has as many channels, or is grey in place of colour or the other way."""
    planes = channels_first(numbers, channels)
    return Decoded(crop_pixels(in_units(planes, value_range, is_condition), size, at), planes.shape[:0:-1])


def to_grey(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to L, as `to_rgb` does to RGB."""
    return image if image.mode == "L" and "transparency" not in image.info else to_rgb(image).convert("L")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, transparency composited on white; BadImage for floating-point pixels."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode == "F":
        raise BadImage(
            "floating-point pixels have no agreed range; save the image with 8 or 16 bits, or say it: --value_range"
        )
    if mode.startswith("I"):  # 16-bit grey; Pillow < 10.3 opens it as 32-bit "I" with the same values
        grey = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = (image.convert("LA") if mode == "La" else image).convert("RGBA")  # Pillow knows no direct way
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
