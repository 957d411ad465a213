"""Numbers of images that are more, or of other kinds, than colours of 8 bits: arrays, and pictures of many channels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from jit_accel.config.presets import GREY_WEIGHTS

ARRAY_EXTENSIONS = frozenset([".npy", ".npz"])
MOST_NUMBERS = 2**28  # in one array: more is no image, and might be a bomb
_NPY_START, _NPZ_START = b"\x93NUMPY", b"PK\x03\x04"
_WHOLE = {np.dtype(np.uint8): (0.0, 255.0), np.dtype(np.uint16): (0.0, 65535.0)}  # types that say their range


class BadImage(Exception):
    """These bytes are no picture that can be trained on. The message is a short reason."""


@dataclass(frozen=True)
class ArrayType:
    """The numbers of a table's column that holds no files: nested lists, or, where there is a shape, bare bytes."""

    dtype: str
    shape: tuple[int, ...] | None = None  # (H, W), (H, W, C) or (C, H, W), in C order, the low byte of a number first

    def read(self, value: Any) -> Any:
        """Return the array in a value of the column; None, and what is neither, as it is. BadImage for another size."""
        if isinstance(value, list):
            return numbers_in(value, self.dtype)
        if self.shape is None or not isinstance(value, bytes | memoryview):
            return value
        dtype = np.dtype(self.dtype).newbyteorder("<")
        if len(value) != (wanted := math.prod(self.shape) * dtype.itemsize):
            shape = " x ".join(map(str, self.shape))
            raise BadImage(f"{len(value):,} bytes where {shape} numbers of {self.dtype} have {wanted:,}")
        return np.frombuffer(value, dtype).reshape(self.shape).astype(self.dtype, copy=False)


def is_array(head: bytes) -> bool:
    """Return whether a file with this beginning is a .npy or .npz."""
    return head.startswith((_NPY_START, _NPZ_START))


def read_array(file: BinaryIO) -> np.ndarray:
    """Read a .npy, or the `arr_0`, else the only array, of an .npz. Never a pickle. BadImage for other arrays."""
    try:
        _check_size(file)
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        names = ["arr_0"] if "arr_0" in found.files else found.files
        if len(names) != 1:
            raise BadImage(f"has the arrays {', '.join(names) or 'none'}: an .npz holds one image, as arr_0")
        with found.zip.open(f"{names[0]}.npy") as member:
            _check_header(member)
        return found[names[0]]
    except (ValueError, EOFError, KeyError, MemoryError) as error:
        raise BadImage(
            f"no array that can be read ({str(error).splitlines()[0] if str(error) else 'cut short'})"
        ) from error


def _check_size(file: BinaryIO) -> None:
    if file.read(len(_NPY_START)) == _NPY_START:
        file.seek(0)
        _check_header(file)
    file.seek(0)


def _check_header(file: BinaryIO) -> None:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "biuf" or not 2 <= len(shape) <= 3 or not 0 < math.prod(shape) <= MOST_NUMBERS:
        raise BadImage(f"an array of {dtype} {shape}: an image is numbers (H, W), (H, W, C) or (C, H, W)")


def numbers_of(image: Image.Image) -> np.ndarray:
    """Return the numbers of an opened picture, (H, W) or (H, W, C); pages of one size and kind are its channels."""
    pages = []
    for number in range(getattr(image, "n_frames", 1) if image.format == "TIFF" else 1):
        if number:
            image.seek(number)
        page = np.asarray(image.convert("L") if image.mode == "1" else image)
        pages.append(page[..., None] if page.ndim == 2 else page)
        if pages[0].shape[:2] != page.shape[:2]:
            raise BadImage("its pages are of several sizes")
    return np.concatenate(pages, axis=2)


def channels_of(numbers: np.ndarray) -> int:
    """Return how many channels an array (H, W), (H, W, C) or (C, H, W) most likely has."""
    return 1 if numbers.ndim == 2 else min(numbers.shape[0], numbers.shape[2])


def channels_first(numbers: np.ndarray, channels: int) -> np.ndarray:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (channels, H, W), where C is that, or grey and colour differ.

    BadImage for other counts.
    """
    numbers = numbers[None] if numbers.ndim == 2 else numbers
    for count in dict.fromkeys((channels, *((1, 3) if channels in (1, 3) else ()))):
        is_last, is_first = numbers.shape[2] == count, numbers.shape[0] == count
        if is_first or is_last:
            planes = (
                numbers
                if is_first and not (is_last and numbers.shape[0] > numbers.shape[1])
                else numbers.transpose(2, 0, 1)
            )
            return planes if count == channels else _recoloured(planes, channels)
    raise BadImage(f"has the shape {numbers.shape}, and {channels} channels are wanted")


def _recoloured(planes: np.ndarray, channels: int) -> np.ndarray:
    if channels == 3:
        return np.repeat(planes, 3, axis=0)
    if planes.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).convert("L"))[None]
    return np.tensordot(np.float32(GREY_WEIGHTS), planes.astype(np.float32), axes=1)[None]


def in_units(planes: np.ndarray, value_range: tuple[float, float] | None, is_condition: bool = False) -> np.ndarray:
    """Return numbers in the type of the training's: uint8, or float32 where the range of the values is given.

    A condition of uint8 or uint16 is scaled from its own range to that. BadImage for other types, or not finite ones.
    """
    if value_range is None:
        if planes.dtype != np.uint8:
            raise BadImage(f"{planes.dtype} values, where the first images have 8 bits: say their --value_range")
        return planes
    found = planes.astype(np.float32)
    if not np.isfinite(found).all():
        raise BadImage("has values that are not finite")
    if is_condition and (own := own_range(planes.dtype)):
        low, high = value_range
        found = low + found * np.float32((high - low) / own[1])
    return found


def own_range(dtype: np.dtype) -> tuple[float, float] | None:
    """Return the range of a type whose numbers are brightnesses by custom; None of floats and others."""
    return _WHOLE.get(dtype.newbyteorder("="))


def planes_of(pixels: np.ndarray) -> Iterator[Image.Image]:
    """Yield the channels of (C, H, W), uint8 or float32, as pictures of Pillow."""
    for plane in pixels:
        yield Image.fromarray(np.ascontiguousarray(plane))


def is_nested(value: Any) -> bool:
    """Return whether a value of a table is nested lists, as arrays are there."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


def numbers_in(value: Any, dtype: str | None = None) -> np.ndarray:
    """Return numbers that a table's row holds as nested lists. BadImage where these are no array."""
    try:
        found = np.asarray(value, dtype)
    except (ValueError, TypeError, OverflowError):
        found = np.empty((), object)
    if found.dtype.kind not in "biuf" or found.ndim not in (2, 3) or not found.size:
        raise BadImage("lists that are no array (H, W), (H, W, C) or (C, H, W)")
    return found
