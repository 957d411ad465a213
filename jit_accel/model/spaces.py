"""Time, noise, and the maps between predictions (arXiv 2511.13720): the one place where the time convention is stated.

Time `t` runs from 0 (pure noise) to 1 (clean image). With a clean image `x` in [-1, 1] and noise `e`,

    z = t x + (1 - t) e        the noised image, and
    v = x - e                  the velocity dz/dt.

Of a bridge, e is no noise but the condition, so that the path leads from that to the image.

Given `z` and `t`, each of x, e and v determines the other two by a linear map, so the network may predict
any of them and the squared error may be taken in any of them.
"""

import torch
from torch import Tensor

SPACES = ("x", "e", "v")
PATHS = ("noise", "bridge")

# (from, to): the map, with 1 - t and t bounded below by t_eps where they divide, since 1/(1-t) diverges
# as t -> 1. The paper bounds 1 - t by 0.05; e-prediction needs the same of t.
CONVERSIONS = {
    ("x", "x"): lambda x, z, t, t_eps: x,
    ("x", "e"): lambda x, z, t, t_eps: (z - t * x) / _at_least(1 - t, t_eps),
    ("x", "v"): lambda x, z, t, t_eps: (x - z) / _at_least(1 - t, t_eps),
    ("e", "x"): lambda e, z, t, t_eps: (z - (1 - t) * e) / _at_least(t, t_eps),
    ("e", "e"): lambda e, z, t, t_eps: e,
    ("e", "v"): lambda e, z, t, t_eps: (z - e) / _at_least(t, t_eps),
    ("v", "x"): lambda v, z, t, t_eps: z + (1 - t) * v,
    ("v", "e"): lambda v, z, t, t_eps: z - t * v,
    ("v", "v"): lambda v, z, t, t_eps: v,
}


def _at_least(value: Tensor | float, floor: float) -> Tensor | float:
    return value.clamp_min(floor) if isinstance(value, Tensor) else max(value, floor)


def in_float32(x: Tensor) -> Tensor:
    """Return x in float32 at least: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convert(value: Tensor, z: Tensor, t: Tensor | float, source: str, target: str, t_eps: float = 0.05) -> Tensor:
    """Express a prediction of `source` ("x", "e" or "v") as one of `target`.

    Prediction and noised image z are (B, C, H, W), and the times t in [0, 1] of a shape that broadcasts against them.
    """
    return CONVERSIONS[source, target](value, z, t, t_eps)


def noised(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """Return z = t x + (1 - t) e of clean images x and noise e (B, C, H, W), already scaled, at times t (B,) or ()."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return t * x + (1 - t) * e
