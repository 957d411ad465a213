"""Statistics of images, sums that grow batch by batch and are added up across processes, and the metrics they give."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.processes import gather_rows
from jit_accel.config.presets import Size
from jit_accel.data.batches.order import image_indices
from jit_accel.evaluate.features import (
    FIDELITY_REMEDY,
    LOGITS,
    MAIN,
    SPATIAL,
    FeatureNetwork,
    has_torch_fidelity,
    import_torch_fidelity,
)
from jit_accel.evaluate.moments import Gaussian, Moments, sum_of_processes, zeros
from jit_accel.evaluate.neighbours import NEIGHBOURHOOD, density_and_coverage
from jit_accel.evaluate.settings import ImageMetric, metric_names
from jit_accel.evaluate.uncertainty import GROUPS, jackknife, kernel_distances
from jit_accel.model.card import HIGH, LOW

INCEPTION_SCORE_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # Kynkäänniemi et al., 1904.06991
_SHUFFLE_SEED = 2020  # torch-fidelity's
_DISTANCES_AT_ONCE = 2000  # rows of them: all of 50,000 images would take 30 GB


@dataclass(frozen=True)
class ReferenceFacts:
    """Facts of a reference's images, in their order, as `generate_batches` takes them; None for what is not known."""

    labels: list[int | list[int] | None] | None
    vectors: list[list[float]] | None

    def drawn(self, numbers: list[int], seed: int) -> dict[str, list]:
        """Return the arguments of images by number: those of the reference's images, each in turn, in a shuffled order.

        Which one an image has follows from the seed and its number.
        """
        known = {"labels": self.labels, "vectors": self.vectors}
        count = len(next(values for values in known.values() if values is not None))
        places = image_indices(seed, np.asarray(numbers, np.int64), count).tolist()
        return {name: [values[place] for place in places] for name, values in known.items() if values is not None}


@dataclass
class ImageStatistics:
    """Everything that the metrics need of a set of images, measured or read from a file.

    features, weights_id: of the network. gaussians: by layer. kept: float32 (n, D) on the CPU, the main features of
    some or all images, in the order of their numbers. scores: Inception Scores of the parts, float64. num_images: None
    where a file does not say. label_counts: images of each class, () where they are not known. fingerprint: of the
    data set that was measured. facts: what a model's images are given of its images. moments: by layer, of groups of
    the images, where intervals are wanted; kept_groups: of the kept features, int64 (n,).
    """

    features: str
    weights_id: str
    gaussians: dict[str, Gaussian]
    name: str = ""
    kept: Tensor | None = None
    scores: Tensor | None = None
    num_images: int | None = None
    img_size: Size | None = None
    label_counts: tuple[int, ...] = ()
    fingerprint: str = ""
    facts: ReferenceFacts | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    kept_groups: Tensor | None = None


class InceptionScoreSums:
    """The Inception Score's sums, per split: exp of the mean KL divergence of each image's classes from their mean.

    The images of a split follow from their numbers, as in torch-fidelity, which shuffles and then cuts in ten. sums:
    float64 (splits, 2 + C), of each image 1, sum of p log p, and p.
    """

    def __init__(self, num_images: int, size: int, device: torch.device | str = "cpu"):
        ends = np.arange(1, INCEPTION_SCORE_SPLITS + 1) * num_images // INCEPTION_SCORE_SPLITS
        split_of = np.empty(num_images, np.int64)
        shuffled = np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)
        split_of[shuffled] = np.searchsorted(ends, np.arange(num_images), side="right")
        self.split_of = torch.from_numpy(split_of)
        self.sums = zeros(device, INCEPTION_SCORE_SPLITS, 2 + size)

    def add(self, numbers: Tensor, logits: Tensor) -> None:
        """Add logits (B, C) of the images of these numbers, int64 (B,), below `num_images`."""
        log_p = logits.to(self.sums.device).double().log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], 1)
        self.sums.index_add_(0, self.split_of[numbers].to(self.sums.device), rows)

    def scores(self, accelerator) -> Tensor:
        """Return the score of each split that has images, float64, over all processes."""
        sums = sum_of_processes(self.sums, accelerator)
        sums = sums[sums[:, 0] > 0]
        weights, entropies, mean = sums[:, 0], sums[:, 1], sums[:, 2:] / sums[:, :1]
        return (entropies / weights - torch.special.xlogy(mean, mean).sum(1)).exp()


class Collector:
    """Collects the statistics that metrics need of images whose features come in batches, in any order and process.

    num_images: of all processes together; images of numbers from there on only fill batches up and do not count.
    max_features: of so many images at most the main features are kept, for metrics that compare images one by one.
    groups: of each image by its number, int64 (num_images,), for intervals of distances; None without.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        num_images: int,
        metrics: Iterable[str],
        max_features: int,
        groups: Tensor | None = None,
    ):
        wanted = {metric_names(network.name)[name] for name in metrics}
        shorts, sizes = {metric.short for metric in wanted}, network.sizes
        layers = [MAIN, SPATIAL] if "sfd" in shorts else [MAIN]
        self.network, self.num_images, self.groups = network, num_images, groups
        how = (network.device,) if groups is None else (network.device, GROUPS)
        self.moments = {layer: Moments(sizes[layer], *how) for layer in layers}
        self.scores = InceptionScoreSums(num_images, sizes[LOGITS], network.device) if "is" in shorts else None
        self.is_kept = None
        if any(metric.is_pairwise for metric in wanted):
            self.is_kept = torch.zeros(num_images, dtype=torch.bool)
            shuffled = np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)  # since classes may come in order
            self.is_kept[shuffled[:max_features]] = True
        self.kept = [(torch.empty(0, dtype=torch.int64), torch.empty(0, sizes[MAIN]))]  # numbers and features
        self.labels = [torch.empty(0, dtype=torch.int64)]

    def add(self, numbers: Tensor, layers: dict[str, Tensor], labels: Tensor | None = None) -> None:
        """Add the features of the images of these numbers, int64 (B,) on the CPU, and their labels, int64 (B,)."""
        counted = numbers < self.num_images
        if not counted.all():
            numbers = numbers[counted]
            layers = {name: values[counted.to(values.device)] for name, values in layers.items()}
        for layer, moments in self.moments.items():
            moments.add(layers[layer], None if self.groups is None else self.groups[numbers])
        if self.scores is not None:
            self.scores.add(numbers, layers[LOGITS])
        if self.is_kept is not None:
            chosen = self.is_kept[numbers]
            self.kept.append((numbers[chosen], layers[MAIN][chosen.to(layers[MAIN].device)].float().cpu()))
        if labels is not None:
            self.labels.append(labels.clamp(min=0))

    def finish(self, accelerator, name: str = "", img_size: Size | None = None) -> ImageStatistics:
        """Return the statistics of all processes' images, the same on all."""
        gaussians = {layer: moments.gaussian(accelerator) for layer, moments in self.moments.items()}
        kept = kept_groups = None
        if self.is_kept is not None:
            numbers, kept = (gather_rows(torch.cat(parts), accelerator) for parts in zip(*self.kept))
            numbers, order = numbers.sort()
            kept, kept_groups = kept[order], None if self.groups is None else self.groups[numbers]
        counts = tuple(gather_rows(torch.cat(self.labels), accelerator).bincount().tolist())
        scores = None if self.scores is None else self.scores.scores(accelerator)
        of_network, num_images = (self.network.name, self.network.weights_id), self.moments[MAIN].count
        found = ImageStatistics(*of_network, gaussians, name, kept, scores, num_images, img_size, counts)
        return found if self.groups is None else replace(found, moments=self.moments, kept_groups=kept_groups)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (Heusel et al., 1706.08500), in float64.

    The eigenvalues of C1 C2 are those of the symmetric C2^(1/2) C1 C2^(1/2), which are found in a third of the time and
    cannot come out complex, also where covariances are singular because there are fewer images than features. The root
    of `other` is computed once for many comparisons; the device of `one` computes. NaN where anything is not finite.
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
    """Mean and deviation of the kernel distance (Bińkowski et al., 1801.01401), of 100 pairs of 1,000 images or all."""
    metric = import_torch_fidelity("metric_kid")
    size = min(KID_SUBSET_SIZE, len(images.kept), len(reference.kept))
    how = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size}
    found = metric.kid_features_to_metric(images.kept, reference.kept, **how, verbose=False)
    value, deviation = found[metric.KEY_METRIC_KID_MEAN], found[metric.KEY_METRIC_KID_STD]
    interval = {}
    if images.kept_groups is not None:
        device = images.gaussians[MAIN].mean.device
        sides = (side.kept.to(device) for side in (images, reference))
        of_all, without_each = kernel_distances(*sides, images.kept_groups)
        counts = images.kept_groups.bincount(minlength=GROUPS).tolist()
        of_subsets = deviation**2 / KID_SUBSETS
        interval = jackknife("kd", value, without_each, counts, further_variance=of_subsets, of_all=of_all)
    return {"kd": value, "kd_std": deviation, **interval}


def precision_recall(images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
    """Improved precision and recall with three neighbours (Kynkäänniemi et al., 1904.06991), of 4 images or more."""
    metric = import_torch_fidelity("metric_prc")
    how = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": _DISTANCES_AT_ONCE, "save_cpu_ram": True}
    sides = (side.kept.to(images.gaussians[MAIN].mean.device) for side in (images, reference))
    found = metric.prc_features_to_metric(*sides, verbose=False, **how)
    return {"precision": found[metric.KEY_METRIC_PRECISION], "recall": found[metric.KEY_METRIC_RECALL]}


def density_coverage(images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
    """Density and coverage with five neighbours (Naeem et al., 2002.09797), of 6 images or more."""
    device = images.gaussians[MAIN].mean.device
    found = density_and_coverage(*(side.kept.to(device) for side in (images, reference)))
    return dict(zip(("density", "coverage"), found))


def _frechet(short: str, layer: str) -> Callable:
    def measure(images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
        real = reference.gaussians[layer]
        value = frechet_distance(images.gaussians[layer], real)
        if layer not in images.moments:
            return {short: value}
        moments = images.moments[layer]
        without_each = [frechet_distance(one, real) for one in moments.without_each()]
        return {short: value, **jackknife(short, value, without_each, moments.counts, least=0)}

    return measure


# The function of each metric by its short name; a new one is a row here and one in `METRICS`.
MEASURES: dict[str, Callable[[ImageStatistics, ImageStatistics], dict[str, float]]] = {
    "fd": _frechet("fd", MAIN),
    "sfd": _frechet("sfd", SPATIAL),
    "is": inception_score,
    "kd": kernel_distance,
    "precision": precision_recall,
    "recall": precision_recall,
    "density": density_coverage,
    "coverage": density_coverage,
}


def measured(metrics: tuple[str, ...], images: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
    """Return the metrics of these names.

    Kernel distance and Inception Score also have `..._std`; where `images` has groups, distances `..._low`, `..._high`.
    """
    shorts, values = {name: metric_names(images.features)[name].short for name in metrics}, {}
    for measure in dict.fromkeys(MEASURES[short] for short in shorts.values()):
        values |= measure(images, reference)
    ends = ("", "_std", LOW, HIGH)
    return {name + end: values[short + end] for name, short in shorts.items() for end in ends if short + end in values}


def hindrance(metric: ImageMetric, reference: ImageStatistics, num_images: int) -> str:
    """Return what keeps a metric of so many images from being measured, "" for nothing."""
    fewest = min(num_images, num_images if reference.kept is None else len(reference.kept))
    if metric.short == "sfd" and SPATIAL not in reference.gaussians:
        return "the reference has no spatial statistics (mu_s, sigma_s)"
    if metric.is_pairwise and reference.kept is None:
        return "the reference has mean and covariance alone, no features of single images"
    if MEASURES[metric.short] in (kernel_distance, precision_recall) and not has_torch_fidelity():
        return f"torch-fidelity is not installed: {FIDELITY_REMEDY}"
    neighbours = {precision_recall: NEIGHBOURS, density_coverage: NEIGHBOURHOOD}.get(MEASURES[metric.short], 0)
    if fewest <= neighbours:
        return f"of {fewest} images none has {neighbours} neighbours"
    if metric.short == "is" and num_images < 2 * INCEPTION_SCORE_SPLITS:
        return f"{num_images} images are fewer than two for each of {INCEPTION_SCORE_SPLITS} parts"
    return ""
