"""The format that a data set's images are decoded to: as many channels as are asked for, in a range that is known."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from PIL import Image

from jit_accel.base.errors import UserError, shown
from jit_accel.data.formats.columns import COLOUR, IMAGE_CHANNELS, Columns, PixelFormat
from jit_accel.data.formats.source import Source, fingerprint_of
from jit_accel.data.reading.arrays import ARRAY_EXTENSIONS, ArrayType, BadImage, channels_first, channels_of, own_range
from jit_accel.data.reading.decode import raw_numbers
from jit_accel.data.reading.images import Stream

_MOST_ROWS = 64  # that are looked at, from all over the data where that costs nothing
_MOST_IMAGES = 8  # of these whose numbers are
_SHOWING = ARRAY_EXTENSIONS | {".tif", ".tiff"}  # files whose numbers may have no range by custom


def in_format(source: Source, in_channels: int, value_range: tuple[float, float] | None) -> Source:
    """Return the data set, decoded to so many channels, and of a range (None: that of 8 or 16 bits, if they have it).

    UserError where its first images do not have them, and for floats whose range is not given.
    """
    columns, is_usual = getattr(source.images, "columns", None), in_channels == IMAGE_CHANNELS and value_range is None
    if columns is None or columns.raw_size is not None or source.pixels != COLOUR:
        return _of_store(source, in_channels, value_range)
    if columns.arrays[0] and columns.arrays[0].shape:
        _check_bytes(source, columns)
    if is_usual and not _may_be_arrays(source, columns):
        return source
    images, conditions = [], []
    for row in some_rows(source, _MOST_ROWS):
        images += _looked_at(row, columns, columns.image, columns.arrays[0])
        conditions += _looked_at(row, columns, columns.condition, columns.arrays[1])
        if len(images) >= _MOST_IMAGES:
            break
    pixels = PixelFormat(in_channels, value_range=value_range)
    if images:
        pixels = _format_of(source, images, conditions, in_channels, value_range)
    if pixels == COLOUR:
        return source
    identity = fingerprint_of([source.fingerprint, *map(str, (pixels.channels, pixels.value_range))])
    images = replace(source.images, columns=replace(columns, pixels=pixels))
    return replace(source, images=images, pixels=pixels, fingerprint=identity)


def _of_store(source: Source, in_channels: int, value_range: tuple[float, float] | None) -> Source:
    """Return prepared numbers as asked for. UserError where they are others."""
    stored = source.pixels
    if in_channels != stored.channels:
        rule = f"the images of {source.name} were prepared with {stored.channels}: give --in_channels "
        rule += f"{stored.channels}, or prepare them anew."
        raise UserError(rule, about="in_channels", value=in_channels)
    if value_range in (None, stored.value_range):
        return source
    if stored.value_range is None or source.condition_channels:
        own = stored.value_range or own_range(np.dtype(np.uint8))
        rule = f"the images of {source.name} were prepared with the range {own[0]:g} {own[1]:g}: leave it out, or "
        raise UserError(rule + "prepare them anew.", about="value_range", value=value_range)
    pixels = replace(stored, value_range=value_range)
    images = source.images
    if hasattr(images, "columns"):
        images = replace(images, columns=replace(images.columns, pixels=pixels))
    identity = fingerprint_of([source.fingerprint, *map(str, (pixels.channels, value_range))])
    return replace(source, images=images, pixels=pixels, fingerprint=identity)


def some_rows(source: Source, most: int) -> Iterator[dict]:
    """Yield a few undecoded rows, from all over the data where that costs nothing."""
    images = source.images
    if isinstance(images, Stream):
        # Of remote files, first one that was fetched when the columns were looked for
        begun = 0 if images.files is None else int(images.sizes.argmax())
        units = np.roll(np.arange(images.num_units), -begun).tolist()
        yield from islice((row for unit in units for row in images.rows(unit)), most)
    else:
        numbers = np.unique(np.linspace(0, len(images) - 1, most).astype(int))
        yield from (images.dataset[number] for number in numbers.tolist())


def _check_bytes(source: Source, columns: Columns) -> None:
    """Raise `UserError` where bare bytes are asked for, and none of the first images has as many as its shape."""
    kind, reason = columns.arrays[0], None
    for row in some_rows(source, _MOST_IMAGES):
        try:
            if kind.read(columns.image_of(row.get(columns.image))[0]) is not None:
                return
        except BadImage as error:
            reason = reason or error
    if reason:
        rule = f"the first images of {source.name} are of another shape or type ({reason}): correct it, or --raw_dtype."
        raise UserError(rule, about="raw_shape", value=shown(kind.shape))


def _may_be_arrays(source: Source, columns: Columns) -> bool:
    """Return whether names show that images or conditions may be other than pictures of 8 bits; nothing is read."""
    if any(kind and kind.dtype != "uint8" for kind in columns.arrays):
        return True
    if isinstance(source.images, Stream):
        return any(name.rsplit(".", 1)[-1] in ("npy", "npz") for name in columns.pictures)
    row = source.images.dataset[0]
    found = [columns.image_of(row[name]) for name in columns.pictures]
    return any(isinstance(data, list) or os.path.splitext(name)[1].lower() in _SHOWING for data, name in found)


def _looked_at(row: dict, columns: Columns, name: str | None, kind: ArrayType | None) -> list[np.ndarray | Image.Image]:
    """Return the picture of a row, or the numbers of an array; [] where it is bad, or there is none."""
    try:
        data = None if name is None else columns.image_of(row.get(name))[0]
        return [] if name is None else [raw_numbers(kind.read(data) if kind else data)]
    except BadImage:  # which the training counts
        return []


def _format_of(
    source: Source, images: list, conditions: list, in_channels: int, value_range: tuple[float, float] | None
) -> PixelFormat:
    first = images[0]
    _refuse_two_ranges(source, images, conditions, value_range)
    if value_range is None:
        value_range = _range_of(source, images)
        if value_range is None and _range_of(source, conditions):
            value_range = own_range(np.dtype(np.uint8))  # of the images, as floats: conditions lose no bits
    try:
        if isinstance(first, np.ndarray):
            channels_first(first, in_channels)
    except BadImage as error:
        rule = f"an image of {source.name} {error}: give --in_channels {channels_of(first)}, or other images."
        raise UserError(rule, about="in_channels", value=in_channels) from None
    if not isinstance(first, np.ndarray) and in_channels not in (1, IMAGE_CHANNELS):
        rule = f"the images of {source.name} are pictures, of 1 channel (grey) or 3: other counts are for arrays "
        raise UserError(f"{rule}(.npy, .npz) and TIFFs of as many bands.", about="in_channels", value=in_channels)
    shown = IMAGE_CHANNELS
    if conditions:
        given = conditions[0]
        is_grey = not isinstance(given, np.ndarray) and given.mode in ("1", "L") and in_channels == 1
        shown = channels_of(given) if isinstance(given, np.ndarray) else 1 if is_grey else IMAGE_CHANNELS
    return PixelFormat(in_channels, shown, value_range)


def _refuse_two_ranges(source: Source, images: list, conditions: list, value_range: tuple[float, float] | None) -> None:
    """Raise `UserError` for conditions of floats beside images of a range of their own, unless that is given."""
    floats = [given.dtype for given in conditions if isinstance(given, np.ndarray) and own_range(given.dtype) is None]
    own = own_range(getattr(images[0], "dtype", np.dtype(np.uint8)))
    if floats and own and value_range != own:
        rule = f"the images of {source.name} have the values {own[0]:g} to {own[1]:g}, and their conditions are "
        rule += f"{floats[0]}, of which no range is known: bring these to the same range (--value_range {own[0]:g} "
        raise UserError(f"{rule}{own[1]:g}), or save them with 8 or 16 bits.", about="value_range", value=value_range)


def _range_of(source: Source, found: list) -> tuple[float, float] | None:
    """Return the range of 16 bits, or None for 8. UserError for floats, which names the values of the first images."""
    arrays = [numbers for numbers in found if isinstance(numbers, np.ndarray)]
    if not arrays:
        return None
    if (own := own_range(arrays[0].dtype)) is None:
        low, high = min(map(np.nanmin, arrays)), max(map(np.nanmax, arrays))
        rule = f"the images of {source.name} are {arrays[0].dtype}, which has no range by custom, with values from "
        rule += f"{low:g} to {high:g} in the first {len(arrays)}: say which are to be -1 and 1, such as "
        raise UserError(
            f"{rule}--value_range {_rounded(low, np.floor)} {_rounded(high, np.ceil)}.", about="value_range"
        )
    return own if own[1] > 255 else None


def _rounded(value: float, towards) -> str:
    step = 10.0 ** np.floor(np.log10(abs(value))) if value else 1.0
    return f"{towards(value / step) * step:g}"
