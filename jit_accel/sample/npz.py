"""All images in one `.npz`, as ADM's evaluator reads it; never in memory as a whole.

Each batch becomes a part, a `.npy` of (number, label, image) records, in a hidden folder. When nothing is missing the
parts are copied image by image, in order of their numbers, into the `.npz`, and removed.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, remove_leftovers
from jit_accel.sample.plan import Item, Plan

FILE = "samples.npz"
PARTS = ".parts"
Place = tuple[Path, int]  # part, offset of the record in bytes
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same images make the same file


class NpzFile:
    """The images of a plan in `folder/samples.npz`: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 (N,), the labels."""

    def __init__(self, folder: Path, plan: Plan, size: tuple[int, int]):
        self.path, self.parts, self.plan, self.size = folder / FILE, folder / PARTS, plan, size
        self.record = np.dtype([("number", "<i8"), ("label", "<i8"), ("image", "u1", (*size, 3))])

    def prepare(self) -> None:
        """Make the folder of parts, and make sure that there is room. On one process alone."""
        if self.path.exists():
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.parts)
        there = sum(path.stat().st_size for path in self.parts.iterdir())
        needed = 2 * len(self.plan.items()) * self.record.itemsize - there
        free = shutil.disk_usage(self.parts).free
        if needed > free:
            raise UserError(
                f"the .npz and its parts need {needed / 2**30:,.1f} GiB more, and the "
                f"disk has {free / 2**30:,.1f} GiB left: make room, or choose another disk.",
                about="output_dir",
                value=self.path.parent,
            )

    def missing(self, stop_here: Callable[[], object] = lambda: None) -> list[Item]:
        """The images that no whole part holds.

        Args:
            stop_here: called once; may raise.

        Raises:
            UserError: an .npz of other images is there.
        """
        stop_here()
        if not self.path.exists():
            there = self._places()
            return [item for item in self.plan.items() if item not in there]
        try:
            num_images = len(open_array(self.path, "arr_0"))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            num_images = None
        if num_images != len(self.plan.items()):
            held = "is broken" if num_images is None else f"holds {num_images:,} images"
            raise UserError(
                f"{FILE} {held}, and not the {len(self.plan.items()):,} asked for: "
                "remove it and all beside it, or choose another folder.",
                about="output_dir",
                value=self.path.parent,
            )
        return []

    def write(self, items: Sequence[Item], images: np.ndarray) -> None:
        """Write a part from images uint8 (B, H, W, 3)."""
        records = np.empty(len(items), self.record)
        records["number"], records["label"] = np.array(items, np.int64).T
        records["image"] = images
        first = items[0]
        path = self.parts / f"{first.number:09d}_{first.label}_{len(items)}.npy"
        with atomic_file(path, durable=False) as temporary, open(temporary, "wb") as file:  # np.save would add .npy
            np.save(file, records)

    def flush(self) -> None:
        """Everything is written at once."""

    def close(self) -> None:
        """Nothing is open."""

    def read(self, item: Item) -> np.ndarray:
        """An image of the finished file."""
        return np.array(open_array(self.path, "arr_0")[self.plan.items().index(item)])

    def finish(self) -> str:
        """Put the parts together, on one process alone. Returns what is there, in words."""
        if not self.path.exists():
            places, items = self._places(), self.plan.items()
            with atomic_file(self.path) as temporary:
                self._merge(temporary, items, places)
        shutil.rmtree(self.parts, ignore_errors=True)
        return str(self.path)

    def _merge(self, temporary: Path, items: list[Item], places: dict[Item, Place]) -> None:
        labels = np.array([item.label for item in items], np.int64)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", _LONG_AGO), "w", force_zip64=True) as file:
                _write_header(file, (len(items), *self.size, 3), "|u1")
                for item in items:
                    part, offset = places[item]
                    with open(part, "rb") as records:
                        records.seek(offset)
                        (record,) = np.frombuffer(records.read(self.record.itemsize), self.record)
                    file.write(record["image"].tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy", _LONG_AGO), "w") as file:
                _write_header(file, labels.shape, "<i8")
                file.write(labels.astype("<i8").tobytes())

    def _places(self) -> dict[Item, Place]:
        """Of each image in a whole part of this size the part, and where in it."""
        places = {}
        for path in sorted(self.parts.glob("*.npy")):
            with contextlib.suppress(OSError, ValueError):  # cut off: its images are made again
                records = np.load(path, mmap_mode="r")
                if records.dtype == self.record:
                    pairs = zip(records["number"].tolist(), records["label"].tolist())
                    offsets = range(records.offset, records.offset + records.nbytes, self.record.itemsize)
                    places |= {Item(*pair): (path, offset) for pair, offset in zip(pairs, offsets)}
        return places


def _write_header(file, shape: tuple[int, ...], descr: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})


def open_array(path: Path, name: str) -> np.ndarray:
    """Map an array of an uncompressed `.npz` into memory.

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: it is not there or not whole.
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
