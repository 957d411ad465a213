"""Class labels as people give them: numbers, names, or None for "no class"."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from jit_accel.base.errors import nearest

Label = int | str | None


def label_ids(class_labels: Label | Sequence[Label] | Tensor, num_classes: int, names: list[str] | None) -> list[int]:
    """Return class numbers, names or None, or a list of them, as the network's labels; `num_classes` is "no class".

    None in place of a list means the one class of a network that was trained without labels, else "no class".

    Raises:
        ValueError: a label that the network does not know; the message says which it does.
    """
    if isinstance(class_labels, Tensor | np.ndarray | np.generic):
        class_labels = class_labels.tolist()
    if class_labels is None:
        class_labels = [0 if num_classes == 1 else None]
    elif isinstance(class_labels, int | float | str):
        class_labels = [class_labels]
    ids = [_label_id(label, num_classes, names) for label in class_labels]
    if not ids:
        raise ValueError("class_labels is empty: give a class for each image, such as [0, 1]")
    return ids


def _label_id(label: Label, num_classes: int, names: list[str] | None) -> int:
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
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


def find_name(name: str, names: Sequence[str]) -> int | None:
    """Return the place of a name in `names`; its case matters only among several that differ in nothing else."""
    if name in names:
        return names.index(name)
    lowered = [known.lower() for known in names]
    return lowered.index(name.lower()) if name.lower() in lowered else None
