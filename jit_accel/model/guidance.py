"""Classifier-free guidance: how much of it at which t, and settings of sampling that make sense."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jit_accel.model.scheduler import checked_method


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


def checked_interval(interval: Sequence[float]) -> list[float]:
    """Return where guidance acts, [low, high] in t. Raises `ValueError`."""
    try:
        low, high = map(float, () if isinstance(interval, str) else interval)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"guidance_interval {interval} must be (low, high) with 0 <= low <= high <= 1, such as (0.1, 1.0)"
        )
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


def _as(kind: Callable, value):
    """Return `kind(value)`, or NaN where this is no number of that kind; a bool is none."""
    try:
        return math.nan if isinstance(value, bool) else kind(value)
    except (TypeError, ValueError):
        return math.nan


# The settings of sampling that a pipeline keeps: how each is checked, and what it is where the pipeline does not say.
DEFAULTS: dict[str, tuple[Callable, Any]] = {
    "guidance_scale": (checked_scale, 1.0),
    "guidance_interval": (checked_interval, [0.1, 1.0]),
    "num_inference_steps": (lambda steps: checked_count("num_inference_steps", steps), None),
    "method": (checked_method, None),
}


def checked_default(name: str, value):
    """Return a setting as a pipeline keeps it; None is as if it had never been given. Raises `ValueError`."""
    check, otherwise = DEFAULTS[name]
    return otherwise if value is None else check(value)
