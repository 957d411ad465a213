"""Pictures of a sampling for people to look at: a grid, a strip of trajectories, an animation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jit_accel.base.files import atomic_file
from jit_accel.base.image_rows import draw_rows
from jit_accel.model.generation import generators
from jit_accel.sample.image_plan import ImageId, SamplePlan

GRID_CLASSES, GRID_IMAGES, GRID_CELL_PIXELS = 10, 8, 256
STRIP_IMAGES, STRIP_COLUMNS, STRIP_CELL_PIXELS = 6, 11, 192
ANIMATION_CLASSES, ANIMATION_IMAGES, ANIMATION_CELL_PIXELS = 6, 6, 128
_MOST_FRAMES = 60
_FRAME_MS, _LAST_FRAME_MS = 60, 2000

# What is shown of a step: t, and, both uint8 (B, H, W, 3), the state z and the image x that it heads for.
Show = Callable[[float, np.ndarray, np.ndarray], None]
# Makes these images once more, and shows these of their steps.
Follow = Callable[[list[ImageId], list[int], Show], None]


@dataclass
class Denoising:
    """Follows the ODE of a batch of images by the pipeline's callback, and calls `show` at some of its steps.

    z: (B, 3, H, W), the noise that they start from. steps: those to show, of 0 (noise) to num_steps (images). show: is
    given x = z + (1 - t) dz/dt, the network's prediction under guidance, with Heun the mean over the step. t_eps: floor
    of 1 - t, as in the scheduler.
    """

    z: Tensor
    num_steps: int
    steps: list[int]
    show: Show
    t_eps: float

    def step_done(self, pipeline, step: int, t, values: dict) -> None:
        """Show the beginning of step number `step`, now that its direction is known; at its end."""
        z = values["latents"][: len(self.z)].float().cpu()
        if step in self.steps:
            time = step / self.num_steps
            x = self.z + max(1 - time, self.t_eps) * (z - self.z) * self.num_steps
            self.show(time, pixels(self.z), pixels(x))
        if step + 1 == self.num_steps:
            self.show(1.0, pixels(z), pixels(z))
        self.z = z


def start_noise(pipeline, seed: int, numbers: list[int], height: int, width: int) -> Tensor:
    """Return what the ODE of these images starts from (B, 3, H, W), float32 on the CPU."""
    return pipeline.prepare_latents(len(numbers), generators(seed, numbers), None, height, width).cpu()


def pixels(z: Tensor) -> np.ndarray:
    """Return (B, 3, H, W) in [-1, 1], clamped, as uint8 (B, H, W, 3)."""
    return ((z / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def spread(num_steps: int, most: int) -> list[int]:
    """Return at most `most` of the steps 0 to `num_steps`, evenly spread, with both ends."""
    count = min(most, num_steps + 1)
    return sorted({round(k * num_steps / (count - 1)) for k in range(count)})


def draw_grid(plan: SamplePlan, read: Callable[[ImageId], np.ndarray], path: Path) -> None:
    """Write a PNG of the first images of some classes, a named row each."""
    rows = [(plan.name(label), [read(i) for i in ids]) for label, ids in plan.some(GRID_CLASSES, GRID_IMAGES)]
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
        (f"{letter}: {plan.name(image.label)}", [column[which][i] for column in columns])
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
        frame = [(plan.name(label), [next(left) for _ in ids]) for label, ids in rows]
        frames.append(draw_rows(frame, max_cell=ANIMATION_CELL_PIXELS))

    follow([image for _, ids in rows for image in ids], spread(num_steps, _MOST_FRAMES), show)
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    kind = path.suffix[1:].upper()
    more = {"quality": 80, "method": 2} if kind == "WEBP" else {"disposal": 1}
    first, *rest = frames
    _save(path, first, format=kind, save_all=True, append_images=rest, duration=durations, loop=0, **more)


def _save(path: Path, image: Image.Image, **options) -> None:
    with atomic_file(path, durable=False) as temporary:
        image.save(temporary, **options)
