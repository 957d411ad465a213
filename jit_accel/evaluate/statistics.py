"""What is kept of a set of images: sums that are updated batch by batch and added up across processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jit_accel.base import rng
from jit_accel.base.processes import gather_rows
from jit_accel.evaluate.features import LOGITS, MAIN, SPATIAL, FeatureNetwork, Layers

INCEPTION_SCORE_SPLITS = 10
_SHUFFLE_SEED = 2020  # torch-fidelity's
_ROWS_AT_ONCE = 256  # a product of few rows costs as much to store as to compute


class Moments:
    """Mean and covariance of features, by sums in float64.

    count: int. total: float64 (D,). products: float64 (D, D), the sum of x x^T.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        device = float64_device(device)
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Add features (B, D)."""
        self._waiting.append(features.to(self.total.device))
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Bring the sums up to date."""
        if self._waiting:
            rows = torch.cat(self._waiting).double()
            self._waiting = []
            self.count += len(rows)
            self.total += rows.sum(0)
            self.products.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """float64 (D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), unbiased."""
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


class InceptionScoreSums:
    """The Inception Score's sums, per split: exp of the mean KL divergence of each image's classes from their mean.

    Which images make a split follows from their numbers, as in torch-fidelity, which shuffles and then cuts in ten.

    weights: float64 (splits,), the images of each. classes: float64 (splits, C), sums of p. entropies: float64
    (splits,), sums of p log p.
    """

    def __init__(self, num_images: int | None, size: int, device: torch.device | str = "cpu"):
        device, splits = float64_device(device), INCEPTION_SCORE_SPLITS
        self._split_of = None if num_images is None else _splits(num_images)
        self.weights = torch.zeros(splits, dtype=torch.float64, device=device)
        self.classes = torch.zeros(splits, size, dtype=torch.float64, device=device)
        self.entropies = torch.zeros(splits, dtype=torch.float64, device=device)

    def add(self, numbers: Tensor, logits: Tensor) -> None:
        """Add logits (B, C) of the images of these numbers, int64 (B,), below `num_images`."""
        splits = numbers % INCEPTION_SCORE_SPLITS if self._split_of is None else self._split_of[numbers]
        splits = splits.to(self.weights.device)
        log_p = logits.to(self.weights.device).double().log_softmax(1)
        p = log_p.exp()
        self.weights.index_add_(0, splits, torch.ones_like(p[:, 0]))
        self.classes.index_add_(0, splits, p)
        self.entropies.index_add_(0, splits, (p * log_p).sum(1))

    def scores(self) -> Tensor:
        """Of each split that has images, float64."""
        has_any = self.weights > 0
        weights = self.weights[has_any]
        mean = self.classes[has_any] / weights[:, None]
        mean_log = torch.special.xlogy(mean, mean).sum(1)
        return (self.entropies[has_any] / weights - mean_log).exp()


def _splits(num_images: int) -> Tensor:
    """The split of each image, int64 (num_images,)."""
    order = np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)
    ends = np.arange(1, INCEPTION_SCORE_SPLITS + 1) * num_images // INCEPTION_SCORE_SPLITS
    split_of = np.empty(num_images, np.int64)
    split_of[order] = np.searchsorted(ends, np.arange(num_images), side="right")
    return torch.from_numpy(split_of)


@dataclass
class ImageStatistics:
    """Everything that the metrics need of a set of images.

    features, weights_id: of the network. moments: by layer. scores: of Inception, where wanted. kept: float32 (n, D) on
    the CPU, the main features of some or all images, in the order of their numbers; None where they were not wanted.
    img_size: pixels. label_counts: images of each class, () where they are not known. bad_images: that could not be
    read and are left out.
    """

    features: str
    weights_id: str
    moments: dict[str, Moments]
    scores: InceptionScoreSums | None = None
    kept: Tensor | None = None
    img_size: int | None = None
    label_counts: tuple[int, ...] = ()
    bad_images: int = 0

    @property
    def num_images(self) -> int:
        return self.moments[MAIN].count


class Collector:
    """Collects this process's share of images, and then adds up the shares of all.

    Args:
        num_images: of all processes, None where it is not known; images of higher numbers only fill batches up, and are
            not counted.
        max_features: of so many images, drawn at random, the features are kept.
        wants_scores: whether to keep the Inception Score's sums.
        with_spatial: whether to keep those of sFID.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        num_images: int | None,
        *,
        max_features: int = 0,
        wants_scores: bool = False,
        with_spatial: bool = True,
    ):
        self.network, self.num_images, self.max_features = network, num_images, max_features
        layers = [layer for layer in (MAIN, SPATIAL) if layer in network.sizes and (layer == MAIN or with_spatial)]
        self.moments = {layer: Moments(network.sizes[layer], network.device) for layer in layers}
        self.scores = InceptionScoreSums(num_images, network.sizes[LOGITS], network.device) if wants_scores else None
        self._is_kept = kept_images(num_images, max_features)
        self._numbers: list[Tensor] = []
        self._kept: list[Tensor] = []
        self.labels = np.zeros(0, np.int64)
        self.bad_images: list[str] = []

    def add(self, numbers: Tensor, layers: Layers, labels: np.ndarray | None = None) -> None:
        """Add the features of the images of these numbers, int64 (B,) on the CPU."""
        if self.num_images is not None and len(numbers) and int(numbers.max()) >= self.num_images:
            counted = numbers < self.num_images
            numbers = numbers[counted]
            layers = {name: values[counted.to(values.device)] for name, values in layers.items()}
        for layer, moments in self.moments.items():
            moments.add(layers[layer])
        if self.scores is not None:
            self.scores.add(numbers, layers[LOGITS])
        if self.max_features:
            chosen = self._may_be_kept(numbers)
            self._numbers.append(numbers[chosen])
            self._kept.append(layers[MAIN][chosen.to(layers[MAIN].device)].float().cpu())
        if labels is not None and len(labels):
            counts = np.bincount(np.maximum(labels, 0), minlength=len(self.labels))
            counts[: len(self.labels)] += self.labels
            self.labels = counts

    def finish(self, accelerator, img_size: int | None = None) -> ImageStatistics:
        """The statistics of all processes' images, the same on all."""
        for moments in self.moments.values():
            moments.flush()
            moments.count = int(_sum(torch.tensor(moments.count, dtype=torch.float64), accelerator))
            moments.total, moments.products = _sum(moments.total, accelerator), _sum(moments.products, accelerator)
        if self.scores is not None:
            for name in ("weights", "classes", "entropies"):
                setattr(self.scores, name, _sum(getattr(self.scores, name), accelerator))
        kept = self._gather_kept(accelerator) if self.max_features else None
        size = int(gather_rows(torch.tensor([len(self.labels)]), accelerator).max())
        labels = torch.zeros(size, dtype=torch.float64)
        labels[: len(self.labels)] = torch.from_numpy(self.labels)
        bad_images = _sum(torch.tensor(len(self.bad_images), dtype=torch.float64), accelerator)
        return ImageStatistics(
            self.network.name,
            self.network.weights_id,
            self.moments,
            self.scores,
            kept,
            img_size,
            tuple(map(int, _sum(labels, accelerator).tolist())),
            int(bad_images),
        )

    def _may_be_kept(self, numbers: Tensor) -> Tensor:
        """Which of these images' features to keep for now, bool (B,)."""
        if self._is_kept is not None:
            return self._is_kept[numbers]
        if sum(map(len, self._numbers)) >= 2 * self.max_features:
            kept_numbers, kept = torch.cat(self._numbers), torch.cat(self._kept)
            places = lowest_keys(kept_numbers, self.max_features)
            self._numbers, self._kept = [kept_numbers[places]], [kept[places]]
        return torch.ones(len(numbers), dtype=torch.bool)

    def _gather_kept(self, accelerator) -> Tensor:
        size = self.network.sizes[MAIN]
        numbers = gather_rows(torch.cat([*self._numbers, torch.empty(0, dtype=torch.int64)]), accelerator)
        kept = gather_rows(torch.cat([*self._kept, torch.empty(0, size)]), accelerator)
        if self._is_kept is None:
            places = lowest_keys(numbers, self.max_features)
            numbers, kept = numbers[places], kept[places]
        return kept[numbers.argsort()[: self.max_features]]


def lowest_keys(numbers: Tensor, count: int) -> Tensor:
    """The places of `count` random ones of these numbers, int64; who draws need not know how many there will be."""
    keys = rng.hash64(_SHUFFLE_SEED, "kept", numbers.numpy())
    return torch.from_numpy(np.argsort(keys, kind="stable")[:count])


def kept_images(num_images: int | None, max_features: int) -> Tensor | None:
    """Which images' features are kept, bool (num_images,): all, or random ones, since classes may come in order."""
    if num_images is None:
        return None
    chosen = torch.zeros(num_images, dtype=torch.bool)
    chosen[np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)[:max_features]] = True
    return chosen


def float64_device(device: torch.device | str) -> torch.device:
    """Where float64 sums are kept: Apple's GPUs have none."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def _sum(values: Tensor, accelerator) -> Tensor:
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum").to(values.device)
