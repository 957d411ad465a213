"""The arguments of a call of the pipeline: classes, guidance and steps, images to start from, and masks."""

import math
import operator
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from jit_accel.base.errors import nearest
from jit_accel.model.guidance import GUIDED
from jit_accel.model.scheduler import CALLS_PER_STEP, checked_choice

Label = int | str | None | Sequence[int | str]  # the last where images have several
Picture = Image.Image | np.ndarray | Tensor
STRENGTH = 0.6  # where a call does not say


def label_ids(
    class_labels: Label | Sequence[Label] | Tensor, num_classes: int, names: list[str] | None, has_several: bool = False
) -> list[int | list[int]]:
    """Return class numbers, names or None, or a list of them, as the network's labels; `num_classes` is "no class".

    Of a network that `has_several`, each may be a list. None in place of a list means the one class of a network that
    was trained without labels, else "no class".
    Raises `ValueError` for a label that the network does not know; the message says which it does.
    """
    if isinstance(class_labels, Tensor | np.ndarray | np.generic):
        class_labels = class_labels.tolist()
    if class_labels is None:
        class_labels = [0 if num_classes == 1 else None]
    elif isinstance(class_labels, int | float | str):
        class_labels = [class_labels]
    ids = [_several_ids(label, num_classes, names, has_several) for label in class_labels]
    if not ids:
        raise ValueError("class_labels is empty: give a class for each image, such as [0, 1]")
    return ids


def _several_ids(label: Label, num_classes: int, names: list[str] | None, has_several: bool) -> int | list[int]:
    """Return the label of an image, or the list of those it has."""
    parts = label.tolist() if isinstance(label, Tensor | np.ndarray) else label
    if not has_several or not isinstance(parts, list | tuple):
        return _label_id(label, num_classes, names)
    found = list(dict.fromkeys(_label_id(part, num_classes, names) for part in parts))
    return found or num_classes


def labels_tensor(ids: Sequence[int | list[int]], num_classes: int) -> Tensor:
    """Return labels as the network's argument, int64 (B,), or (B, k) where an image has several."""
    rows = [label if isinstance(label, list) else [label] for label in ids]
    most = max(map(len, rows))
    filled = torch.tensor([[*row, *[num_classes] * (most - len(row))] for row in rows], dtype=torch.long)
    return filled[:, 0] if most == 1 else filled


def _label_id(label: Label, num_classes: int, names: list[str] | None) -> int:
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, list | tuple) and len(label) == 1:  # of a column of labels
        (label,) = label
    last, found = num_classes - 1, None
    if label is None:
        return num_classes
    if num_classes == 0:
        rule = "the network knows no classes; use None for an image of no class"
    elif isinstance(label, str) and names is None:
        rule = f"this pipeline has no class names; use 0 to {last}"
    elif isinstance(label, str):
        found = find_name(label, names)
        rule = f"is not among {', '.join(names[:10])}{', ...' * (len(names) > 10)}.{nearest(label, names)}"
    elif isinstance(label, bool) or not isinstance(label, int):
        rule = f"is no label; use whole numbers from 0 to {last}, names, or None for an image of no class"
    else:
        found = label if 0 <= label <= last else None
        rule = f"the network knows {num_classes} classes; use 0 to {last}, or None for an image of no class"
    if found is None:
        raise ValueError(f"class {label!r}: {rule}")
    return found


def checked_names(names: Sequence[str] | Mapping[str, str] | None, num_classes: int) -> list[str] | None:
    """Return the classes' names in the order of the labels, also of a table by number. Raises `ValueError`."""
    if isinstance(names, Mapping):  # as in model_index.json
        names = [names[number] for number in sorted(names, key=int)]
    if names is not None and len(names) != num_classes:
        rule = f"has {len(names)} names, but the network has {num_classes} classes"
        raise ValueError(f"class_names {rule}: give one name for each, in the order of the labels")
    return None if names is None else [str(name) for name in names]


def find_name(name: str, names: Sequence[str]) -> int | None:
    """Return the place of a name in `names`, in any form of Unicode; its case matters only among names alike."""
    name, names = (unicodedata.normalize("NFC", name), [unicodedata.normalize("NFC", known) for known in names])
    if name in names:
        return names.index(name)
    lowered = [known.lower() for known in names]
    return lowered.index(name.lower()) if name.lower() in lowered else None


def guidance_weight(t: float, guidance_scale: float, interval: Sequence[float]) -> float:
    """Return `guidance_scale` where lo < t < hi (or lo = 0 and t < hi), else 1 (arXiv 2404.07724).

    Raises `ValueError` unless the interval is (lo, hi) with 0 <= lo <= hi <= 1.
    """
    # t is on a float32 grid: 0.1 there is above 0.1 in float64.
    low, high = (float(np.float32(end)) for end in checked_interval(interval))
    return guidance_scale if t < high and (low == 0 or t > low) else 1.0


def is_number(value) -> bool:
    """Return True for a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def checked_interval(interval: Sequence[float]) -> list[float]:
    """Return where guidance acts, [low, high] in t. Raises `ValueError`."""
    try:
        low, high = map(float, () if isinstance(interval, str) else interval)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        rule = "must be (low, high) with 0 <= low <= high <= 1, such as (0.1, 1.0)"
        raise ValueError(f"guidance_interval {interval} {rule}")
    return [low, high]


def checked_scale(scale: float) -> float:
    """Return the weight of guidance as a float. Raises `ValueError`."""
    value = _as(float, scale)
    if not math.isfinite(value):
        raise ValueError(f"guidance_scale {scale} must be a number, such as 2.0; 1 is no guidance")
    return value


def checked_count(name: str, count: int) -> int:
    """Return a whole number from 1 on. Raises `ValueError`."""
    value = _as(operator.index, count)
    if not value >= 1:
        raise ValueError(f"{name} {count} must be a whole number and at least 1")
    return value


def checked_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> Sequence[torch.Generator | None]:
    """Return the generator of each image. Raises `ValueError`."""
    if isinstance(generator, int):
        raise ValueError(f"generator {generator}: give torch.Generator().manual_seed({generator})")
    generators = generator if isinstance(generator, list | tuple) else [generator] * batch
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} images: give one, or one for each image")
    if wrong := [g for g in generators if not (g is None or isinstance(g, torch.Generator))]:
        raise ValueError(f"generator {wrong[0]!r}: give a torch.Generator, or a list with one for each image")
    return generators


def _as(kind: Callable, value):
    """Return `kind(value)`, or NaN where this is no number of that kind; a bool is not."""
    try:
        return math.nan if isinstance(value, bool) else kind(value)
    except (TypeError, ValueError):
        return math.nan


# The settings of sampling that a pipeline keeps: how each is checked, and what it is where the pipeline does not say.
DEFAULTS: dict[str, tuple[Callable, Any]] = {
    "guidance_scale": (checked_scale, 1.0),
    "guidance_interval": (checked_interval, [0.1, 1.0]),
    "num_inference_steps": (lambda steps: checked_count("num_inference_steps", steps), None),
    "method": (lambda name: checked_choice("method", name, CALLS_PER_STEP), None),
    "guidance_on": (lambda name: checked_choice("guidance_on", name, GUIDED), "both"),
}


def checked_default(name: str, value):
    """Return a setting as a pipeline keeps it; None is as if it had never been given. Raises `ValueError`."""
    check, otherwise = DEFAULTS[name]
    return otherwise if value is None else check(value)


def start_images(image: Picture | Sequence[Picture], size: tuple[int, int], batch: int) -> Tensor:
    """Return images as the network sees them, (batch, 3, H, W) in [-1, 1]; one serves all of the batch.

    They are PIL; arrays (H, W, 3) or (B, H, W, 3); tensors (3, H, W) or (B, 3, H, W); uint8, or floats in [0, 1]; or a
    list of these. Those of another size (height, width) are cut to its shape around their middle, and resampled. Raises
    `ValueError`: no image of this kind, values out of range, or not one image for each of the batch.
    """
    return _fitted("image", image, 3, size, batch) * 2 - 1


def repaint_mask(mask: Picture | Sequence[Picture], size: tuple[int, int], batch: int) -> Tensor:
    """Return (batch, 1, H, W), True where a mask, as for `start_images` or (H, W), is at least half white."""
    return _fitted("mask_image", mask, 1, size, batch) >= 0.5


def condition_pictures(given: Picture | Sequence[Picture | None] | None, channels: int, labels: int) -> list:
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
        found += [None] if picture is None else _pixels("condition_image", picture, channels)
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
    is_bytes = pixels.dtype == torch.uint8 and not (name == "mask_image" and pixels.max() <= 1)  # also of 0 and 1
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


def callback_tensors(callback: Callable | None, names: Sequence[str]) -> Sequence[str]:
    """Return the tensors that a callback, also one of diffusers' own, is to be given. Raises `ValueError`."""
    asked = getattr(callback, "tensor_inputs", names)
    if unknown := set(asked) - {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs {sorted(unknown)}: there is only 'latents'")
    return asked


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
