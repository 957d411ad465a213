"""Images to compare, each once: a data set of any kind that training reads, or the array of an `.npz`."""

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
from jit_accel.data.batches.loader import cores_per_process
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.data.reading.decode import BadImage, crop_pixels, decode_row

BROKEN = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # what an .npz may raise
ARRAY = "arr_0"  # the name of images in ADM's .npz, and in those of jit_accel.sample


class Share(NamedTuple):
    """A batch: numbers int64 (B,) on the CPU, images uint8 (B, 3, S, S), labels int64 (B,), names of bad images."""

    numbers: Tensor
    images: Tensor
    labels: np.ndarray | None
    bad_images: list[str]


@dataclass(frozen=True)
class ImageSet:
    """Images that were opened but not read.

    img_size: the side of the first image in pixels, None where it is not square. `shares(img_size, batch_size, rank,
    world_size)` reads them, scaled and cropped as for training; all numbers differ, and are below `num_images`.
    fingerprint: of the data set, "" where there is none.
    """

    name: str
    num_images: int
    img_size: int | None
    shares: Callable[[int, int, int, int], Iterator[Share]]
    fingerprint: str = ""

    def side(self, img_size: int | None, about: str) -> int:
        """Return the side to crop images to: `img_size`, else the one that they have, or raise `UserError`."""
        if img_size is None and self.img_size is None:
            rule = "the first image is not square: give a size to crop to as --img_size."
            raise UserError(rule, about=about, value=self.name)
        return img_size or self.img_size


def open_image_set(path: str | Source, about: str) -> ImageSet:
    """Open what `--data_path` of training may be, or an `.npz` with `arr_0`: uint8 (N, H, W, 3).

    Raises `UserError` about the setting of this name.
    """
    if isinstance(path, Source):
        return images_of_source(path)
    if not path.endswith(".npz"):
        with renamed_settings(data_path=about):
            return images_of_source(open_images(path))
    if (shape := find_array(path, about)) is None:
        rule = f"has no {ARRAY}, uint8 (N, H, W, 3): give a file with images."
        raise UserError(rule, about=about, value=path)
    count, height, width, _ = shape
    return ImageSet(path, count, height if height == width else None, partial(_array_shares, path, about, shape))


def images_of_source(source: Source) -> ImageSet:
    """Return all images of an opened data set."""
    images = source.images
    count = int(np.sum(images.sizes)) if source.streaming else len(images)
    shares = partial(_stream_shares if source.streaming else _random_shares, images)
    return ImageSet(source.name, count, source.img_size or _first_side(source), shares, source.fingerprint)


def _first_side(source: Source) -> int | None:
    images = source.images
    row = next(images.training_rows(0), None) if source.streaming else getattr(images, "dataset", [None])[0]
    if row is None:
        return None
    data, _ = images.columns.image_of(row[images.columns.image])
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return image.width if image.width == image.height else None
    except (OSError, ValueError, TypeError):
        return None


def _random_shares(images, img_size: int, batch_size: int, rank: int, world_size: int) -> Iterator[Share]:
    def read(indices: np.ndarray) -> Share:
        out = np.empty((len(indices), 3, img_size, img_size), np.uint8)
        labels, bad = images.read(indices, out)
        good = np.setdiff1d(np.arange(len(indices)), list(bad))
        return Share(torch.from_numpy(indices[good]), torch.from_numpy(out[good]), labels[good], list(bad.values()))

    mine = np.arange(rank, len(images), world_size)
    return _ahead(read, (mine[start : start + batch_size] for start in range(0, len(mine), batch_size)))


def _stream_shares(stream, img_size: int, batch_size: int, rank: int, world_size: int) -> Iterator[Share]:
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

    rows = _numbered_rows(stream, rank, world_size)
    return _ahead(read, iter(lambda: list(islice(rows, batch_size)), []))


def _numbered_rows(stream, rank: int, world_size: int) -> Iterator[tuple[int, dict]]:
    """Yield rows with their numbers: those of every n-th unit where there are enough units, else every n-th row."""
    has_own_units = stream.num_units >= world_size
    starts = np.cumsum([0, *stream.sizes])
    for unit in range(rank, stream.num_units, world_size) if has_own_units else range(stream.num_units):
        for number, row in enumerate(stream.training_rows(unit), int(starts[unit])):
            if has_own_units or number % world_size == rank:
                yield number, row


def _ahead(read: Callable, parts: Iterable) -> Iterator[Share]:
    """Yield read(part) of each part, in order, on all cores of this process's share and ahead of time."""
    threads, reading = cores_per_process(), deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for part in parts:
            reading.append(pool.submit(read, part))
            if len(reading) > threads:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def find_array(path: str, about: str) -> tuple[int, int, int, int] | None:
    """Return the shape (N, H, W, 3) of an `.npz`'s images, None without; raise `UserError` for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                return None
            with archive.open(f"{ARRAY}.npy") as file:
                shape, is_fortran, dtype = _header(file)
    except BROKEN as error:
        raise UserError(f"cannot be read ({reason_of(error)}): correct the path.", about=about, value=path) from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or is_fortran:
        rule = f"{ARRAY} is {dtype} {shape}, but images are uint8 (N, H, W, 3)."
        raise UserError(rule, about=about, value=path)
    return shape


def reason_of(error: Exception) -> str:
    """Return the reason in a few words."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _array_shares(
    path: str, about: str, shape: tuple, img_size: int, batch_size: int, rank: int, world_size: int
) -> Iterator[Share]:
    """Read the array bit by bit; every n-th batch is this process's."""
    count, height, width, _ = shape
    try:
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
    except BROKEN as error:
        rule = f"{ARRAY} cannot be read to its end ({reason_of(error)}): make it again."
        raise UserError(rule, about=about, value=path) from None
