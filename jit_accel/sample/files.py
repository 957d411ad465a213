"""One file for each image, in class folders: whole or not there at all."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, remove_leftovers
from jit_accel.sample.plan import Item, Plan

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
GO_ON = "run the same command again with --resume"  # what brings an interrupted sampling to its end


class ImageFiles:
    """The images of a plan as files `000_name/000120.png` under `folder`, written in the background.

    Args:
        size: height and width in pixels.
    """

    def __init__(self, folder: Path, plan: Plan, extension: str, size: tuple[int, int]):
        self.folder, self.plan, self.extension, self.size = folder, plan, extension, size
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self.pending: list[Future] = []

    def path(self, item: Item) -> Path:
        return self.folder / self.plan.folder(item.label) / self.name(item)

    def name(self, item: Item) -> str:
        return f"{item.number:06d}.{self.extension}"

    def prepare(self) -> None:
        """Make the class folders, and remove what a killed process left half-written. On one process alone."""
        for label in self.plan.labels:
            class_folder = self.folder / self.plan.folder(label)
            class_folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(class_folder)

    def missing(self, stop_here: Callable[[], object] = lambda: None) -> list[Item]:
        """The images that are not there, or not whole.

        Args:
            stop_here: called on the way, since there may be millions; may raise.
        """
        is_whole, missing = IS_WHOLE[self.extension], []
        there = {label: set(os.listdir(self.folder / self.plan.folder(label))) for label in self.plan.labels}
        for item in self.plan.items():
            stop_here()
            if self.name(item) not in there[item.label] or not is_whole(self.path(item), self.size):
                missing.append(item)
        return missing

    def write(self, items: Sequence[Item], images: np.ndarray) -> None:
        """Begin to write images uint8 (B, H, W, 3), when the ones before are written.

        Raises:
            OSError: one of those before could not be written.
        """
        self.flush()
        self.pending = [self.pool.submit(self._write, item, image) for item, image in zip(items, images)]

    def flush(self) -> None:
        """Wait until all is written. Raises what went wrong."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def read(self, item: Item) -> np.ndarray:
        try:
            with Image.open(self.path(item)) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(
                f"{self.path(item)}: cannot be read ({error}): remove it, and make it with --resume."
            ) from None

    def finish(self) -> str:
        """Return what is there, in words."""
        return f"{self.folder} ({len(self.plan.labels):,} folder{'s' * (len(self.plan.labels) > 1)})"

    def close(self) -> None:
        self.pool.shutdown(wait=True)

    def _write(self, item: Item, image: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, **ENCODINGS[self.extension])
        with atomic_file(self.path(item), durable=False) as temporary:
            temporary.write_bytes(buffer.getbuffer())


ENCODINGS = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True, "quality": 50, "method": 2}}


def is_whole_png(path: Path, size: tuple[int, int]) -> bool:
    """Whether a file is a PNG of this height and width whose checksums are right."""
    start, end, _ = _ends(path)
    if start[:8] != PNG_START or end != PNG_END or struct.unpack(">II", start[16:24]) != size[::-1]:
        return False
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # the latter is Pillow's word for a wrong checksum
        return False
    return True


def is_whole_webp(path: Path, size: tuple[int, int]) -> bool:
    """Whether a file is a WebP of the length that it states and of this height and width, and can be decoded."""
    start, _, num_bytes = _ends(path)
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or struct.unpack("<I", start[4:8])[0] + 8 != num_bytes:
        return False
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == size[::-1]
    except OSError:
        return False


IS_WHOLE = {"png": is_whole_png, "webp": is_whole_webp}


def _ends(path: Path) -> tuple[bytes, bytes, int]:
    """The first 24 bytes of a file, its last 12, and its length; nothing where there are not as many."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            num_bytes = file.seek(0, os.SEEK_END)
            if num_bytes < 36:
                return b"", b"", num_bytes
            file.seek(-12, os.SEEK_END)
            return start, file.read(12), num_bytes
    except OSError:
        return b"", b"", 0
