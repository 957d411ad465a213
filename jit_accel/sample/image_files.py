"""Images as files: one each in class folders, or an `.npz` as ADM's evaluator reads it; pictures of them to look at."""

import io
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, remove_leftovers
from jit_accel.base.image_rows import as_pictures, draw_rows
from jit_accel.model.generation import generators
from jit_accel.sample.image_plan import ImageId, SamplePlan

ENCODINGS = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True, "quality": 50, "method": 2}}
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
NPZ_FILE, PARTS = "samples.npz", ".parts"
GRID_CLASSES, GRID_IMAGES, GRID_CELL_PIXELS = 10, 8, 256
STRIP_IMAGES, STRIP_COLUMNS, STRIP_CELL_PIXELS = 6, 11, 192
ANIMATION_CLASSES, ANIMATION_IMAGES, ANIMATION_CELL_PIXELS = 6, 6, 128
MOST_FRAMES, FRAME_MS, LAST_FRAME_MS = 60, 60, 2000

# What is shown of a step: t, and, both uint8 (B, H, W, 3), the state z and the image x that it heads for.
Show = Callable[[float, np.ndarray, np.ndarray], None]
# Makes these images once more, and shows these of their steps.
Follow = Callable[[list[ImageId], list[int], Show], None]


class ImageFiles:
    """The images of a plan as files `000_name/000120.png` under `folder`, each whole or not there; `size` is (H, W).

    They are written in the background, and what is there is not made again.
    """

    def __init__(self, folder: Path, plan: SamplePlan, size: tuple[int, int], extension: str):
        self.folder, self.plan, self.extension, self.size = folder, plan, extension, size
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self.pending: Iterator[None] = iter(())

    def path(self, image: ImageId) -> Path:
        return self.folder / self.plan.folder(image.label) / f"{self.plan.file_name(image)}.{self.extension}"

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
            if not self.is_whole(self.path(image)):
                missing.append(image)
        return missing

    def is_whole(self, path: Path) -> bool:
        """Return whether a file is an image of the plan's size, to its end."""
        return is_whole(path, self.size)

    def write(self, ids: Sequence[ImageId], images: np.ndarray) -> None:
        """Begin to write images uint8 (B, H, W, 1 or 3), when the ones before are written; raise what `flush` does."""
        self.flush()
        self.pending = self.pool.map(self._write, ids, images)

    def flush(self) -> None:
        """Wait until all is written; raise what went wrong."""
        list(self.pending)

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

    def _write(self, image: ImageId, pixels: np.ndarray) -> None:
        picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        _save(self.path(image), picture, **ENCODINGS[self.extension])


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
        super().__init__(folder / PARTS, plan, size, "png")
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
                    header = {"shape": (len(ids), *self.size, 3), "fortran_order": False, "descr": "|u1"}
                    np.lib.format.write_array_header_1_0(file, header)
                    for image in ids:
                        file.write(self.read(image).tobytes())
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                    np.lib.format.write_array(file, labels, version=(1, 0))
        shutil.rmtree(self.folder, ignore_errors=True)
        return str(self.npz)

    def _wrong(self, rule: str) -> UserError:
        return UserError(rule, about="output_dir", value=self.npz.parent)


def open_array(path: Path, name: str) -> np.ndarray:
    """Map an array of an uncompressed `.npz` into memory; OSError, ValueError, KeyError or BadZipFile if broken."""
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


def denoising(start: Tensor, times: Sequence[float], steps: list[int], show: Show, t_eps: float) -> Callable[..., None]:
    """Return a callback for the pipeline that calls `show` at some steps on the way from the noise (B, 3, H, W).

    times: the ends of all steps, 0 to 1. steps: those to show, of 0 (noise) to the last (images). show: is given
    x = z + (1 - t) dz/dt, the network's prediction under guidance, with Heun the mean over the step. t_eps: floor of
    1 - t, as in the scheduler.
    """

    def step_done(pipeline, step: int, t, values: dict) -> None:
        """Show the beginning of a step, now that its direction is known; at its end."""
        nonlocal start
        z = values["latents"][: len(start)].float().cpu()
        if step in steps:
            time, end = times[step : step + 2]
            show(time, pixels(start), pixels(start + max(1 - time, t_eps) * (z - start) / (end - time)))
        if step + 2 == len(times):
            show(1.0, pixels(z), pixels(z))
        start = z

    return step_done


def start_noise(pipeline, seed: int, numbers: list[int], height: int, width: int) -> Tensor:
    """Return what the ODE of these images starts from (B, 3, H, W), float32 on the CPU."""
    return pipeline.prepare_latents(len(numbers), generators(seed, numbers), None, height, width).cpu()


def pixels(z: Tensor) -> np.ndarray:
    """Return (B, C, H, W) in [-1, 1], clamped, as pictures uint8 (B, H, W, 3)."""
    return as_pictures(((z / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def spread(num_steps: int, most: int) -> list[int]:
    """Return at most `most` of the steps 0 to `num_steps`, evenly spread, with both ends."""
    count = min(most, num_steps + 1)
    return sorted({round(k * num_steps / (count - 1)) for k in range(count)})


def draw_grid(plan: SamplePlan, read: Callable[[ImageId], np.ndarray], path: Path) -> None:
    """Write a PNG of the first images of some classes, a named row each."""
    rows = [(plan.legible(label), [read(i) for i in ids]) for label, ids in plan.some(GRID_CLASSES, GRID_IMAGES)]
    _save(path, draw_rows(rows, max_cell=GRID_CELL_PIXELS), format="PNG")


def strip_images(plan: SamplePlan, most: int) -> list[ImageId]:
    """Return the images of a strip: of as many classes as there is room for."""
    most = min(most, STRIP_IMAGES)
    classes = plan.some(most, most)
    in_turn = [ids[k] for k in range(most) for _, ids in classes if k < len(ids)]
    return sorted(in_turn[:most], key=lambda image: (image.label, image.number))


def draw_strip(plan: SamplePlan, follow: Follow, num_steps: int, most: int, path: Path) -> None:
    """Write a PNG with two rows for each of at most `most` images: its state z, and x, which it heads for, by time."""
    images, columns = strip_images(plan, most), []
    follow(images, spread(num_steps, STRIP_COLUMNS), lambda *shown: columns.append(shown))
    rows = [
        (f"{letter}: {plan.legible(image.label)}", [column[which][i] for column in columns])
        for i, image in enumerate(images)
        for which, letter in ((1, "z"), (2, "x"))
    ]
    _save(path, draw_rows(rows, [f"t = {t:.2f}" for t, _, _ in columns], STRIP_CELL_PIXELS), format="PNG")


def draw_animation(plan: SamplePlan, follow: Follow, num_steps: int, most: int, path: Path) -> None:
    """Write a GIF or a WebP, by the path's ending, of a grid of states z; it runs for ever and rests on the images."""
    num_classes = min(ANIMATION_CLASSES, len(plan.labels), most)
    rows = plan.some(num_classes, min(ANIMATION_IMAGES, most // num_classes))
    frames: list[Image.Image] = []

    def show(t: float, z: np.ndarray, x: np.ndarray) -> None:
        left = iter(z)
        frame = [(plan.legible(label), [next(left) for _ in ids]) for label, ids in rows]
        frames.append(draw_rows(frame, max_cell=ANIMATION_CELL_PIXELS))

    follow([image for _, ids in rows for image in ids], spread(num_steps, MOST_FRAMES), show)
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    kind = path.suffix[1:].upper()
    more = {"quality": 80, "method": 2} if kind == "WEBP" else {"disposal": 1}
    first, *rest = frames
    _save(path, first, format=kind, save_all=True, append_images=rest, duration=durations, loop=0, **more)


def _save(path: Path, image: Image.Image, **options) -> None:
    with atomic_file(path, durable=False) as temporary:
        image.save(temporary, **options)
