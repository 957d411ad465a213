"""Augmentation for small data sets that the network is told of, so that samples have none of it (2206.00364, F.2)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jit_accel.base import rng
from jit_accel.data.batches.batch import Batch

# EDM's: log2 of scale and of anisotropy, and the shift as a share of the image, are normal with these deviations.
SCALE_STD, STRETCH_STD, SHIFT_STD = 0.2, 0.2, 0.125


@dataclass(frozen=True)
class Augmentation:
    """Mirrors every second image, and turns others upside down, scales, rotates, stretches and shifts them.

    Each of these but the first happens with `probability`; what happens follows from seed and positions alone.
    """

    probability: float
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch of augmented images, with the numbers that say how, float32 (B, AUGMENT_SIZE)."""
        drawn = self.drawn(batch.positions)
        images = batch.images
        for axis, flipped in ((-1, drawn[:, 0]), (-2, drawn[:, 1])):
            if len(places := np.flatnonzero(flipped)):
                into = torch.from_numpy(places).to(images.device, non_blocking=True)
                images = images.index_copy(0, into, images[into].flip(axis))
        if len(places := np.flatnonzero(drawn[:, 2:].any(1))):
            into = torch.from_numpy(places).to(images.device, non_blocking=True)
            images = images.index_copy(0, into, moved(images[into], drawn[places]))
        return replace(batch, images=images, augmentation=told(drawn).to(images.device, non_blocking=True))

    def drawn(self, positions: np.ndarray) -> np.ndarray:
        """Draw float64 (B, 8): mirrored, upside down, log2 scale, angle, log2 stretch and its angle, shifts x and y."""

        def uniform(name: str) -> np.ndarray:
            return rng.uniform(self.seed, f"augment_{name}", positions)

        def normal(name: str) -> np.ndarray:
            return torch.special.ndtri(torch.from_numpy(uniform(name))).numpy()

        def happens(name: str) -> np.ndarray:
            return uniform(f"{name}_happens") < self.probability

        half_turns = np.pi * (2 * np.stack([uniform("angle"), uniform("axis")]) - 1)
        shifts = happens("shift") * SHIFT_STD * np.stack([normal("shift_x"), normal("shift_y")])
        stretches = happens("stretch")
        columns = (
            uniform("mirror") < 0.5,
            happens("upside_down") & (uniform("upside_down") < 0.5),
            happens("scale") * SCALE_STD * normal("scale"),
            happens("rotate") * half_turns[0],
            stretches * STRETCH_STD * normal("stretch"),
            stretches * half_turns[1],
            *shifts,
        )
        return np.stack(columns, 1).astype(np.float64)


def told(drawn: np.ndarray) -> Tensor:
    """Return what the network is told, float32 (B, AUGMENT_SIZE), zeros of an image that is as it was."""
    mirrored, upside_down, scale, angle, stretch, axis, x, y = drawn.T
    stretches = stretch * np.cos(axis), stretch * np.sin(axis)
    columns = (mirrored, upside_down, scale, np.cos(angle) - 1, np.sin(angle), *stretches, x, y)
    return torch.from_numpy(np.stack(columns, 1).astype(np.float32))


def moved(images: Tensor, drawn: np.ndarray) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1], scaled, stretched, rotated and shifted; mirrored beyond their edges."""
    height, width = images.shape[-2:]
    _, _, scale, angle, stretch, axis, x, y = torch.from_numpy(drawn).T
    sides = torch.exp2(stretch[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64))
    forth = turned(angle) @ turned(axis) @ torch.diag_embed(sides) @ turned(-axis) * torch.exp2(scale)[:, None, None]
    back = torch.linalg.inv(forth)  # from a place in the result to that in the image, in pixels from the middle
    half = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    shift = back @ (2 * half * torch.stack([x, y], 1))[..., None]
    theta = torch.cat([back * half / half[:, None], -shift / half[:, None]], 2).float()
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return found.clamp(-1, 1)


def turned(angle: Tensor) -> Tensor:
    """Return the rotation matrices (B, 2, 2) of angles (B,), in radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
