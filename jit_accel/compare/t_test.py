"""The paired t test, and Holm's correction where there are several of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

LEAST_SEEDS = 3  # two differences give an interval of 12.7 standard errors each way, which says nothing
LEVEL = 0.95


class PairedTest(NamedTuple):
    """The mean of paired differences; its interval at `LEVEL` and the two-sided p-value, None of too few."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test whether these differences, one or more, have the mean 0 (Student, 1908)."""
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count < LEAST_SEEDS:
        return PairedTest(mean)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    if error == 0:  # all are alike
        return PairedTest(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    reach = t_quantile(count - 1) * error
    return PairedTest(mean, mean - reach, mean + reach, two_sided_p(mean / error, count - 1))


def two_sided_p(t: float, degrees: int) -> float:
    """Return P(|T| >= |t|) of Student's t with so many degrees of freedom, by its finite sum.

    Abramowitz and Stegun, 26.7.3 and 26.7.4; exact up to 1e-15.
    """
    angle = math.atan(abs(t) / math.sqrt(degrees))
    cos_squared = math.cos(angle) ** 2
    is_odd = degrees % 2
    term, total = (math.cos(angle) if is_odd else 1.0), 0.0
    for step in range(1, degrees // 2 + 1):
        total += term
        term *= cos_squared * (2 * step / (2 * step + 1) if is_odd else (2 * step - 1) / (2 * step))
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1 - inside))


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """Return the t with P(|T| < t) = `level`."""
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees) > 1 - level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - level else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for being several (Holm, 1979), in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
