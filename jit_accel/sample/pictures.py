"""Pictures of a sampling for people to look at: a grid, a strip of trajectories, an animation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jit_accel.base.files import atomic_file
from jit_accel.base.sheets import draw_rows
from jit_accel.model.generation import generators
from jit_accel.sample.plan import Item, Plan

GRID_CLASSES, GRID_IMAGES, GRID_CELL_PIXELS = 10, 8, 256
STRIP_IMAGES, STRIP_COLUMNS, STRIP_CELL_PIXELS = 6, 11, 192
ANIMATION_CLASSES, ANIMATION_IMAGES, ANIMATION_CELL_PIXELS = 6, 6, 128
_MOST_FRAMES = 60
_FRAME_MS, _LAST_FRAME_MS = 60, 2000


def draw_grid(plan: Plan, read: Callable[[Item], np.ndarray], path: Path) -> None:
    """Write a PNG of the first images of some classes, a named row each."""
    rows = [(plan.name(label), [read(i) for i in items]) for label, items in plan.some(GRID_CLASSES, GRID_IMAGES)]
    sheet = draw_rows(rows, max_cell=GRID_CELL_PIXELS)
    with atomic_file(path, durable=False) as temporary:
        sheet.save(temporary, format="PNG")


@dataclass
class Denoising:
    """Follows the ODE of a batch of images by the pipeline's callback, and calls `show` at some of its steps.

    Args:
        z: (B, 3, H, W), the noise that they start from.
        steps: those to show, of 0 (noise) to num_steps (images).
        show: called with t and, both uint8 (B, H, W, 3), the state z and the image x = z + (1 - t) dz/dt that it
            heads for: the network's prediction under guidance, with Heun the mean over the step.
        t_eps: floor of 1 - t, as in the scheduler.
    """

    z: Tensor
    num_steps: int
    steps: list[int]
    show: Callable[[float, np.ndarray, np.ndarray], None]
    t_eps: float

    def step_done(self, pipeline, step: int, t, values: dict) -> None:
        """At the end of step number `step`, whose beginning is shown now that its direction is known."""
        z = values["latents"][: len(self.z)].float().cpu()
        if step in self.steps:
            time = step / self.num_steps
            x = self.z + max(1 - time, self.t_eps) * (z - self.z) * self.num_steps
            self.show(time, pixels(self.z), pixels(x))
        if step + 1 == self.num_steps:
            self.show(1.0, pixels(z), pixels(z))
        self.z = z


def start_noise(pipeline, seed: int, numbers: list[int], height: int, width: int) -> Tensor:
    """What the ODE of these images starts from (B, 3, H, W), float32 on the CPU."""
    return pipeline.prepare_latents(len(numbers), generators(seed, numbers), None, height, width).cpu()


def pixels(z: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped, to uint8 (B, H, W, 3)."""
    return ((z / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def spread(num_steps: int, most: int) -> list[int]:
    """At most `most` of the steps 0 to `num_steps`, evenly spread, with both ends."""
    count = min(most, num_steps + 1)
    return sorted({round(k * num_steps / (count - 1)) for k in range(count)})


def strip_items(plan: Plan, most: int) -> list[Item]:
    """The images of a strip: of as many classes as there is room for."""
    most = min(most, STRIP_IMAGES)
    classes = plan.some(most, most)
    in_turn = [items[k] for k in range(most) for _, items in classes if k < len(items)]
    return sorted(in_turn[:most], key=lambda item: (item.label, item.number))


class Strip:
    """Two rows for each image, its state z and the image x that it heads for; columns are times."""

    def __init__(self, names: list[str]):
        self.names, self.times = names, []
        self.z: list[np.ndarray] = []
        self.x: list[np.ndarray] = []

    def show(self, t: float, z: np.ndarray, x: np.ndarray) -> None:
        self.times.append(f"t = {t:.2f}")
        self.z.append(z)
        self.x.append(x)

    def write(self, path: Path) -> None:
        rows = [
            (f"{letter}: {name}", [column[i] for column in columns])
            for i, name in enumerate(self.names)
            for letter, columns in (("z", self.z), ("x", self.x))
        ]
        sheet = draw_rows(rows, self.times, STRIP_CELL_PIXELS)
        with atomic_file(path, durable=False) as temporary:
            sheet.save(temporary, format="PNG")


def animation_rows(plan: Plan, most: int) -> list[tuple[int, list[Item]]]:
    """The classes and images of an animation, not more than `most` images."""
    num_classes = min(ANIMATION_CLASSES, len(plan.labels), most)
    return plan.some(num_classes, min(ANIMATION_IMAGES, most // num_classes))


class Animation:
    """A grid of the states z, a frame for each of some steps."""

    def __init__(self, rows: list[tuple[str, int]]):
        self.rows = rows  # name, number of images
        self.frames: list[Image.Image] = []

    @staticmethod
    def steps(num_steps: int) -> list[int]:
        return spread(num_steps, _MOST_FRAMES)

    def show(self, t: float, z: np.ndarray, x: np.ndarray) -> None:
        images = iter(z)
        rows = [(name, [next(images) for _ in range(count)]) for name, count in self.rows]
        self.frames.append(draw_rows(rows, max_cell=ANIMATION_CELL_PIXELS))

    def write(self, path: Path) -> None:
        """Write a GIF or a WebP, by the path's ending, that runs for ever and rests on the images."""
        durations = [_FRAME_MS] * (len(self.frames) - 1) + [_LAST_FRAME_MS]
        kind = path.suffix[1:].upper()
        more = {"quality": 80, "method": 2} if kind == "WEBP" else {"disposal": 1}
        first, *rest = self.frames
        settings = {"format": kind, "save_all": True, "append_images": rest, "duration": durations, "loop": 0, **more}
        with atomic_file(path, durable=False) as temporary:
            first.save(temporary, **settings)
