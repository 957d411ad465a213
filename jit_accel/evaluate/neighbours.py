"""Nearest neighbours among features: density and coverage (Naeem et al., 2002.09797)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from jit_accel.base.devices import full_float32

NEIGHBOURHOOD = 5  # neighbours that span an image's neighbourhood, as in the paper
_ROWS_AT_ONCE = 1000


def distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield the distances of points, float32 (n, D), from others (m, D), of some rows at once: (rows, m)."""
    centre = others.mean(0)  # the differences of large numbers would lose digits
    others = others - centre
    with torch.autocast(points.device.type, enabled=False), full_float32():
        for rows in points.split(_ROWS_AT_ONCE):
            yield torch.cdist(rows - centre, others)


@torch.inference_mode()
def density_and_coverage(images: Tensor, real: Tensor, neighbours: int = NEIGHBOURHOOD) -> tuple[float, float]:
    """Return both, of features float32 (n, D) and (m, D), m above `neighbours`.

    Density: the neighbourhoods of real images that a generated one lies in, on average, over `neighbours`; above 1
    where images crowd in the middle. Coverage: the share of real images in whose neighbourhood a generated one lies.
    """
    radii = torch.cat([some.kthvalue(neighbours + 1, 1).values for some in distances(real, real)])  # itself is one
    inside, is_covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for some in distances(images, real):
        lies_in = some < radii
        inside += int(lies_in.sum())
        is_covered |= lies_in.any(0)
    return inside / (neighbours * len(images)), float(is_covered.double().mean())
