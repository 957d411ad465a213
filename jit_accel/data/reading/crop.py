"""Squares, or rectangles, cut out of pictures, and of arrays: as ADM does, or in one step."""

import math

import numpy as np
from PIL import Image

from jit_accel.config.presets import Size, sides_of
from jit_accel.data.formats.columns import COLOUR, IMAGE_CHANNELS, PixelFormat
from jit_accel.data.reading.arrays import BadImage, planes_of

# Up to this ratio of the sides the crop is exactly ADM's; beyond it (strips, scans of receipts) the picture
# is cropped first, because ADM's order would blow a 1 x 5000 line up to a 64 x 320,000 image.
MAX_EXACT_ASPECT = 16


def bands_of(image: Image.Image) -> np.ndarray:
    """uint8 (C, H, W). Pillow takes the colours apart twice as fast as NumPy transposes them."""
    bands = image.split()
    pixels = np.empty((len(bands), image.height, image.width), np.uint8)
    for plane, band in zip(pixels, bands):
        plane[:] = band
    return pixels


def center_crop(image: Image.Image, size: Size, at: float | None = None) -> Image.Image:
    """ADM's crop: halve with a box filter while both sides are at least twice those of `size`, scale bicubically until
    it just covers `size`, cut out the centre. Or what lies elsewhere: `at` 0 is left or top, 1 right or bottom.

    Exact up to an aspect ratio of 16, in units of that of `size`; one of this size comes back unchanged.
    """
    height, width = sides_of(size)
    if image.size == (width, height):
        return image
    widest = max(1, MAX_EXACT_ASPECT * image.height * width // height)
    tallest = max(1, MAX_EXACT_ASPECT * image.width * height // width)
    if image.width > widest or image.height > tallest:
        image = _cut_out(image, min(image.width, widest), min(image.height, tallest), at)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = round(image.width * scale), round(image.height * scale)
    return _cut_out(image.resize(covering, Image.Resampling.BICUBIC), width, height, at)


def _cut_out(image: Image.Image, width: int, height: int, at: float | None) -> Image.Image:
    rooms = image.width - width, image.height - height
    left, top = (room // 2 if at is None else min(room, int(at * (room + 1))) for room in rooms)
    return image.crop((left, top, left + width, top + height))


def has_room(stored: Size, size: Size) -> bool:
    """Return whether a picture of the size `stored` is longer than `size` on one side once it just covers that."""
    sides, wanted = sides_of(stored), sides_of(size)
    scale = max(target / side for side, target in zip(sides, wanted))
    return any(round(side * scale) > target for side, target in zip(sides, wanted))


def fast_crop(image: Image.Image, size: Size, full_size: tuple[int, int]) -> Image.Image:
    """About what `center_crop` returns: what it cuts out alone is scaled, in one step.

    `full_size` is width and height as stored, on which it depends how the exact crop rounds: half a pixel is visible.
    """
    wanted = sides_of(size)[::-1]
    full = sorted(full_size, reverse=image.width >= image.height)  # as the image lies, which may be turned
    while all(side >= 2 * target for side, target in zip(full, wanted)):
        full = [side // 2 for side in full]
    scale = max(target / side for side, target in zip(full, wanted))
    edges = []
    for side, target, stored in zip(full, wanted, image.size):
        covering = max(target, round(side * scale))
        start = (covering - target) // 2 / covering * stored
        edges.append((start, start + target / covering * stored))
    (left, right), (top, bottom) = edges
    return image.resize(wanted, Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=2.0)


def crop_pixels(pixels: np.ndarray, size: Size, at: float | None = None) -> np.ndarray:
    """`center_crop` of (C, H, W), uint8 or float32: (C, height, width), the same array where there is nothing to do.

    Other counts than colour's three are cropped channel by channel.
    """
    if pixels.shape[1:] == sides_of(size):
        return pixels
    if len(pixels) != IMAGE_CHANNELS or pixels.dtype != np.uint8:
        return np.stack([np.asarray(center_crop(plane, size, at)) for plane in planes_of(pixels)])
    return bands_of(center_crop(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), size, at))


def pixels_of(data: bytes | None, size: Size, pixels: PixelFormat = COLOUR, is_condition: bool = False) -> np.ndarray:
    """Return stored numbers, (C, height, width) of the format's type, without a copy; BadImage if of another length."""
    shape = pixels.condition_channels if is_condition else pixels.channels, *sides_of(size)
    if data is None or len(data) != math.prod(shape) * pixels.dtype.itemsize:
        wanted = math.prod(shape) * pixels.dtype.itemsize
        raise BadImage(f"{len(data or b'')} bytes where {' x '.join(map(str, shape[1:]))} pixels have {wanted}")
    return np.frombuffer(data, pixels.dtype).reshape(shape)
