"""Numbers as conditions of a call of the pipeline: checked, and standardised as in the training."""

import math
from collections.abc import Mapping, Sequence
from numbers import Number

import numpy as np
import torch
from torch import Tensor

Row = float | Sequence[float] | Mapping[str, float | Sequence[float]] | None  # of an image


def checked_columns(columns: Mapping | None, sizes: Sequence[int]) -> dict | None:
    """Return the columns of numbers of a network that takes these `sizes`, as a pipeline keeps them.

    They are {"names", "sizes", "mean", "std"}, lists; left out, names are numbers, and values are taken as they are.
    None for a network that takes none. Raises `ValueError` for other sizes, and deviations that are not positive.
    """
    count = sum(sizes)
    if not sizes:
        return None
    if columns is None:
        return {"names": [*map(str, range(len(sizes)))], "sizes": [*sizes], "mean": [0.0] * count, "std": [1.0] * count}
    lengths = len(columns["names"]), len(columns["mean"]), len(columns["std"])
    if list(columns["sizes"]) != list(sizes) or lengths != (len(sizes), count, count) or not min(columns["std"]) > 0:
        rule = f"do not fit the network, which takes columns of {list(sizes)} numbers: give a name for each, and for "
        raise ValueError(f"vectors {dict(columns)} {rule}each number a mean and a positive deviation")
    return {name: list(columns[name]) for name in ("names", "sizes", "mean", "std")}


def usual_row(columns: Mapping) -> dict[str, float | list[float]]:
    """Return the mean of each column by its name, in three digits, as a call takes them."""
    means, row = iter(columns["mean"]), {}
    for name, size in zip(columns["names"], columns["sizes"]):
        numbers = [float(f"{next(means):.3g}") for _ in range(size)]
        row[name] = numbers if size > 1 else numbers[0]
    return row


def note_of_none(columns: Mapping | None, remedy: str) -> str | None:
    """Return what is to be said where images are made without the numbers that a network was trained with.

    The remedy is a sentence without its full stop.
    """
    if not columns:
        return None
    names = ", ".join(columns["names"])
    return f"the model was trained with numbers ({names}), and these images have none: {remedy}."


def vectors_asked(
    given: Sequence[Row] | Row | Tensor | np.ndarray, columns: Mapping | None, labels: int
) -> list[list[float] | None]:
    """Return the numbers of a call in the units of the data, for each image a list or None, as many as `labels` where
    these are several; [] for a network that takes none. Raises `ValueError`.
    """
    if columns is None:
        if given is not None:
            raise ValueError("vectors: the network was trained without numbers: leave it out")
        return []
    if given is None:
        rule = "is not given, and the network was trained with numbers"
        raise ValueError(f"vectors {rule}: give {_in_words(columns)} for each image, or [None] for none")
    rows = [_checked_row(row, columns) for row in _rows_in(given, sum(columns["sizes"]))]
    if not rows or (len(rows) != labels and 1 not in (len(rows), labels)):
        raise ValueError(f"{len(rows)} rows as vectors for {labels} labels: give one, one for each label, or one label")
    return rows * labels if len(rows) == 1 else rows


def spread(parts: Sequence[list], copies: int) -> tuple[list, ...]:
    """Return lists, each of one item or of one an image, as long as the longest, copies side by side; [] stays so."""
    count = max(map(len, parts))
    whole = (part * (count // max(1, len(part))) for part in parts)
    return tuple([each for each in part for _ in range(copies)] for part in whole)


def standardised_vectors(rows: Sequence[list[float] | None], columns: Mapping | None) -> dict[str, Tensor]:
    """Return numbers as the network's arguments, (B, n) float32 and which images have them; {} for none at all."""
    if all(row is None for row in rows):
        return {}
    mean, std = (torch.tensor(columns[name], dtype=torch.float64) for name in ("mean", "std"))
    values = torch.tensor([columns["mean"] if row is None else row for row in rows], dtype=torch.float64)
    mask = torch.tensor([row is not None for row in rows])
    return {"vectors": ((values - mean) / std).float(), "vector_mask": mask}


def _rows_in(given, count: int) -> Sequence:
    """Return what is given for each image; numbers in a row are one image's where it has several."""
    given = given.tolist() if isinstance(given, Tensor | np.ndarray | np.generic) else given
    if not isinstance(given, list | tuple):
        return [given]
    is_one = count > 1 and given and all(isinstance(part, Number) for part in given)
    return [given] if is_one else given


def _parts(value) -> list | None:
    """Return the parts of a list, tuple, array or tensor; None for a single value."""
    value = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    return list(value) if isinstance(value, list | tuple) else None


def _checked_row(row: Row, columns: Mapping) -> list[float] | None:
    """Return the numbers of one image. Raises `ValueError` unless they are as many as there should be, and finite."""
    if row is None:
        return None
    parts = _parts(row) or [row]
    if isinstance(row, Mapping):
        if row.keys() != set(columns["names"]):
            raise ValueError(f"vectors of {', '.join(map(str, row)) or 'nothing'}: give {_in_words(columns)}")
        parts = [row[name] for name in columns["names"]]
        for name, size, value in zip(columns["names"], columns["sizes"], parts):
            if (found := len(_parts(value) or [value])) != size:
                raise ValueError(f"vectors have {found} numbers of {name}: give {size}")
    numbers = [number for part in parts for number in (_parts(part) or [part])]
    if len(numbers) != sum(columns["sizes"]):
        raise ValueError(f"vectors of {len(numbers)} numbers: give {sum(columns['sizes'])} ({_in_words(columns)})")
    try:
        values = [float(number) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"vectors {str(row)[:80]}: give finite numbers, or None for an image without")
    return values


def _in_words(columns: Mapping) -> str:
    return ", ".join(f"{n} numbers of {name}" if n > 1 else name for name, n in zip(columns["names"], columns["sizes"]))
