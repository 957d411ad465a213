"""The solvers of the sampler's ODE, dz/dt = v, one row each, and the steps of those that remember the call before.

z = t x + (1 - t) e, so v = (x - z) / max(1 - t, t_eps) where a network predicts x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Before = tuple[float, Tensor] | None  # t of the call before, and its velocity, or its prediction of x


@dataclass(frozen=True)
class Solver:
    """A row of `SOLVERS`: how a step is made of the network's outputs, which are converted to `space` first."""

    calls: int  # of the network, a step
    order: int  # of convergence
    space: str = "v"
    # (z, output, t, t of the step's end, the call before): z at the end. None for those without a history
    advance: Callable[[Tensor, Tensor, float, float, Before], Tensor] | None = None


def adams_bashforth(z: Tensor, v: Tensor, t: float, end: float, before: Before) -> Tensor:
    """Return z at `end`, with the velocity extrapolated linearly from the last two calls (Adams-Bashforth 2)."""
    if before is not None:
        t_before, v_before = before
        v = v + (v - v_before) * ((end - t) / (2 * (t - t_before)))
    return z + (end - t) * v


def exponential(z: Tensor, x: Tensor, t: float, end: float, before: Before) -> Tensor:
    """Return z at `end`, exactly if x changes linearly in t as in the last two calls (ETD2, Cox and Matthews 2002).

    It divides by no 1 - t, so nothing is clamped, and t = 1 is x itself. A velocity that is clamped leaves noise there:
    of many small steps the share exp(-1) t_eps.
    """
    left = (1 - end) / (1 - t)
    moved = left * z + (1 - left) * x
    if before is None:
        return moved
    t_before, x_before = before
    drift = end - t + ((1 - end) * math.log(left) if left > 0 else 0.0)
    return moved + (x - x_before) * (drift / (t - t_before))


SOLVERS = {
    "heun": Solver(calls=2, order=2),
    "euler": Solver(calls=1, order=1),
    "ab2": Solver(calls=1, order=2, advance=adams_bashforth),
    "etd2": Solver(calls=1, order=2, space="x", advance=exponential),
}
