"""Images to compare, each once: a data set of any kind that training reads, or an `.npz`; statistics in such files."""

import io
import json
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jit_accel.base.console import redacted
from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.base.files import atomic_file, disk_errors, parse_json_line
from jit_accel.config.presets import Size, plain_size, sides_of
from jit_accel.data.batches.batch import labels_in
from jit_accel.data.batches.workers import cores_per_process
from jit_accel.data.formats.columns import COLOUR, PixelFormat
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.data.reading.decode import BadImage, crop_pixels, decode_row
from jit_accel.evaluate.features import MAIN, SPATIAL, FeatureNetwork
from jit_accel.evaluate.settings import INCEPTION
from jit_accel.evaluate.statistics import Gaussian, ImageStatistics

BROKEN = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # what an .npz may raise
ARRAY = "arr_0"  # the name of images in ADM's .npz, and in those of jit_accel.sample
# Names of means and covariances there, as ADM's evaluator and torch-fidelity's users have them
MOMENTS = {MAIN: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
LEAST_FEATURES = 2  # a kernel distance compares different images
MAKER = "jit_accel"
ABOUT = ("features", "weights_id", "num_images", "img_size", "label_counts")


class Share(NamedTuple):
    """A batch: numbers int64 (B,), images (B, C, S, S), what else is known of them (B,), names of bad images.

    All is on the CPU. The facts are of the data set's `facts_type`, or None.
    """

    numbers: Tensor
    images: Tensor
    facts: np.ndarray | None
    bad_images: list[str]

    @property
    def labels(self) -> Tensor | None:
        """The label of each image, int64 (B,), the first of several."""
        labels = None if self.facts is None else labels_in(self.facts)
        return labels if labels is None or labels.ndim == 1 else labels[:, 0]


@dataclass(frozen=True)
class ImageSet:
    """Images that were opened but not read.

    img_size: to which they are scaled and cropped as for training. `shares(batch_size, rank,
    world_size)` reads them; all numbers differ, and are below `num_images`. fingerprint: of the data set, if any.
    """

    name: str
    num_images: int
    img_size: Size
    shares: Callable[[int, int, int], Iterator[Share]]
    fingerprint: str = ""
    pixels: PixelFormat = COLOUR


def open_image_set(
    path: str | Source,
    about: str,
    img_size: Size | None = None,
    split: str | None = None,
    *,
    has_pairs: bool = False,
    pixels: PixelFormat = COLOUR,
    **reading: Any,
) -> ImageSet:
    """Open what `--data_path` of training may be, or an `.npz` with `arr_0`: uint8 (N, H, W, 3).

    `img_size` None is that of the first image, if that is square; `pixels` is what a path is decoded to, and `reading`
    has further settings of `open_images` for one.
    With `has_pairs` the channels of the data's conditions come behind those of its images. Raises `UserError`
    about the setting of this name.
    """
    if isinstance(path, str) and path.endswith(".npz"):
        if (shape := find_array(path, about)) is None:
            rule = f"has no {ARRAY}, uint8 (N, H, W, 3): give a file with images."
            raise UserError(rule, about=about, value=path)
        name, (count, *sides, _), fingerprint, read = path, shape, "", partial(_array_shares, path, about)
        pixels, first = COLOUR, plain_size(sides)
    else:
        with renamed_settings(data_path=about):
            how = {"split": split, "in_channels": pixels.channels, "value_range": pixels.value_range}
            source = open_images(path, **how, **reading) if isinstance(path, str) else path
        name, count, fingerprint = source.name, source.num_images, source.fingerprint
        first = source.img_size or _first_size(source)
        pixels = source.pixels
        how = pixels, source.channels if has_pairs else pixels.channels
        read = partial(_stream_shares if source.streaming else _random_shares, source.images, *how)
    if (img_size := plain_size(img_size) if img_size else first) is None:
        rule = "the first image is not square: give a size to crop to as --img_size."
        raise UserError(rule, about=about, value=name)
    return ImageSet(name, count, img_size, partial(read, img_size), fingerprint, pixels)


def in_bytes(images: Tensor, pixels: PixelFormat) -> Tensor:
    """Return images of this format as uint8, 0 to 255."""
    if pixels.value_range is None:
        return images
    low, high = pixels.value_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def _first_size(source: Source) -> int | None:
    """Return the side of the first image, if that is square."""
    images = source.images
    if source.streaming:  # some units may be empty
        row = next(images.training_rows(int(images.sizes.argmax())), None)
    else:
        row = getattr(images, "dataset", [None])[0]
    if row is not None:
        data, _ = images.columns.image_of(row[images.columns.image])
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        with suppress(OSError, ValueError, TypeError), Image.open(file) as image:
            return image.width if image.width == image.height else None
    return None


def _random_shares(
    images, pixels: PixelFormat, channels: int, img_size: Size, batch_size: int, rank: int, world_size: int
) -> Iterator[Share]:
    def read(numbers: np.ndarray) -> Share:
        out = np.empty((len(numbers), channels, *sides_of(img_size)), pixels.dtype)
        facts, bad = images.read(numbers, out)
        good = np.setdiff1d(np.arange(len(numbers)), list(bad))
        return Share(torch.from_numpy(numbers[good]), torch.from_numpy(out[good]), facts[good], list(bad.values()))

    mine = np.arange(rank, len(images), world_size)
    return _ahead(read, (mine[start : start + batch_size] for start in range(0, len(mine), batch_size)))


def _stream_shares(
    stream, pixels: PixelFormat, channels: int, img_size: Size, batch_size: int, rank: int, world_size: int
) -> Iterator[Share]:
    columns = stream.columns if channels > pixels.channels else replace(stream.columns, condition=None)

    def read(rows: list[tuple[int, dict]]) -> Share:
        numbers, bad, facts = [], [], np.empty(len(rows), columns.facts_type)
        out = np.empty((len(rows), channels, *sides_of(img_size)), pixels.dtype)
        for number, row in rows:
            try:
                out[len(numbers)] = decode_row(row, columns, img_size, lambda number=number: f"image {number}")
                facts[len(numbers)] = columns.facts_of(row)
            except BadImage as error:
                bad.append(str(error))
                continue
            except ValueError as error:  # of what is known of it
                bad.append(f"image {number}: {error}")
                continue
            numbers.append(number)
        count = len(numbers)
        return Share(torch.tensor(numbers, dtype=torch.int64), torch.from_numpy(out[:count]), facts[:count], bad)

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
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            reading.append(pool.submit(read, part))
            if len(reading) > threads:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def find_array(path: str, about: str) -> tuple[int, int, int, int] | None:
    """Return the shape (N, H, W, 3) of an `.npz`'s images, None without; raise `UserError` for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                return None
            with archive.open(f"{ARRAY}.npy") as file:
                shape, is_fortran, dtype = _header(file)
    except BROKEN as error:
        raise UserError(f"cannot be read ({_reason(error)}): correct the path.", about=about, value=path) from None
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or is_fortran:
        rule = f"{ARRAY} is {dtype} {shape}, but images are uint8 (N, H, W, 3)."
        raise UserError(rule, about=about, value=path)
    return shape


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _array_shares(
    path: str, about: str, img_size: Size, batch_size: int, rank: int, world_size: int
) -> Iterator[Share]:
    """Read the array bit by bit; every n-th batch is this process's."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY}.npy") as file:
            (count, height, width, _), _, _ = _header(file)
            for number, start in enumerate(range(0, count, batch_size)):
                size = min(batch_size, count - start)
                data = file.read(size * height * width * 3)
                if number % world_size != rank:
                    continue
                images = np.frombuffer(data, np.uint8).reshape(size, height, width, 3).transpose(0, 3, 1, 2)
                cropped = np.stack([crop_pixels(image, img_size) for image in images])
                yield Share(torch.arange(start, start + size), torch.from_numpy(cropped), None, [])
    except BROKEN as error:
        rule = f"{ARRAY} cannot be read to its end ({_reason(error)}): make it again."
        raise UserError(rule, about=about, value=path) from None


def save_reference(path: Path, reference: ImageStatistics) -> None:
    """Write an `.npz` that `read_reference` and others' evaluators read, atomically; UserError if that fails."""
    about = {"maker": MAKER, **{name: getattr(reference, name) for name in ABOUT}, "source": redacted(reference.name)}
    arrays = {"about": np.array(json.dumps(about))}
    for layer, gaussian in reference.gaussians.items():
        arrays |= zip(MOMENTS[layer], (gaussian.mean.cpu().numpy(), gaussian.covariance.cpu().numpy()))
    if reference.kept is not None:
        arrays["kept"] = reference.kept.numpy()
    with disk_errors("make_reference", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:  # a name would get another ending
            np.savez(file, **arrays)


def read_reference(path: str, network: FeatureNetwork) -> ImageStatistics | None:
    """Read statistics: ours, or ADM's, JiT's and torch-fidelity's, which are of Inception. None: only images are there.

    UserError if the file is broken, or of other features.
    """
    wrong = partial(UserError, about="reference", value=path)
    has_images = find_array(path, "reference") is not None
    known = {"about", "kept", *MOMENTS[MAIN], *MOMENTS[SPATIAL]}
    try:  # nothing in the file is run
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in known}
    except BROKEN as error:
        raise wrong(f"cannot be read ({_reason(error)}): give another file.") from None
    about = _checked_about(arrays, wrong)
    features = about.get("features", INCEPTION)
    if has_images and (network.name != features or MOMENTS[MAIN][0] not in arrays):
        return None
    if features != network.name:
        remedy = f"use --features {features}, or make a file of {network.name} features from the images with "
        raise wrong(f"holds statistics of {features} features, not of {network.name}: {remedy}--make_reference.")
    if about.get("weights_id", network.weights_id) != network.weights_id:
        ids = f"{about['weights_id']}, here {network.weights_id}"
        remedy = "give the same --feature_weights, or make it again with --make_reference."
        raise wrong(f"was made with other weights of {features} ({ids}): {remedy}")
    layers = [layer for layer in MOMENTS if MOMENTS[layer][0] in arrays and layer in network.sizes]
    if MAIN not in layers:
        raise wrong("has neither statistics (mu, sigma) nor images (arr_0): give another.")
    gaussians = {layer: _checked_gaussian(arrays, layer, network.sizes[layer], wrong) for layer in layers}
    kept = None
    if "kept" in arrays:
        kept = _checked_array(arrays, "kept", (LEAST_FEATURES, network.sizes[MAIN]), wrong, " or more").float()
    said = {name: about[name] for name in ("num_images", "img_size", "label_counts") if name in about}
    return ImageStatistics(features, network.weights_id, gaussians, path, kept, **said)


def _checked_about(arrays: dict[str, np.ndarray], wrong: Callable[[str], UserError]) -> dict:
    """Return the description in a file of ours, {} of others."""
    if "about" not in arrays:
        return {}
    about = parse_json_line(str(arrays["about"]).encode())
    if about is None or about.get("maker") != MAKER:
        raise wrong("its description is not one of ours: make it again.")
    counts, size = about.get("label_counts") or [], about.get("img_size")
    sizes = (about.get("num_images"), *(size if isinstance(size, list) and len(size) == 2 else [size]))
    numbers = [*counts, *(size for size in sizes if size is not None)] if isinstance(counts, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or 0 in sizes:
        raise wrong("its description has counts that are not whole numbers: make it again.")
    return about | {"label_counts": tuple(counts), "img_size": size and plain_size(size)}


def _checked_gaussian(arrays: dict, layer: str, size: int, wrong: Callable[[str], UserError]) -> Gaussian:
    mean, covariance = MOMENTS[layer]
    found = _checked_array(arrays, mean, (size,), wrong), _checked_array(arrays, covariance, (size, size), wrong)
    variances = found[1].diagonal()
    is_positive = variances.min() >= -1e-6 * max(1.0, variances.max())  # rounding may leave a constant one below 0
    if not is_positive or not torch.allclose(found[1], found[1].T, rtol=1e-4, atol=1e-6):
        raise wrong(f"{covariance} is not a covariance: give another file.")
    return Gaussian(*found)


def _checked_array(arrays: dict, name: str, shape: tuple, wrong: Callable, or_more: str = "") -> Tensor:
    """Return an array as float64; with `or_more` it may have more rows."""
    array = arrays.get(name, np.empty(()))
    has_shape = array.shape == shape or (or_more and array.shape[1:] == shape[1:] and len(array) > shape[0])
    if not has_shape or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise wrong(f"{name} is {array.dtype} {array.shape}, not finite numbers {shape}{or_more}: give another file.")
    return torch.from_numpy(np.asarray(array, np.float64))
