"""Images that a sampling starts from, and masks of what is to be repainted."""

from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | np.ndarray | Tensor
STRENGTH = 0.6  # where a call does not say


def start_images(image: Picture | Sequence[Picture], size: tuple[int, int], batch: int) -> Tensor:
    """Return images as the network sees them, (batch, 3, H, W) in [-1, 1]; one serves all of the batch.

    Args:
        image: PIL; arrays (H, W, 3) or (B, H, W, 3); tensors (3, H, W) or (B, 3, H, W); uint8, or floats in [0, 1];
            or a list. Those of another size are cut to the shape around their middle, and resampled.
        size: height and width in pixels.

    Raises:
        ValueError: no image of this kind, values that are out of range, or not one image for each of the batch.
    """
    return _fitted("image", image, 3, size, batch) * 2 - 1


def repaint_mask(mask: Picture | Sequence[Picture], size: tuple[int, int], batch: int) -> Tensor:
    """Return (batch, 1, H, W), True where a mask, as for `start_images` or (H, W), is at least half white."""
    return _fitted("mask_image", mask, 1, size, batch) >= 0.5


def _fitted(name: str, given, channels: int, size: tuple[int, int], batch: int) -> Tensor:
    pictures = given if isinstance(given, list | tuple) else [given]
    tensors = [_resized(part, size) for picture in pictures for part in _pixels(name, picture, channels)]
    if len(tensors) == 1:
        tensors *= batch
    if len(tensors) != batch:
        raise ValueError(f"{len(tensors)} pictures as {name} for {batch} images: give one, or one for each image")
    return torch.stack(tensors)


def _pixels(name: str, picture: Picture, channels: int) -> Tensor:
    """Return (B, channels, H, W), float32 in [0, 1]."""
    pixels = _channels_first(name, picture, channels)
    is_bytes = pixels.dtype == torch.uint8 and not (channels == 1 and pixels.max() <= 1)  # masks are also of 0 and 1
    kind, pixels = pixels.dtype, pixels.float() / 255 if is_bytes else pixels.float()
    if pixels.ndim == 2 or (channels == 1 and pixels.ndim == 3 and pixels.shape[0] not in (1, 3)):
        pixels = pixels.unsqueeze(-3)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        wanted = "arrays (H, W, 3) or (B, H, W, 3), or tensors (3, H, W) or (B, 3, H, W)"
        raise ValueError(f"{name} has the shape {tuple(picture.shape)}: give {wanted}")
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} has values from {low:g} to {high:g} ({kind}): give uint8, or floats from 0 to 1")
    return pixels.mean(1, keepdim=True) if channels == 1 else pixels.expand(-1, 3, -1, -1)


def _channels_first(name: str, picture: Picture, channels: int) -> Tensor:
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):  # Pillow cuts such values off at 255
            remedy = "give 8 bits a channel, or an array of floats from 0 to 1"
            raise ValueError(f"{name} has the mode {picture.mode}: {remedy}")
        picture = np.array(ImageOps.exif_transpose(picture).convert("RGB" if channels == 3 else "L"))
    if isinstance(picture, Tensor):
        return picture.detach()
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{name} of {type(picture).__name__}: give a PIL image, an array or a tensor, or a list")
    if picture.ndim > 2 and picture.shape[-1] == 4:
        form = "black and white (H, W)" if channels == 1 else "RGB (H, W, 3)"
        raise ValueError(f"{name} has the shape {picture.shape}, with an alpha channel: give it as {form}")
    pixels = torch.from_numpy(np.ascontiguousarray(picture))
    return pixels.movedim(-1, -3) if pixels.ndim > 2 and pixels.shape[-1] in (1, 3) else pixels


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (C, H, W) around the middle to the shape of `size`, and resample it where the size differs."""
    height, width = pixels.shape[-2:]
    if (height, width) == tuple(size):
        return pixels
    scale = min(height / size[0], width / size[1])
    cut = [max(1, round(side * scale)) for side in size]
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    pixels = pixels[None, :, top : top + cut[0], left : left + cut[1]]
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def skipped_steps(steps: int, image, strength: float | None, mask_image) -> int:
    """Return how many of the steps from noise an image takes the place of. Raises `ValueError`."""
    if image is None:
        for name, value in (("strength", strength), ("mask_image", mask_image)):
            if value is not None:
                raise ValueError(f"{name} without image: give the image to start from")
        return 0
    strength = STRENGTH if strength is None else strength
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength {strength} must be above 0 and at most 1, such as {STRENGTH}")
    return steps - max(1, round(strength * steps))
