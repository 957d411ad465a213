"""Statistics to numbers: Fréchet distances by a formula of our own, pairwise metrics by torch-fidelity's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jit_accel.evaluate.features import MAIN, SPATIAL, has_torch_fidelity, import_torch_fidelity
from jit_accel.evaluate.settings import metric_names
from jit_accel.evaluate.statistics import INCEPTION_SCORE_SPLITS, Gaussian, ImageStatistics

KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3  # Kynkäänniemi et al., 1904.06991
_ROWS_AT_ONCE = 2000


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (Heusel et al., 1706.08500), in float64.

    The eigenvalues of C1 C2 are those of the symmetric C2^(1/2) C1 C2^(1/2), which are found in a third of the time and
    cannot come out complex, also where covariances are singular because there are fewer images than features. The root
    of `other` is computed once for many comparisons; the device of `one` computes.

    Returns:
        NaN where anything is not finite.
    """
    if not all(bool(part.isfinite().all()) for part in (one.mean, one.covariance, other.mean, other.covariance)):
        return math.nan  # of which no eigenvalues can be had
    return float(_frechet_distance(one, other.mean, other.root))


def _frechet_distance(one: Gaussian, other_mean: Tensor, other_root: Tensor) -> Tensor:
    # A reference that was read from a file is on the CPU, whatever the device of the features.
    other_mean, other_root = other_mean.to(one.mean.device), other_root.to(one.mean.device)
    inner = other_root @ one.covariance @ other_root
    values = torch.linalg.eigvalsh((inner + inner.T) / 2)
    # The square roots of zeros that rounding made 1e-16 would add up over a thousand dimensions.
    values = values.where(values > len(values) * torch.finfo(values.dtype).eps * values[-1], 0)
    difference = one.mean - other_mean
    traces = one.covariance.trace() + other_root.square().sum()
    distance = difference @ difference + traces - 2 * values.sqrt().sum()
    return distance.clamp(min=0)  # NaN stays


def inception_score(images: ImageStatistics, _) -> dict[str, float]:
    """Mean and standard deviation over the splits (Salimans et al., 1606.03498)."""
    return {"is": float(images.scores.mean()), "is_std": float(images.scores.std(correction=0))}


def kernel_distance(images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
    """Mean and standard deviation of the kernel distance (Bińkowski et al., 1801.01401) over 100 pairs of subsets.

    Each subset takes 1,000 images, or all of the fewer.
    """
    metric = import_torch_fidelity("metric_kid")
    size = min(KID_SUBSET_SIZE, len(images.kept), len(reference.kept))
    found = metric.kid_features_to_metric(images.kept, reference.kept, kid_subset_size=size, verbose=False)
    return {"kd": found[metric.KEY_METRIC_KID_MEAN], "kd_std": found[metric.KEY_METRIC_KID_STD]}


def precision_recall(images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
    """Improved precision and recall with three neighbours (Kynkäänniemi et al., 1904.06991), of 4 images or more."""
    metric = import_torch_fidelity("metric_prc")
    # all distances of 50,000 images at once would take 30 GB
    how = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": _ROWS_AT_ONCE, "save_cpu_ram": True}
    sides = (side.kept.to(images.gaussians[MAIN].mean.device) for side in (images, reference))
    found = metric.prc_features_to_metric(*sides, verbose=False, **how)
    return {"precision": found[metric.KEY_METRIC_PRECISION], "recall": found[metric.KEY_METRIC_RECALL]}


def _frechet(short: str, layer: str) -> Callable:
    return lambda images, reference: {short: frechet_distance(images.gaussians[layer], reference.gaussians[layer])}


# The function of each metric by its short name; a new one is a row here and one in `METRICS`.
MEASURES: dict[str, Callable[[ImageStatistics, ImageStatistics], dict[str, float]]] = {
    "fd": _frechet("fd", MAIN),
    "sfd": _frechet("sfd", SPATIAL),
    "is": inception_score,
    "kd": kernel_distance,
    "precision": precision_recall,
    "recall": precision_recall,
}


def measured(metrics: tuple[str, ...], images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
    """Return the metrics of these names; kernel distance and Inception Score also have `..._std`."""
    table, by_short, found = metric_names(images.features), {}, {}
    for name in metrics:
        short = table[name].short
        if short not in by_short:
            by_short |= MEASURES[short](images, reference)
        found |= {f"{name}{end}": by_short[f"{short}{end}"] for end in ("", "_std") if f"{short}{end}" in by_short}
    return found


def hindrances(metrics: tuple[str, ...], reference: ImageStatistics, num_images: int) -> dict[str, list[str]]:
    """Return the metrics by what keeps them from being measured: "" for those that can be."""
    fewest = min(num_images, num_images if reference.kept is None else len(reference.kept))
    reasons: dict[str, list[str]] = {}
    for name in metrics:
        metric, reason = metric_names(reference.features)[name], ""
        if metric.short == "sfd" and SPATIAL not in reference.gaussians:
            reason = "the reference has no spatial statistics (mu_s, sigma_s)"
        elif metric.is_pairwise and reference.kept is None:
            reason = "the reference has mean and covariance alone, no features of single images"
        elif metric.is_pairwise and not has_torch_fidelity():
            reason = "torch-fidelity is not installed: pip install 'jit_accel[eval]'"
        elif metric.short in ("precision", "recall") and fewest <= NEIGHBOURS:
            reason = f"of {fewest} images none has {NEIGHBOURS} neighbours"
        elif metric.short == "is" and num_images < 2 * INCEPTION_SCORE_SPLITS:
            reason = f"{num_images} images are fewer than two for each of {INCEPTION_SCORE_SPLITS} parts"
        reasons.setdefault(reason, []).append(name)
    return reasons
