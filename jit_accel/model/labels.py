"""Class labels as people give them: numbers, names, or None for "no class"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from jit_accel.base.errors import nearest

Label = int | str | None


def label_ids(class_labels: Label | Sequence[Label] | Tensor, num_classes: int, names: list[str] | None) -> list[int]:
    """Class numbers, names or None, or a list of them, as the network's labels; `num_classes` is "no class".

    None in place of a list means the one class of a network that was trained without labels, else "no class".

    Raises:
        ValueError: a label that the network does not know; the message says which it does.
    """
    if isinstance(class_labels, Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    if class_labels is None:
        class_labels = [0 if num_classes == 1 else None]
    elif isinstance(class_labels, int | float | str | np.generic):
        class_labels = [class_labels]
    ids = [_label_id(label, num_classes, names) for label in class_labels]
    if not ids:
        raise ValueError("class_labels is empty: give a class for each image, such as [0, 1]")
    return ids


def _label_id(label: Label, num_classes: int, names: list[str] | None) -> int:
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if label is None:
        return num_classes
    if num_classes == 0:
        raise ValueError(f"class {label!r}: the network knows no classes; use None for an image of no class")
    if isinstance(label, str):
        return _id_of_name(label, num_classes, names)
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise ValueError(
            f"class {label!r} is no label: use whole numbers from 0 to {num_classes - 1}, names, "
            "or None for an image of no class"
        )
    if not 0 <= label < num_classes:
        raise ValueError(
            f"class {label}: the network knows {num_classes} classes; use 0 to {num_classes - 1}, "
            "or None for an image of no class"
        )
    return int(label)


def find_name(name: str, names: Sequence[str]) -> int | None:
    """The place of a name in `names`; its case only matters where there are several that differ in nothing else."""
    if name in names:
        return names.index(name)
    lowered = [known.lower() for known in names]
    return lowered.index(name.lower()) if name.lower() in lowered else None


def _id_of_name(label: str, num_classes: int, names: list[str] | None) -> int:
    if names is None:
        raise ValueError(f"class {label!r}: this pipeline has no class names; use 0 to {num_classes - 1}")
    if (found := find_name(label, names)) is not None:
        return found
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise ValueError(f"class {label!r} is not among {shown}.{nearest(label, names)}")
