"""Columns of numbers beside the images: the values of a row, and mean and standard deviation over all rows."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jit_accel.base.errors import UserError

log = logging.getLogger(__name__)
Tally = dict[str, list]  # {length: [count, means, sums of squared deviations]} of a column's lists of numbers; JSON


@dataclass(frozen=True)
class Vectors:
    """The columns of numbers of a data set, all sizes, means and standard deviations in the order of the names."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # so many numbers has an image in each column
    mean: tuple[float, ...]  # of each number, in the units of the data
    std: tuple[float, ...]

    @classmethod
    def of_record(cls, record: Mapping[str, Sequence] | None) -> "Vectors | None":
        """Return what `record` gave; None for none."""
        return record and cls(**{name: tuple(values) for name, values in record.items()})

    def record(self) -> dict[str, list]:
        """Return them as plain lists, for files."""
        return {name: list(values) for name, values in asdict(self).items()}

    def chosen(self, names: Sequence[str]) -> "Vectors":
        """Return the columns of these names alone, in this order."""
        starts = np.cumsum([0, *self.sizes])
        spans = [slice(*starts[i : i + 2].tolist()) for i in map(self.names.index, names)]
        sizes = tuple(span.stop - span.start for span in spans)
        return Vectors(tuple(names), sizes, *(sum((all[span] for span in spans), ()) for all in (self.mean, self.std)))

    def standardised(self, values: np.ndarray) -> np.ndarray:
        """Return numbers in the units of the data, float64 (B, n), as the network sees them, float32 (B, n)."""
        return ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)

    def restored(self, values: np.ndarray) -> np.ndarray:
        """Return what `standardised` made these of, float64 (B, n)."""
        return values.astype(np.float64) * np.array(self.std) + np.array(self.mean)


def numbers_of(value: Any) -> list[float] | None:
    """Return one value of a column, a number or a list, also as text, as a list of finite numbers; else None."""
    try:
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("[") else value
        numbers = list(map(float, value if isinstance(value, list | tuple | np.ndarray) else [value]))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
    return numbers if numbers and all(map(math.isfinite, numbers)) else None


def vector_of(values: Iterable[tuple[str, Any, int]]) -> list[float]:
    """Return the numbers of a row from (column, value, how many it should have) of each. Raises `ValueError`."""
    vector = []
    for column, value, size in values:
        numbers = numbers_of(value)
        if numbers is None or len(numbers) != size:
            wanted = "a finite number" if size == 1 else f"{size} finite numbers"
            raise ValueError(f"its {column} is {str(value)[:40]!r} and not {wanted}")
        vector += numbers
    return vector


def tally_of(column: pa.ChunkedArray | Iterable) -> Tally:
    """Return how many lists of each length a column has, with mean and squared deviations; a number is a list of one.

    What is no number, or not finite, does not count.
    """
    if isinstance(column, pa.ChunkedArray) and (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        numbers = column.drop_null().to_numpy().astype(np.float64)
        by_length = {1: numbers[np.isfinite(numbers)][:, None]}
    else:
        by_length = {}
        for value in column.to_pylist() if isinstance(column, pa.ChunkedArray) else column:
            if (numbers := numbers_of(value)) is not None:
                by_length.setdefault(len(numbers), []).append(numbers)
    found = {length: np.asarray(rows) for length, rows in by_length.items() if len(rows)}
    return {str(n): [len(rows), rows.mean(0).tolist(), (rows.var(0) * len(rows)).tolist()] for n, rows in found.items()}


def summed(tallies: Iterable[Tally]) -> Tally:
    """Return the tally of all that several are of (Chan et al. 1979)."""
    total: Tally = {}
    for length, (count, mean, squares) in ((length, one) for tally in tallies for length, one in tally.items()):
        n, old_mean, old_squares = total.get(length, (0, [0.0] * len(mean), [0.0] * len(mean)))
        shift = np.subtract(mean, old_mean)
        new_mean = old_mean + shift * (count / (n + count))
        new_squares = np.add(old_squares, squares) + shift**2 * (n * count / (n + count))
        total[length] = [n + count, new_mean.tolist(), new_squares.tolist()]
    return total


def vectors_of_tallies(names: Sequence[str], tallies: Iterable[Sequence[Tally]], where: str) -> Vectors | None:
    """Return the columns of these names, from the tallies of each in each part of a data set; None for no columns.

    A column has as many numbers as most of its rows. UserError for one without any number.
    """
    if not names:
        return None
    sizes, means, deviations = [], [], []
    for name, of_column in zip(names, zip(*tallies)):
        total = summed(of_column)
        if not total:
            rule = f"no row of {where} has a finite number or a list of such there: choose another column."
            raise UserError(rule, about="vector_column", value=name)
        length, (count, mean, squares) = max(total.items(), key=lambda item: item[1][0])
        std = np.sqrt(np.array(squares) / count)
        is_constant = std <= 1e-12 * np.abs(mean)  # but for rounding
        if is_constant.any():
            log.warning("--vector_column %s: it is the same for all images of %s, and says nothing", name, where)
        sizes.append(int(length))
        means += mean
        deviations += np.where(is_constant, 1.0, std).tolist()
    return Vectors(tuple(names), tuple(sizes), tuple(means), tuple(deviations))
