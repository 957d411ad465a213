"""Statistics of images: sums that grow batch by batch and are added up across processes, or a file."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.base.processes import gather_rows
from jit_accel.evaluate.features import LOGITS, MAIN, SPATIAL, FeatureNetwork, Layers
from jit_accel.evaluate.image_sets import BROKEN, find_array, reason_of
from jit_accel.evaluate.settings import INCEPTION, metric_names

INCEPTION_SCORE_SPLITS = 10
_SHUFFLE_SEED = 2020  # torch-fidelity's
_ROWS_AT_ONCE = 256  # a product of few rows costs as much to store as to compute
MAKER = "jit_accel"
LEAST_FEATURES = 2  # a kernel distance compares different images
# Names in the .npz of means and covariances, as ADM's evaluator and torch-fidelity's users have them
NAMES = {MAIN: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
ABOUT = ("features", "weights_id", "num_images", "img_size", "label_counts")


@dataclass
class Gaussian:
    """mean: float64 (D,). covariance: float64 (D, D)."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance; eigenvalues that rounding made negative count as zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass
class ImageStatistics:
    """Everything that the metrics need of a set of images, measured or read from a file.

    features, weights_id: of the network. gaussians: by layer. kept: float32 (n, D) on the CPU, the main features of
    some or all images, in the order of their numbers. scores: Inception Scores of the parts, float64. num_images: None
    where a file does not say. label_counts: images of each class, () where they are not known. bad_images: that could
    not be read. fingerprint: of the data set that was measured.
    """

    features: str
    weights_id: str
    gaussians: dict[str, Gaussian]
    name: str = ""
    kept: Tensor | None = None
    scores: Tensor | None = None
    num_images: int | None = None
    img_size: int | None = None
    label_counts: tuple[int, ...] = ()
    bad_images: int = 0
    fingerprint: str = ""


class Moments:
    """Sums in float64 for mean and covariance: total (D,), products (D, D) of x x^T."""

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.count, self.total, self.products = 0, _zeros(device, size), _zeros(device, size, size)
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Add features (B, D)."""
        self._waiting.append(features.to(self.total.device))
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting).double()
            self._waiting = []
            self.count += len(rows)
            self.total += rows.sum(0)
            self.products.addmm_(rows.T, rows)

    def gaussian(self, accelerator=None) -> Gaussian:
        """Return mean and unbiased covariance, of all processes' features where there is an accelerator."""
        self._flush()
        self.count = int(_sum(torch.tensor(self.count, dtype=torch.float64), accelerator))
        self.total, self.products = _sum(self.total, accelerator), _sum(self.products, accelerator)
        mean = self.total / self.count
        return Gaussian(mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1))


class InceptionScoreSums:
    """The Inception Score's sums, per split: exp of the mean KL divergence of each image's classes from their mean.

    The images of a split follow from their numbers, as in torch-fidelity, which shuffles and then cuts in ten.

    sums: float64 (splits, 2 + C), of each image 1, sum of p log p, and p.
    """

    def __init__(self, num_images: int, size: int, device: torch.device | str = "cpu"):
        ends = np.arange(1, INCEPTION_SCORE_SPLITS + 1) * num_images // INCEPTION_SCORE_SPLITS
        split_of = np.empty(num_images, np.int64)
        split_of[_shuffled(num_images)] = np.searchsorted(ends, np.arange(num_images), side="right")
        self.split_of = torch.from_numpy(split_of)
        self.sums = _zeros(device, INCEPTION_SCORE_SPLITS, 2 + size)

    def add(self, numbers: Tensor, logits: Tensor) -> None:
        """Add logits (B, C) of the images of these numbers, int64 (B,), below `num_images`."""
        log_p = logits.to(self.sums.device).double().log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], 1)
        self.sums.index_add_(0, self.split_of[numbers].to(self.sums.device), rows)

    def scores(self, accelerator) -> Tensor:
        """Return the score of each split that has images, float64, over all processes."""
        sums = _sum(self.sums, accelerator)
        sums = sums[sums[:, 0] > 0]
        weights, entropies, mean = sums[:, 0], sums[:, 1], sums[:, 2:] / sums[:, :1]
        return (entropies / weights - torch.special.xlogy(mean, mean).sum(1)).exp()


class Collector:
    """Collects the statistics that metrics need of images whose features come in batches, in any order and process.

    num_images: of all processes together; images of numbers from there on only fill batches up and do not count.
    max_features: of so many images at most the main features are kept, for metrics that compare images one by one.
    """

    def __init__(self, network: FeatureNetwork, num_images: int, metrics: Iterable[str], max_features: int):
        wanted = {metric_names(network.name)[name] for name in metrics}
        shorts, sizes = {metric.short for metric in wanted}, network.sizes
        layers = [MAIN, SPATIAL] if "sfd" in shorts else [MAIN]
        self.network, self.num_images = network, num_images
        self.moments = {layer: Moments(sizes[layer], network.device) for layer in layers}
        self.scores = InceptionScoreSums(num_images, sizes[LOGITS], network.device) if "is" in shorts else None
        self.is_kept = None
        if any(metric.is_pairwise for metric in wanted):
            self.is_kept = torch.zeros(num_images, dtype=torch.bool)
            self.is_kept[_shuffled(num_images)[:max_features]] = True  # random ones, since classes may come in order
        self.kept = [(torch.empty(0, dtype=torch.int64), torch.empty(0, sizes[MAIN]))]  # numbers and features
        self.labels = torch.zeros(0, dtype=torch.float64)
        self.bad_images: list[str] = []

    def add(self, numbers: Tensor, layers: Layers, labels: np.ndarray | None = None) -> None:
        """Add the features of the images of these numbers, int64 (B,) on the CPU."""
        counted = numbers < self.num_images
        if not counted.all():
            numbers = numbers[counted]
            layers = {name: values[counted.to(values.device)] for name, values in layers.items()}
        for layer, moments in self.moments.items():
            moments.add(layers[layer])
        if self.scores is not None:
            self.scores.add(numbers, layers[LOGITS])
        if self.is_kept is not None:
            chosen = self.is_kept[numbers]
            self.kept.append((numbers[chosen], layers[MAIN][chosen.to(layers[MAIN].device)].float().cpu()))
        if labels is not None and len(labels):
            counts = torch.from_numpy(np.bincount(np.maximum(labels, 0), minlength=len(self.labels))).double()
            counts[: len(self.labels)] += self.labels
            self.labels = counts

    def finish(self, accelerator, name: str = "", img_size: int | None = None) -> ImageStatistics:
        """Return the statistics of all processes' images, the same on all."""
        gaussians = {layer: moments.gaussian(accelerator) for layer, moments in self.moments.items()}
        kept = None
        if self.is_kept is not None:
            numbers, kept = (gather_rows(torch.cat(parts), accelerator) for parts in zip(*self.kept))
            kept = kept[numbers.argsort()]
        classes = int(gather_rows(torch.tensor([len(self.labels)]), accelerator).max())
        labels = torch.nn.functional.pad(self.labels, (0, classes - len(self.labels)))
        counts = tuple(map(int, _sum(labels, accelerator).tolist()))
        scores = None if self.scores is None else self.scores.scores(accelerator)
        bad_images = int(_sum(torch.tensor(len(self.bad_images), dtype=torch.float64), accelerator))
        of_network, num_images = (self.network.name, self.network.weights_id), self.moments[MAIN].count
        return ImageStatistics(*of_network, gaussians, name, kept, scores, num_images, img_size, counts, bad_images)


def _zeros(device: torch.device | str, *shape: int) -> Tensor:
    is_apple = torch.device(device).type == "mps"  # has no float64
    return torch.zeros(shape, dtype=torch.float64, device="cpu" if is_apple else device)


def _shuffled(num_images: int) -> np.ndarray:
    return np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)


def _sum(values: Tensor, accelerator) -> Tensor:
    if accelerator is None or accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum").to(values.device)


def save_reference(path: Path, reference: ImageStatistics) -> None:
    """Write an `.npz` that `read_reference` and others' evaluators read, atomically.

    Raises `UserError`: it cannot be written.
    """
    about = {"maker": MAKER, **{name: getattr(reference, name) for name in ABOUT}, "source": reference.name}
    arrays = {"about": np.array(json.dumps(about))}
    for layer, gaussian in reference.gaussians.items():
        mean, covariance = NAMES[layer]
        arrays |= {mean: gaussian.mean.cpu().numpy(), covariance: gaussian.covariance.cpu().numpy()}
    if reference.kept is not None:
        arrays["kept"] = reference.kept.numpy()

    with disk_errors("make_reference", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:  # a name would get another ending
            np.savez(file, **arrays)


def read_reference(path: str, network: FeatureNetwork) -> ImageStatistics | None:
    """Read statistics: ours, or ADM's, JiT's and torch-fidelity's, which are of Inception. None: only images are there.

    Raises `UserError`: no such file, nothing of use in it, or statistics of other features.
    """

    def wrong(rule: str) -> UserError:
        return UserError(rule, about="reference", value=path)

    has_images = find_array(path, "reference") is not None
    known = {"about", "kept", *(name for names in NAMES.values() for name in names)}
    try:  # nothing in the file is run
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in known}
    except BROKEN as error:
        raise wrong(f"cannot be read ({reason_of(error)}): give another file.") from None
    about = checked_about(arrays, wrong)
    features = about.get("features", INCEPTION)
    if has_images and (network.name != features or NAMES[MAIN][0] not in arrays):
        return None
    if features != network.name:
        remedy = f"use --features {features}, or make a file of {network.name} features from the images with "
        raise wrong(f"holds statistics of {features} features, not of {network.name}: {remedy}--make_reference.")
    if about.get("weights_id", network.weights_id) != network.weights_id:
        ids = f"{about['weights_id']}, here {network.weights_id}"
        remedy = "give the same --feature_weights, or make it again with --make_reference."
        raise wrong(f"was made with other weights of {features} ({ids}): {remedy}")
    layers = [layer for layer, (mean, _) in NAMES.items() if mean in arrays and layer in network.sizes]
    if MAIN not in layers:
        raise wrong("has neither statistics (mu, sigma) nor images (arr_0): give another.")
    gaussians = {}
    for layer in layers:
        (mean, covariance), size = NAMES[layer], network.sizes[layer]
        found = checked_array(arrays, mean, (size,), wrong), checked_array(arrays, covariance, (size, size), wrong)
        gaussians[layer] = Gaussian(*found)
        variances = found[1].diagonal()
        is_positive = variances.min() >= -1e-6 * max(1.0, variances.max())  # rounding may leave a constant one below 0
        if not is_positive or not torch.allclose(found[1], found[1].T, rtol=1e-4, atol=1e-6):
            raise wrong(f"{covariance} is not a covariance: give another file.")
    kept = checked_array(arrays, "kept", (-1, network.sizes[MAIN]), wrong).float() if "kept" in arrays else None
    said = {name: about[name] for name in ("num_images", "img_size", "label_counts") if name in about}
    return ImageStatistics(features, network.weights_id, gaussians, path, kept, **said)


def checked_about(arrays: dict[str, np.ndarray], wrong: Callable[[str], UserError]) -> dict:
    """Return the description in a file of ours, {} of others, or raise `wrong(rule)`."""
    if "about" not in arrays:
        return {}
    try:
        about = json.loads(str(arrays["about"]))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("maker") != MAKER:
        raise wrong("its description is not one of ours: make it again.")
    counts, sizes = about.get("label_counts") or [], (about.get("num_images"), about.get("img_size"))
    numbers = [*counts, *(size for size in sizes if size is not None)] if isinstance(counts, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or 0 in sizes:
        raise wrong("its description has counts that are not whole numbers: make it again.")
    return about | {"label_counts": tuple(counts)}


def checked_array(arrays: dict, name: str, shape: tuple[int, ...], wrong: Callable[[str], UserError]) -> Tensor:
    """Return an array as float64, or raise `wrong(rule)`; a first size of -1 stands for `LEAST_FEATURES` or more."""
    array = arrays.get(name, np.empty(()))
    least = (LEAST_FEATURES, *shape[1:]) if shape[0] == -1 else shape
    has_shape = array.ndim == len(shape) and array.shape[1:] == shape[1:] and len(array) >= least[0]
    if not has_shape or len(array) > shape[0] != -1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        more = " or more" if shape[0] == -1 else ""
        raise wrong(f"{name} is {array.dtype} {array.shape}, not finite numbers {least}{more}: give another file.")
    return torch.from_numpy(np.asarray(array, np.float64))
