"""How many images a second each stage of the data path makes, and the whole of it."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.data.batches import order
from jit_accel.data.batches.loader import build_loader
from jit_accel.data.batches.ready_batches import ReadyBatches
from jit_accel.data.batches.workers import worker_memory_gib
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.decode import center_crop, plain_jpeg, to_rgb
from jit_accel.data.reading.units import Stream

_SAMPLE_BYTES, _SAMPLE_IMAGES = 2**28, 1024  # kept from one stage for the next


@dataclass
class Stages:
    """Images/s of one core by stage, in their order; a stage that does not exist here is left out."""

    rates: dict[str, float] = field(default_factory=dict)
    bytes_per_image: float = 0.0
    bad_images: int = 0

    @property
    def together(self) -> float:
        """Images/s of one core that does all of it, one after the other."""
        return 1 / sum(1 / rate for rate in self.rates.values())


@dataclass(frozen=True)
class EndToEnd:
    """What a loader of `num_workers` workers delivers; memory of the largest worker, in GiB."""

    num_workers: int
    images_per_s: float
    images: int
    memory_start_gib: float | None
    memory_end_gib: float | None


def measure_stages(source: Source, *, img_size: int, batch_size: int, device: torch.device, seconds: float) -> Stages:
    """Measure one stage after the other, each for about `seconds`, with images of the one before.

    Raises:
        UserError: no image can be decoded.
    """
    stages = Stages()
    if source.is_encoded and getattr(source.images.columns, "raw_size", None) is None:
        encoded = _timed(stages, "read", _encoded(source, batch_size), seconds, size=len)
        stages.bytes_per_image = float(np.mean([len(data) for data in encoded]))
        pictures = _timed(stages, "decode", _each(_decode, encoded, stages), seconds, size=_picture_bytes)
        squares = _timed(stages, "crop", _each(lambda picture: _crop(picture, img_size), pictures, stages), seconds)
    else:  # reading gives pixels
        squares = _timed(stages, "read", _pixels(source, img_size, batch_size), seconds)
        stages.bytes_per_image = squares[0].nbytes
    batches = _timed(stages, "collate", _batches(squares, batch_size), seconds, images=batch_size)
    if device.type != "cpu":
        _timed(stages, "to device", _each(lambda batch: _copy(batch, device), batches, stages), seconds, batch_size)
    return stages


def measure_loader(
    source: Source, num_workers: int, *, img_size: int, batch_size: int, device: torch.device, seconds: float
) -> EndToEnd:
    """Take batches for about `seconds`, after the start of the workers and what they had prefetched."""
    on_gpu = device.type == "cuda"
    loader = build_loader(
        source, img_size=img_size, batch_size=batch_size, seed=0, num_workers=num_workers, pin_memory=on_gpu
    )
    if device.type != "cpu":
        loader = ReadyBatches(loader, device)
    try:
        for _ in range(1 + 2 * num_workers):
            next(loader)
        memory_gib = worker_memory_gib()
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not images:
            next(loader)
            images += batch_size
        elapsed_s = time.perf_counter() - start
        return EndToEnd(num_workers, images / elapsed_s, images, memory_gib, worker_memory_gib())
    finally:
        loader.close()


def _num_bytes(array: np.ndarray) -> int:
    return array.nbytes


def _timed(
    stages: Stages, name: str, results: Iterator, seconds: float, images: int = 1, size: Callable = _num_bytes
) -> list:
    """Draw `results` for `seconds`, each of `images` images, note the rate, and return the first of them."""
    kept, kept_bytes, count = [], 0, 0
    start = time.perf_counter()
    for result in results:
        count += images
        if kept_bytes < _SAMPLE_BYTES and len(kept) < _SAMPLE_IMAGES:
            kept.append(result)
            kept_bytes += size(result)
        if time.perf_counter() - start >= seconds:
            break
    if not kept:
        raise UserError("none of the images that were tried can be decoded: repair the data.", about="data_path")
    stages.rates[name] = count / (time.perf_counter() - start)
    return kept


def _each(action: Callable, items: list, stages: Stages) -> Iterator:
    """The results of `action` on `items`, over and over; what cannot be decoded is dropped for good."""
    good = []
    for item in items:
        try:
            result = action(item)
        except Exception:  # decoders raise anything on damaged files
            stages.bad_images += 1
        else:
            good.append(item)
            yield result
    yield from (action(item) for item in itertools.cycle(good))


def _indices(n: int, batch_size: int) -> Iterator[np.ndarray]:
    """Batches of indices in the order of a training."""
    for start in itertools.count(0, batch_size):
        yield order.image_indices(0, np.arange(start, start + batch_size), n)


def _encoded(source: Source, batch_size: int) -> Iterator[bytes]:
    """The bytes of the images, over and over; none where a file cannot be read."""
    images, columns = source.images, source.images.columns
    if isinstance(images, Stream):
        units = itertools.cycle(range(images.num_units))
        values = (row[columns.image] for unit in units for row in images.rows(unit))
    else:
        batches = (images.dataset[indices.tolist()] for indices in _indices(len(images), batch_size))
        values = (value for batch in batches for value in batch[columns.image])
    for value in values:
        data, _ = columns.image_of(value)
        if isinstance(data, str):
            try:
                data = Path(data).read_bytes()
            except OSError:
                data = None
        yield data or b""


def _pixels(source: Source, img_size: int, batch_size: int) -> Iterator[np.ndarray]:
    """Images of a store that needs no decoding."""
    if source.is_encoded:  # bare pixels in a table
        side = source.images.columns.raw_size
        yield from (np.frombuffer(data, np.uint8).reshape(3, side, side) for data in _encoded(source, batch_size))
    for indices in _indices(len(source.images), batch_size):
        batch = np.empty((len(indices), 3, img_size, img_size), np.uint8)
        source.images.read(indices, batch)
        yield from batch


def _decode(data: bytes) -> Image.Image:
    plain = plain_jpeg(io.BytesIO(data))
    if plain is not None:
        return Image.fromarray(plain)
    with Image.open(io.BytesIO(data)) as image:
        picture = to_rgb(image)
        picture.load()
        return picture


def _crop(picture: Image.Image, img_size: int) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(center_crop(picture, img_size)).transpose(2, 0, 1))


def _picture_bytes(picture: Image.Image) -> int:
    return 3 * picture.width * picture.height


def _batches(squares: list[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Batches of copies."""
    endless = itertools.cycle(squares)
    while True:
        images = np.empty((batch_size, *squares[0].shape), np.uint8)
        for place, square in zip(range(batch_size), endless):
            images[place] = square
        yield images


def _copy(images: np.ndarray, device: torch.device) -> torch.Tensor:
    pinned = torch.from_numpy(images)
    moved = (pinned.pin_memory() if device.type == "cuda" else pinned).to(device)
    torch.accelerator.synchronize()
    return moved
