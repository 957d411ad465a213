"""Images to compare, each once: a data set of any kind that training reads, or the array of an `.npz`."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.data.batches.batch import decode_row
from jit_accel.data.batches.workers import cores_per_process
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.data.reading.decode import BadImage, crop_pixels
from jit_accel.data.reading.units import Stream

BROKEN = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # what an .npz may raise
ARRAY = "arr_0"  # the name of images in ADM's .npz, and in those of jit_accel.sample


class Share(NamedTuple):
    """A batch of a process's share: numbers int64 (B,), images uint8 (B, 3, S, S), labels int64 (B,), what was bad."""

    numbers: Tensor
    images: Tensor
    labels: np.ndarray | None
    bad_images: list[str]


@dataclass(frozen=True)
class ImageSet:
    """Images that were opened but not read.

    num_images: None where only reading would tell. img_size: the side of the first image in pixels, None where it is no
    square. num_classes: 0 where images have no labels. `shares(img_size, batch_size, rank, world_size)` reads them,
    scaled and cropped as for training; all numbers differ, and are below `num_images` where that is known.
    fingerprint: of the data set, "" where there is none.
    """

    name: str
    num_images: int | None
    img_size: int | None
    num_classes: int
    shares: Callable[[int, int, int, int], Iterator[Share]]
    fingerprint: str = ""


def open_image_set(path: str, about: str) -> ImageSet:
    """Open what `--data_path` of training may be, or an `.npz` with `arr_0`: uint8 (N, H, W, 3).

    Raises:
        UserError: about the setting `about`.
    """
    if path.endswith(".npz"):
        return open_array(path, about)
    with renamed_settings(data_path=about):
        return images_of_source(open_images(path))


def images_of_source(source: Source) -> ImageSet:
    """All images of an opened data set."""
    sizes = source.images.sizes if source.streaming else None
    counts = len(source.images) if not source.streaming else None if sizes is None else int(sizes.sum())
    shares = partial(_stream_shares if source.streaming else _random_shares, source)
    classes = max(source.num_classes or 0, len(source.class_names)) if source.is_labelled else 0
    return ImageSet(source.name, counts, source.img_size or _first_side(source), classes, shares, source.fingerprint)


def _first_side(source: Source) -> int | None:
    images = source.images
    row = next(images.rows(0), None) if source.streaming else getattr(images, "dataset", [None])[0]
    if row is None:
        return None
    data, _ = images.columns.image_of(row[images.columns.image])
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return image.width if image.width == image.height else None
    except (OSError, ValueError, TypeError):
        return None


def _random_shares(source: Source, img_size: int, batch_size: int, rank: int, world_size: int) -> Iterator[Share]:
    images = source.images
    mine = np.arange(rank, len(images), world_size)

    def read(indices: np.ndarray) -> Share:
        out = np.empty((len(indices), 3, img_size, img_size), np.uint8)
        labels, bad = images.read(indices, out)
        good = np.setdiff1d(np.arange(len(indices)), list(bad))
        return Share(torch.from_numpy(indices[good]), torch.from_numpy(out[good]), labels[good], list(bad.values()))

    parts = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    return _ahead(read, parts)


def _stream_shares(source: Source, img_size: int, batch_size: int, rank: int, world_size: int) -> Iterator[Share]:
    stream: Stream = source.images

    def read(rows: list[tuple[int, dict]]) -> Share:
        numbers, pixels, labels, bad = [], [], [], []
        for number, row in rows:
            try:
                value = row.get(stream.columns.image)
                pixels.append(decode_row(value, stream.columns, img_size, lambda number=number: f"image {number}"))
            except BadImage as error:
                bad.append(str(error))
                continue
            numbers.append(number)
            labels.append(stream.columns.label_of(row.get(stream.columns.label)))
        images = np.stack(pixels) if pixels else np.empty((0, 3, img_size, img_size), np.uint8)
        return Share(torch.tensor(numbers, dtype=torch.int64), torch.from_numpy(images), np.array(labels, int), bad)

    rows = iter(_numbered(stream, rank, world_size))
    return _ahead(read, iter(lambda: list(islice(rows, batch_size)), []))


def _numbered(stream: Stream, rank: int, world_size: int) -> Iterator[tuple[int, dict]]:
    """Rows with their numbers; whole files or row groups where there are enough of them for all processes."""
    whole = stream.num_units >= world_size
    starts = None if stream.sizes is None else np.cumsum([0, *stream.sizes])
    count = 0
    for unit in range(rank if whole else 0, stream.num_units, world_size if whole else 1):
        for place, row in enumerate(stream.rows(unit)):
            number = count if starts is None else int(starts[unit]) + place
            count += 1
            if whole and starts is None:
                yield count * world_size + rank, row
            elif whole or number % world_size == rank:
                yield number, row


def _ahead(read: Callable, parts: Iterable) -> Iterator[Share]:
    """read(part) of each part, in order, on all cores of this process's share and ahead of time."""
    threads = cores_per_process()
    with ThreadPoolExecutor(threads) as pool:
        reading: deque = deque()
        try:
            for part in parts:
                reading.append(pool.submit(read, part))
                if len(reading) > threads:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()


def open_array(path: str, about: str) -> ImageSet:
    """The images `arr_0`, uint8 (N, H, W, 3), of an `.npz`, read bit by bit.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    found = find_array(path, about)
    if found is None:
        raise UserError(f"has no {ARRAY}, uint8 (N, H, W, 3): give a file with images.", about=about, value=path)
    count, height, width, _ = found
    return ImageSet(path, count, height if height == width else None, 0, partial(_array_shares, path, about, found))


def find_array(path: str, about: str) -> tuple[int, int, int, int] | None:
    """The shape (N, H, W, 3) of an `.npz`'s images, or None where it has none.

    Raises:
        UserError: the file cannot be read; its `arr_0` is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                return None
            with archive.open(f"{ARRAY}.npy") as file:
                shape, is_fortran, dtype = _header(file)
    except BROKEN as error:
        raise UserError(f"cannot be read ({reason_of(error)}): correct the path.", about=about, value=path) from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or is_fortran:
        raise UserError(f"{ARRAY} is {dtype} {shape}, but images are uint8 (N, H, W, 3).", about=about, value=path)
    return shape


def reason_of(error: Exception) -> str:
    """In a few words."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _array_shares(path: str, about: str, *how) -> Iterator[Share]:
    try:
        yield from _read_array(path, *how)
    except BROKEN as error:
        raise UserError(
            f"{ARRAY} cannot be read to its end ({reason_of(error)}): make it again.", about=about, value=path
        ) from None


def _read_array(path: str, shape: tuple, img_size: int, batch_size: int, rank: int, world_size: int) -> Iterator[Share]:
    count, height, width, _ = shape
    with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as file:
        _header(file)
        for number, start in enumerate(range(0, count, batch_size)):
            size = min(batch_size, count - start)
            data = file.read(size * height * width * 3)
            if number % world_size != rank:
                continue
            images = np.frombuffer(data, np.uint8).reshape(size, height, width, 3).transpose(0, 3, 1, 2)
            squares = np.stack([crop_pixels(image, img_size) for image in images])
            yield Share(torch.arange(start, start + size), torch.from_numpy(squares), None, [])
