"""Statistics to numbers: Fréchet distances by a formula of our own, all else by torch-fidelity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_accel.evaluate.libraries import import_torch_fidelity
from jit_accel.evaluate.statistics import InceptionScoreSums

KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3  # Kynkäänniemi et al., 1904.06991
_ROWS_AT_ONCE = 2000


def covariance_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance, float64 (D, D); what rounding made negative counts as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_root: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (Heusel et al., 1706.08500), in float64.

    The eigenvalues of C1 C2 are those of the symmetric C2^(1/2) C1 C2^(1/2), which are found in a third of the time and
    cannot come out complex, also where covariances are singular because there are fewer images than features.

    Args:
        mean, covariance: the first Gaussian's, on the device that computes.
        other_root: the second Gaussian's `covariance_root`, which is computed once for many comparisons.

    Returns:
        NaN where anything is not finite.
    """
    if not all(bool(part.isfinite().all()) for part in (mean, covariance, other_mean, other_root)):
        return math.nan  # of which no eigenvalues can be had
    return float(_frechet_distance(mean, covariance, other_mean, other_root))


def _frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_root: Tensor) -> Tensor:
    # A reference that was read from a file is on the CPU, whatever the device of the features.
    other_mean, other_root = other_mean.to(mean.device), other_root.to(mean.device)
    inner = other_root @ covariance @ other_root
    values = torch.linalg.eigvalsh((inner + inner.T) / 2)
    # The square roots of zeros that rounding made 1e-16 would add up over a thousand dimensions.
    values = values.where(values > len(values) * torch.finfo(values.dtype).eps * values[-1], 0)
    difference = mean - other_mean
    distance = difference @ difference + covariance.trace() + other_root.square().sum() - 2 * values.sqrt().sum()
    return distance.clamp(min=0)  # NaN stays


def inception_score(sums: InceptionScoreSums) -> tuple[float, float]:
    """Mean and standard deviation over the splits (Salimans et al., 1606.03498)."""
    scores = sums.scores()
    return float(scores.mean()), float(scores.std(correction=0))


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance (Bińkowski et al., 1801.01401) over 100 pairs of subsets.

    Args:
        generated, real: features, float32 (n, D), of which each subset takes 1,000, or all of the fewer.
    """
    metric = import_torch_fidelity("metric_kid")
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    found = metric.kid_features_to_metric(generated, real, kid_subset_size=size, verbose=False)
    return found[metric.KEY_METRIC_KID_MEAN], found[metric.KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall with three neighbours (Kynkäänniemi et al., 1904.06991).

    Args:
        generated, real: features, float32 (n, D), n at least 4.
    """
    metric = import_torch_fidelity("metric_prc")
    # all distances of 50,000 images at once would take 30 GB
    how = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": _ROWS_AT_ONCE, "save_cpu_ram": True}
    found = metric.prc_features_to_metric(generated, real, verbose=False, **how)
    return found[metric.KEY_METRIC_PRECISION], found[metric.KEY_METRIC_RECALL]
