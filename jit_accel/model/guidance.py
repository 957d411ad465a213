"""Classifier-free guidance: how much of it at which t, and settings of sampling that make sense."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np


def guidance_weight(t: float, guidance_scale: float, interval: Sequence[float]) -> float:
    """Return `guidance_scale` where lo < t < hi (or lo = 0 and t < hi), else 1 (arXiv 2404.07724).

    Raises:
        ValueError: the interval is not (lo, hi) with 0 <= lo <= hi <= 1.
    """
    # t is on a float32 grid: 0.1 there is above 0.1 in float64.
    low, high = (float(np.float32(end)) for end in checked_interval(interval))
    return guidance_scale if t < high and (low == 0 or t > low) else 1.0


def is_number(value) -> bool:
    """Return whether this is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def checked_interval(interval: Sequence[float]) -> tuple[float, float]:
    """Return where guidance acts, (low, high) in t. Raises `ValueError`."""
    try:
        low, high = (math.nan, math.nan) if isinstance(interval, str) else (float(end) for end in interval)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"guidance_interval {interval} must be (low, high) with 0 <= low <= high <= 1, such as (0.1, 1.0)"
        )
    return low, high


def checked_scale(scale: float) -> float:
    """Return the weight of guidance as a float. Raises `ValueError`."""
    try:
        value = math.nan if isinstance(scale, bool) else float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"guidance_scale {scale} must be a number, such as 2.0; 1 is no guidance")
    return value


def checked_count(name: str, count: int) -> int:
    """Return a whole number from 1 on. Raises `ValueError`."""
    try:
        value = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        value = 0
    if value < 1:
        raise ValueError(f"{name} {count} must be a whole number and at least 1")
    return value
