"""Intervals of distances between sets of images, for the noise of drawing the images."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.devices import full_float32
from jit_accel.model.card import HIGH, LOW

GROUPS = 10  # sums of each take 32 MiB for 2,048 features
T_QUANTILE = 2.262  # of 97.5 %, for the 9 degrees of freedom that ten groups leave
LEAST_IMAGES = 2 * GROUPS
_SHUFFLE_SEED = 2020  # as for the images whose features are kept, which are then as many of each group
_ROWS_AT_ONCE = 1000


def groups_of(num_images: int, classes_in_turn: int | None = None) -> Tensor | None:
    """Return the group of each image by its number, int64 (n,), groups of about equal size; None of too few images.

    Images whose classes come in turn, so many of them, are grouped by rounds of these: then each group has all classes,
    as another draw would; of fewer rounds than groups, classes far from each other, others in each round. Images of
    unknown classes are shuffled, since these may come in order.
    """
    if num_images < LEAST_IMAGES:
        return None
    if classes_in_turn:
        numbers = torch.arange(num_images)
        rounds = numbers // classes_in_turn
        return (rounds if num_images >= GROUPS * classes_in_turn else numbers % classes_in_turn + rounds) % GROUPS
    group_of = np.empty(num_images, np.int64)
    group_of[np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)] = np.arange(num_images) % GROUPS
    return torch.from_numpy(group_of)


def jackknife(
    name: str,
    value: float,
    without_each: Sequence[float],
    counts: Sequence[int],
    *,
    further_variance: float = 0.0,
    least: float = -math.inf,
    of_all: float | None = None,
) -> dict[str, float]:
    """Return the ends of a value's 95 % interval, by the delete-m_j jackknife (Busing et al. 1999).

    without_each: the value without each of the groups in turn, of so many images; or another one that varies as it
    does, which is `of_all` without none. {} of what is not finite. Of N images it is an interval of the value's mean
    over other draws of N images: the bias of N images is in all of them.
    """
    whole = value if of_all is None else of_all
    if 0 in counts or not all(map(math.isfinite, (value, *without_each))):
        return {}
    shares = [count / sum(counts) for count in counts]
    mean = len(counts) * whole - math.fsum((1 - share) * one for share, one in zip(shares, without_each))
    pseudo_values = [(whole - (1 - share) * one) / share for share, one in zip(shares, without_each)]
    squares = [(one - mean) ** 2 * share / (1 - share) for share, one in zip(shares, pseudo_values)]
    half = T_QUANTILE * math.sqrt(math.fsum(squares) / len(counts) + further_variance)
    return {name + LOW: max(least, value - half), name + HIGH: value + half}


@torch.inference_mode()
def kernel_distances(features: Tensor, real: Tensor, groups: Tensor) -> tuple[float, list[float]]:
    """Return KID's unbiased estimate, but for the constant that the real features add, and without each group in turn.

    features: float32 (n, D), of these groups, (n,). real: (m, D). The kernel is (x y / D + 1)^3 (1801.01401).
    """
    members = torch.nn.functional.one_hot(groups, GROUPS).double().to(features.device)
    within, across = torch.zeros(2, GROUPS, GROUPS, dtype=torch.float64, device=features.device)
    with torch.autocast(features.device.type, enabled=False), full_float32():
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = features[start : start + _ROWS_AT_ONCE]
            own = members[start : start + _ROWS_AT_ONCE]
            kernel = _kernel(rows, features)
            kernel[:, start:].fill_diagonal_(0)
            within += own.T @ (kernel @ members)
            across += own.T @ _kernel(rows, real).mean(1, keepdim=True)
    counts = members.sum(0)
    left = counts.sum() - counts
    pairs = within.sum() - within.sum(0) - within.sum(1) + within.diagonal()
    distances = pairs / (left * (left - 1)) - 2 * (across[:, 0].sum() - across[:, 0]) / left
    whole = within.sum() / (len(features) * (len(features) - 1)) - 2 * across[:, 0].sum() / len(features)
    return whole.item(), distances.tolist()


def _kernel(rows: Tensor, others: Tensor) -> Tensor:
    return ((rows @ others.T).double() / rows.shape[1] + 1) ** 3
