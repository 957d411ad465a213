"""The two stores of images: a file for each in class folders, or all in one `.npz` as ADM's evaluator reads it."""

import io
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, remove_leftovers
from jit_accel.sample.image_plan import ImageId, SamplePlan

ENCODINGS = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True, "quality": 50, "method": 2}}
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
NPZ_FILE, PARTS = "samples.npz", ".parts"


class ImageFiles:
    """The images of a plan as files `000_name/000120.png` under `folder`, each whole or not there; `size` is (H, W).

    They are written in the background, and what is there is not made again.
    """

    def __init__(self, folder: Path, plan: SamplePlan, extension: str, size: tuple[int, int]):
        self.folder, self.plan, self.extension, self.size = folder, plan, extension, size
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self.pending: list[Future] = []

    def path(self, image: ImageId) -> Path:
        return self.folder / self.plan.folder(image.label) / f"{image.number:06d}.{self.extension}"

    def prepare(self) -> None:
        """Make the class folders, and remove what a killed process left half-written. On one process alone."""
        for label in self.plan.labels:
            class_folder = self.folder / self.plan.folder(label)
            class_folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(class_folder)

    def missing(self, stop_here: Callable[[], object] = lambda: None) -> list[ImageId]:
        """Return the images that are not there, or not whole; for each `stop_here` is called, which may raise."""
        missing = []
        for image in self.plan.ids():
            stop_here()
            if not is_whole(self.path(image), self.size):
                missing.append(image)
        return missing

    def write(self, ids: Sequence[ImageId], images: np.ndarray) -> None:
        """Begin to write images uint8 (B, H, W, 3), when the ones before are written; raise what `flush` does."""
        self.flush()
        self.pending = [self.pool.submit(self._write, image, pixels) for image, pixels in zip(ids, images)]

    def flush(self) -> None:
        """Wait until all is written; raise what went wrong."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def read(self, image: ImageId) -> np.ndarray:
        """Return an image, uint8 (H, W, 3)."""
        try:
            with Image.open(self.path(image)) as opened:
                return np.asarray(opened.convert("RGB"))
        except OSError as error:
            rule = f"{self.path(image)}: cannot be read ({error}): remove it, and make it with --resume."
            raise UserError(rule) from None

    def finish(self) -> str:
        """Return what is there, in words."""
        return f"{self.folder} ({len(self.plan.labels):,} folder{'s' * (len(self.plan.labels) > 1)})"

    def close(self) -> None:
        self.pool.shutdown(wait=True)

    def _write(self, image: ImageId, pixels: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **ENCODINGS[self.extension])
        with atomic_file(self.path(image), durable=False) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Return whether a file is an image of this height and width, to its end, with right checksums or decodable."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG":
                image.verify()
                is_complete = data.endswith(PNG_END)
            else:
                image.load()
                is_complete = struct.unpack("<I", data[4:8])[0] + 8 == len(data)
            return is_complete and image.size == size[::-1]
    except (OSError, SyntaxError):  # the latter is Pillow's word for a wrong checksum
        return False


class NpzFile(ImageFiles):
    """The images of a plan in `folder/samples.npz`: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 (N,), the labels.

    They are files in a hidden folder until none is missing, and never in memory as a whole.
    """

    def __init__(self, folder: Path, plan: SamplePlan, size: tuple[int, int]):
        super().__init__(folder / PARTS, plan, "png", size)
        self.npz = folder / NPZ_FILE

    def prepare(self) -> None:
        """Make the hidden folders, and make sure that there is room. On one process alone."""
        if self.npz.exists():
            return
        super().prepare()
        there = sum(path.stat().st_size for path in self.folder.rglob("*.png"))
        needed = 2 * self.plan.num_images * self.size[0] * self.size[1] * 3 - there
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            rule = f"the .npz and its parts need {needed / 2**30:,.1f} GiB more, and the disk has {free / 2**30:,.1f} "
            raise self._wrong(f"{rule}GiB left: make room, or choose another disk.")

    def missing(self, stop_here: Callable[[], object] = lambda: None) -> list[ImageId]:
        """Return the images that are not there; raise `UserError` where an .npz of other images is."""
        if not self.npz.exists():
            return super().missing(stop_here)
        try:
            held = f"holds {(count := len(open_array(self.npz, 'arr_0'))):,} images"
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            held, count = "is broken", None
        if count != self.plan.num_images:
            rule = f"{NPZ_FILE} {held}, and not the {self.plan.num_images:,} asked for: remove it and all beside it, "
            raise self._wrong(f"{rule}or choose another folder.")
        return []

    def read(self, image: ImageId) -> np.ndarray:
        if not self.npz.exists():
            return super().read(image)
        return np.array(open_array(self.npz, "arr_0")[self.plan.ids().index(image)])

    def finish(self) -> str:
        """Put the images together, on one process alone; return what is there, in words."""
        if not self.npz.exists():
            ids = self.plan.ids()
            labels = np.array([image.label for image in ids], "<i8")
            with atomic_file(self.npz) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                    _write_header(file, (len(ids), *self.size, 3), "|u1")
                    for image in ids:
                        file.write(self.read(image).tobytes())
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                    _write_header(file, labels.shape, "<i8")
                    file.write(labels.tobytes())
        shutil.rmtree(self.folder, ignore_errors=True)
        return str(self.npz)

    def _wrong(self, rule: str) -> UserError:
        return UserError(rule, about="output_dir", value=self.npz.parent)


def _write_header(file, shape: tuple[int, ...], descr: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})


def open_array(path: Path, name: str) -> np.ndarray:
    """Map an array of an uncompressed `.npz` into memory.

    OSError, ValueError, KeyError or zipfile.BadZipFile if it is not there or not whole.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is compressed")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<HH", file.read(30)[26:])
        file.seek(name_length + extra_length, 1)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)
