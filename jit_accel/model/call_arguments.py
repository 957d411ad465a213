"""The arguments of a call of the pipeline: classes, guidance and steps; its pictures are in `picture_arguments.py`."""

import math
import operator
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import nearest
from jit_accel.model.scheduler import checked_choice, checked_shift
from jit_accel.model.solvers import SOLVERS

Label = int | str | None | Sequence[int | str]  # the last where images have several
GUIDED = ("label", "condition", "both")  # what guidance may leave out
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


def checked_range(values: Sequence[float]) -> list[float]:
    """Return the values of data that are -1 and 1 to the network, [low, high]. Raises `ValueError`."""
    try:
        low, high = map(float, () if isinstance(values, str) else values)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"value_range {values} must be (low, high) with low < high, such as (-1024, 3071)")
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
    "method": (lambda name: checked_choice("method", name, SOLVERS), None),
    "guidance_on": (lambda name: checked_choice("guidance_on", name, GUIDED), "both"),
    "value_range": (checked_range, None),
    "time_shift": (checked_shift, 1.0),
}


def checked_default(name: str, value):
    """Return a setting as a pipeline keeps it; None is as if it had never been given. Raises `ValueError`."""
    check, otherwise = DEFAULTS[name]
    return otherwise if value is None else check(value)


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
