"""Losses of more than one predicted image: of the others in its micro-batch, of the network's tokens.

A row of `BATCH_LOSSES` each.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jit_accel.base import rng
from jit_accel.model.spaces import convert


@dataclass(frozen=True)
class Seen:
    """A micro-batch as its losses see it."""

    predicted: Tensor  # float32 (B, C, H, W), in the space `prediction`
    prediction: str
    z: Tensor  # (B, C, H, W), what the network was given
    t: Tensor  # (B,)
    t_eps: float
    truth: Tensor  # clean images (B, C, H, W) in [-1, 1]
    labels: Tensor | None = None  # (B,) or (B, k), of the images, none of them dropped
    positions: object = None  # (B,) integers: the images' numbers in the run
    seed: int = 0
    tokens: tuple[Tensor, ...] = ()  # (B, N, D) after an early block and a later one


def contrastive(seen: Seen) -> Tensor:
    """Return minus the squared error of the predicted velocity against that of another image (2506.05350)."""
    times = seen.t.view(-1, 1, 1, 1)
    found = convert(seen.predicted, seen.z, times, seen.prediction, "v", seen.t_eps)
    velocities = convert(seen.truth, seen.z, times, "x", "v", seen.t_eps)
    others = negatives(seen.labels, seen.positions, seen.seed)
    is_another = others != torch.arange(len(others), device=others.device)
    return -(found - velocities[others]).square().mean(dim=(1, 2, 3)) * is_another


def negatives(labels: Tensor, positions, seed: int) -> Tensor:
    """Return the place in the micro-batch of another image for each, (B,): of another class, where there is one.

    It follows from seed, positions and labels (B,) or (B, k): the images stand in a circle shuffled by their positions,
    and each takes the next one that suits.
    """
    count = len(labels)
    places = rng.hash64(seed, "negative", positions).argsort().argsort()
    ahead = torch.from_numpy((places - places[:, None] - 1) % count).to(labels.device, non_blocking=True)
    rows = labels.reshape(count, -1)
    is_same_class = (rows[:, None] == rows).all(-1)
    is_itself = torch.eye(count, dtype=torch.bool, device=labels.device)
    return (ahead + count * is_same_class + count * is_itself).argmin(1)


def layersync(seen: Seen) -> Tensor:
    """Return 1 - the mean cosine of early tokens with later ones, which get no gradient (LayerSync, 2510.12581)."""
    early, late = seen.tokens
    return 1 - F.cosine_similarity(early, late.detach(), dim=-1).mean(1)


def synced_blocks(depth: int) -> tuple[int, int]:
    """Return the numbers, from 0, of the two blocks of so many: the 8th and 16th of 28, as LayerSync's of SiT-XL."""
    early = max(1, depth * 2 // 7)
    return early - 1, max(early + 1, depth * 4 // 7) - 1


# Each returns (B,).
CONTRASTIVE, LAYERSYNC = "contrastive", "layersync"
BATCH_LOSSES = {CONTRASTIVE: contrastive, LAYERSYNC: layersync}
