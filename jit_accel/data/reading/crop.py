"""Squares cut out of pictures, and of arrays: as ADM does, or in one step."""

import numpy as np
from PIL import Image

from jit_accel.data.formats.columns import IMAGE_CHANNELS
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


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve with a box filter while the shorter side is at least twice `size`, scale it to `size`
    bicubically, cut out the centre. Exact up to an aspect ratio of 16; one of `size` x `size` comes back unchanged.
    """
    if image.size == (size, size):
        return image
    longest = MAX_EXACT_ASPECT * min(image.size)
    if max(image.size) > longest:
        image = _cut_out(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return _cut_out(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _cut_out(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fast_crop(image: Image.Image, size: int, full_size: tuple[int, int]) -> Image.Image:
    """About what `center_crop` returns: the centre square alone is scaled, in one step.

    `full_size` is width and height as stored, on which it depends how the exact crop rounds: half a pixel is visible.
    """
    halved = sorted(full_size)
    while halved[0] >= 2 * size:
        halved = [side // 2 for side in halved]
    longer = max(size, round(halved[1] * (size / halved[0])))
    start, scale = (longer - size) // 2 / longer, max(image.size)
    along, across = (start * scale, start * scale + size / longer * scale), (0, min(image.size))
    (left, right), (top, bottom) = (along, across) if image.width >= image.height else (across, along)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=2.0)


def crop_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    """`center_crop` of (C, H, W), uint8 or float32: (C, size, size), the same array where there is nothing to do.

    Other counts than colour's three are cropped channel by channel.
    """
    if pixels.shape[1:] == (size, size):
        return pixels
    if len(pixels) != IMAGE_CHANNELS or pixels.dtype != np.uint8:
        return np.stack([np.asarray(center_crop(plane, size)) for plane in planes_of(pixels)])
    return bands_of(center_crop(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), size))


def pixels_of(data: bytes | None, size: int) -> np.ndarray:
    """Stored pixels as uint8 (3, size, size), read-only and without a copy; BadImage if of another length."""
    if data is None or len(data) != 3 * size * size:
        raise BadImage(f"{len(data or b'')} bytes where {size} x {size} pixels have {3 * size * size}")
    return np.frombuffer(data, np.uint8).reshape(3, size, size)
