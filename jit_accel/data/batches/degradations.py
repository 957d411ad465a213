"""Conditions made from the images themselves: a row of `DEGRADATIONS` each.

What is random about one follows from the seed and the image's key, its position in the run or what its content gives.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jit_accel.base import rng
from jit_accel.base.errors import UserError, lookup
from jit_accel.config.presets import GREY_WEIGHTS

Degrading = Callable[[Tensor, float, np.ndarray], Tensor]


@dataclass(frozen=True)
class DegradationKind:
    """One way of degrading images: what it does to (B, C, H, W) in [-1, 1], and which argument it takes."""

    degrade: Degrading  # called with images, argument, and a uint64 seed for each image
    rule: str = ""  # of the argument, in words; "" where there is none
    holds: Callable[[float], bool] = lambda value: True
    example: str = ""
    channels: int | None = None  # of the result; None: those of the image


@dataclass(frozen=True)
class Degradation:
    """A way of making conditions from images, such as `downscale:4`."""

    name: str
    argument: float
    seed: int = 0

    def channels(self, in_channels: int) -> int:
        """Return the channels of a condition, of images of so many."""
        return DEGRADATIONS[self.name].channels or in_channels

    def __call__(self, images: Tensor, keys: np.ndarray) -> Tensor:
        """Return the conditions of images (B, C, H, W) in [-1, 1], by their keys, int64 (B,), in the same range."""
        seeds = rng.hash64(self.seed, f"condition {self.name}", keys)
        return DEGRADATIONS[self.name].degrade(images, self.argument, seeds).clamp(-1, 1)


def degradation_of(text: str, seed: int = 0, about: str = "condition_from") -> Degradation:
    """Return what `downscale:4` and the like mean. UserError for an unknown kind, or an argument out of range."""
    name, colon, argument = text.partition(":")
    kind = lookup(DEGRADATIONS, name, about)
    if not kind.rule:
        if colon:
            raise UserError(f"takes no argument: write {name}.", about=about, value=text)
        return Degradation(name, 0.0, seed)
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and kind.holds(value)):
        raise UserError(f"wants {kind.rule}, such as {name}:{kind.example}.", about=about, value=text)
    return Degradation(name, value, seed)


def check_size(degradation: Degradation, size: tuple[int, int], about: str = "condition_from") -> None:
    """Raise `UserError` where nothing would be left of images of this height and width."""
    if degradation.name == "downscale" and degradation.argument > min(size):
        rule = f"leaves less than a pixel of {size[0]} x {size[1]}: use a smaller factor."
        raise UserError(rule, about=about, value=f"downscale:{degradation.argument:g}")


def downscale(images: Tensor, factor: float, seeds: np.ndarray) -> Tensor:
    """Reduce bicubically, with antialiasing, and enlarge again bicubically, as is usual in super-resolution."""
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    small = F.interpolate(images, size, mode="bicubic", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)


def grey(images: Tensor, argument: float, seeds: np.ndarray) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor(GREY_WEIGHTS, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def blur(images: Tensor, sigma: float, seeds: np.ndarray) -> Tensor:
    """Convolve with a Gaussian of `sigma` pixels; beyond its edges an image is mirrored."""
    reach = min(math.ceil(3 * sigma), *(side - 1 for side in images.shape[-2:]))
    places = torch.arange(-reach, reach + 1, dtype=torch.float32, device=images.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[..., None, :], groups=images.shape[1])
    return F.conv2d(rows, kernel[..., None], groups=images.shape[1])


def noise(images: Tensor, deviation: float, seeds: np.ndarray) -> Tensor:
    """Add Gaussian noise whose standard deviation is this share of the range from black to white."""
    drawn, generator = torch.empty_like(images), torch.Generator(images.device)
    for image, seed in zip(drawn, seeds.tolist()):
        image.normal_(generator=generator.manual_seed(seed >> 1))
    return torch.add(images, drawn, alpha=2 * deviation)


def mask(images: Tensor, share: float, seeds: np.ndarray) -> Tensor:
    """Make a rectangle grey, of the image's shape, this share of its area, anywhere."""
    height, width = images.shape[-2:]
    tall, wide = (max(1, round(side * share**0.5)) for side in (height, width))
    masked = images.clone()
    across, down = (rng.uniform(0, axis, seeds) for axis in ("across", "down"))
    for image, x, y in zip(masked, across.tolist(), down.tolist()):
        top, left = int(y * (height - tall + 1)), int(x * (width - wide + 1))
        image[:, top : top + tall, left : left + wide] = 0
    return masked


def jpeg(images: Tensor, quality: float, seeds: np.ndarray) -> Tensor:
    """Compress as JPEG of this quality, and decode."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    out = np.empty_like(pixels)
    for place, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(file, "JPEG", quality=int(quality))
        out[place] = np.asarray(Image.open(file)).reshape(image.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).to(images.device, torch.float32).div_(127.5).sub_(1)


def _is_whole(low: int, high: int) -> Callable[[float], bool]:
    return lambda value: value == int(value) and low <= value <= high


DEGRADATIONS = {
    "downscale": DegradationKind(downscale, "a factor above 1", lambda value: 1 < value <= 2**14, "4"),
    "grey": DegradationKind(grey, channels=1),
    "blur": DegradationKind(blur, "the standard deviation in pixels", lambda value: 0 < value <= 100, "2.0"),
    "noise": DegradationKind(
        noise, "the standard deviation as a share of the range", lambda value: 0 < value <= 10, "0.1"
    ),
    "mask": DegradationKind(mask, "the share of the area, between 0 and 1", lambda value: 0 < value < 1, "0.5"),
    "jpeg": DegradationKind(jpeg, "a whole quality from 1 to 100", _is_whole(1, 100), "20"),
}
