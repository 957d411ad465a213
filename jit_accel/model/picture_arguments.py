"""The pictures of a call of the pipeline, those that it starts from or is shown, and those that it returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from jit_accel.config.presets import GREY_WEIGHTS
from jit_accel.model.scheduler import checked_choice

Picture = Image.Image | np.ndarray | Tensor
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
OWN_RANGES = {"uint8": 255.0, "uint16": 65535.0}  # of arrays that are conditions


def checked_output(output_type: str, channels: int) -> None:
    """Raise `ValueError` for an unknown output_type, and for pictures of so many channels that there are none."""
    checked_choice("output_type", output_type, OUTPUT_TYPES)
    if output_type == "pil" and channels not in (1, 3):
        rule = f"images of {channels} channels are no pictures: use 'np', (B, H, W, {channels}), or 'pt'"
        raise ValueError(f"output_type 'pil': {rule}")


def output_of(z: Tensor, output_type: str, value_range: Sequence[float] | None) -> Any:
    """Return the images of (B, C, H, W) in [-1, 1] as a call does; arrays in the data's units, where these are kept."""
    images = VaeImageProcessor().postprocess(z, output_type)
    if output_type == "np" and value_range is not None:
        low, high = value_range
        images = (low + images * (high - low)).astype(np.float32)
    return images


def start_images(
    image: Picture | Sequence[Picture],
    size: tuple[int, int],
    batch: int,
    channels: int = 3,
    value_range: Sequence[float] | None = None,
) -> Tensor:
    """Return images as the network sees them, (batch, channels, H, W) in [-1, 1]; one serves all of the batch.

    They are PIL; arrays (H, W, C) or (B, H, W, C); tensors (C, H, W) or (B, C, H, W); uint8, or floats in [0, 1]; or a
    list of these. Arrays are in the data's units where `value_range` says them. Those of another size (height, width)
    are cut to its shape around their middle, and resampled. Raises `ValueError`: no image of this kind, values out of
    range, or not one image for each of the batch.
    """
    return _fitted("image", image, channels, size, batch, value_range) * 2 - 1


def repaint_mask(mask: Picture | Sequence[Picture], size: tuple[int, int], batch: int) -> Tensor:
    """Return (batch, 1, H, W), True where a mask, as for `start_images` or (H, W), is at least half white."""
    return _fitted("mask_image", mask, 1, size, batch) >= 0.5


def condition_pictures(
    given: Picture | Sequence[Picture | None] | None,
    channels: int,
    labels: int,
    value_range: Sequence[float] | None = None,
) -> list:
    """Return the conditions of a call, (channels, H, W) in [0, 1] or None each, as many as `labels` where these are
    several; [] for a network that knows no conditions. Raises `ValueError`.
    """
    if channels == 0:
        if given is not None:
            raise ValueError("condition_image: the network was trained without one: leave it out")
        return []
    if given is None:
        rule = "is not given, and the network was trained with one: give a picture for each image, or [None] for none"
        raise ValueError(f"condition_image {rule}")
    found = []
    for picture in given if isinstance(given, list | tuple) else [given]:
        found += [None] if picture is None else _pixels("condition_image", picture, channels, value_range)
    if not found or (len(found) != labels and 1 not in (len(found), labels)):
        rule = "give one, one for each label, or one label"
        raise ValueError(f"{len(found)} pictures as condition_image for {labels} labels: {rule}")
    return found * labels if len(found) == 1 else found


def conditions_of(pictures: list[Tensor | None], size: tuple[int, int]) -> dict[str, Tensor]:
    """Return conditions as the network's arguments, cut to the shape of `size` and resampled; {} for none at all."""
    given = [picture for picture in pictures if picture is not None]
    if not given:
        return {}
    none = torch.zeros(len(given[0]), *size)
    fitted = [none if picture is None else _resized(picture, size) * 2 - 1 for picture in pictures]
    mask = torch.tensor([picture is not None for picture in pictures])
    return {"condition_image": torch.stack(fitted), "condition_mask": mask}


def bridge_start(given: Mapping[str, Tensor], channels: int, image) -> Tensor:
    """Return where a path starts that leads from the condition, among the network's arguments, to the image.

    Raises `ValueError` where an image has none, or one of other channels, and for an `image` to start from as well.
    """
    if image is not None:
        rule = "this network starts at its condition, not at noise, which an image could take a part of"
        raise ValueError(f"image: {rule}: give the picture as condition_image, and leave image and mask_image out")
    if "condition_image" not in given or not given["condition_mask"].all():
        raise ValueError("condition_image: this network starts at it: give a picture for each image, and no None")
    condition = given["condition_image"]
    if condition.shape[1] != channels:
        rule = f"has {condition.shape[1]} channels, and the images {channels}: a path leads between equally many"
        raise ValueError(f"condition_image {rule}")
    return condition


def _fitted(name: str, given, channels: int, size: tuple[int, int], batch: int, value_range=None) -> Tensor:
    pictures = given if isinstance(given, list | tuple) else [given]
    tensors = [_resized(part, size) for picture in pictures for part in _pixels(name, picture, channels, value_range)]
    if len(tensors) == 1:
        tensors *= batch
    if len(tensors) != batch:
        raise ValueError(f"{len(tensors)} pictures as {name} for {batch} images: give one, or one for each image")
    return torch.stack(tensors)


def _pixels(name: str, picture: Picture, channels: int, value_range: Sequence[float] | None = None) -> Tensor:
    """Return (B, channels, H, W), float32 in [0, 1]."""
    if value_range is not None and isinstance(picture, Image.Image) and picture.mode.startswith(("I", "F")):
        picture = np.asarray(picture)
    if value_range is not None and isinstance(picture, np.ndarray):
        picture = _from_units(picture, value_range, name == "condition_image")
    pixels = _channels_first(name, picture, channels)
    is_bytes = pixels.dtype == torch.uint8 and not (name == "mask_image" and pixels.max() <= 1)  # also of 0 and 1
    kind, pixels = pixels.dtype, pixels.float() / 255 if is_bytes else pixels.float()
    if pixels.ndim == 2 or (channels == 1 and pixels.ndim == 3 and pixels.shape[0] not in (1, 3)):
        pixels = pixels.unsqueeze(-3)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] not in ((1, 3) if channels in (1, 3) else (channels,)):
        count = channels if channels != 1 or name != "mask_image" else 3
        wanted = f"arrays (H, W, {count}) or (B, H, W, {count}), or tensors ({count}, H, W) or (B, {count}, H, W)"
        raise ValueError(f"{name} has the shape {tuple(picture.shape)}: give {wanted}")
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} has values from {low:g} to {high:g} ({kind}): give uint8, or floats from 0 to 1")
    if channels == 1 and name != "mask_image" and pixels.shape[1] == 3:
        return (pixels * torch.tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True).clamp(0, 1)
    return pixels.mean(1, keepdim=True) if channels == 1 else pixels.expand(-1, channels, -1, -1)


def _from_units(values: np.ndarray, value_range: Sequence[float], is_condition: bool) -> np.ndarray:
    """Return an array in the data's units as floats in [0, 1], cut off there, as in the training."""
    low, high = value_range
    if is_condition and values.dtype.name in OWN_RANGES:
        low, high = 0.0, OWN_RANGES[values.dtype.name]
    return ((values.astype(np.float32) - low) / (high - low)).clip(0, 1).astype(np.float32)


def _channels_first(name: str, picture: Picture, channels: int) -> Tensor:
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):  # Pillow cuts such values off at 255
            remedy = "give 8 bits a channel, or an array of floats from 0 to 1"
            raise ValueError(f"{name} has the mode {picture.mode}: {remedy}")
        picture = ImageOps.exif_transpose(picture)
        if channels in (1, 3):
            picture = picture.convert("RGB" if channels == 3 else "L")
        elif len(picture.getbands()) != channels:
            raise ValueError(f"{name} has the mode {picture.mode}: give an array (H, W, {channels})")
        picture = np.array(picture)
    if isinstance(picture, Tensor):
        return picture.detach()
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"{name} of {type(picture).__name__}: give a PIL image, an array or a tensor, or a list")
    if picture.ndim > 2 and picture.shape[-1] == 4 != channels:
        form = "black and white (H, W)" if channels == 1 else "RGB (H, W, 3)"
        raise ValueError(f"{name} has the shape {picture.shape}, with an alpha channel: give it as {form}")
    pixels = torch.from_numpy(np.ascontiguousarray(picture))
    return pixels.movedim(-1, -3) if pixels.ndim > 2 and pixels.shape[-1] in (1, 3, channels) else pixels


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
