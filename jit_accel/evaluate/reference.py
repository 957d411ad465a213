"""What images are compared with: statistics measured from images, or read from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.evaluate.features import MAIN, SPATIAL, FeatureNetwork
from jit_accel.evaluate.formulas import covariance_root
from jit_accel.evaluate.images import BROKEN, find_array, reason_of
from jit_accel.evaluate.names import INCEPTION
from jit_accel.evaluate.statistics import ImageStatistics

MAKER = "jit_accel"
LEAST_FEATURES = 2  # a kernel distance compares different images
# Names in the .npz of means and covariances, as ADM's evaluator and torch-fidelity's users have them
NAMES = {MAIN: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}


@dataclass
class Gaussian:
    """mean: float64 (D,). covariance: float64 (D, D)."""

    mean: Tensor
    covariance: Tensor
    _root: Tensor | None = field(default=None, repr=False)

    @property
    def root(self) -> Tensor:
        """The covariance's square root, computed once."""
        if self._root is None:
            self._root = covariance_root(self.covariance)
        return self._root


@dataclass
class Reference:
    """Statistics to compare with.

    gaussians: by layer. kept: float32 (n, D), features for the metrics that compare images one by one, None where
    there are none. num_images: None where a file does not say. label_counts: images of each class, where known.
    fingerprint: of the data set that was measured, "" where there is none.
    """

    name: str
    features: str
    gaussians: dict[str, Gaussian]
    kept: Tensor | None = None
    num_images: int | None = None
    img_size: int | None = None
    label_counts: tuple[int, ...] = ()
    fingerprint: str = ""


def reference_of(name: str, statistics: ImageStatistics, fingerprint: str = "") -> Reference:
    """Measured statistics as a reference."""
    gaussians = {layer: Gaussian(moments.mean, moments.covariance) for layer, moments in statistics.moments.items()}
    return Reference(
        name,
        statistics.features,
        gaussians,
        statistics.kept,
        statistics.num_images,
        statistics.img_size,
        statistics.label_counts,
        fingerprint,
    )


def save_reference(path: Path, reference: Reference, weights_id: str) -> None:
    """Write an `.npz` that `read_reference` and others' evaluators read, atomically.

    Raises:
        UserError: it cannot be written.
    """
    about = {
        "maker": MAKER,
        "features": reference.features,
        "weights_id": weights_id,
        "num_images": reference.num_images,
        "img_size": reference.img_size,
        "label_counts": reference.label_counts,
        "source": reference.name,
    }
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


def read_reference(path: str, network: FeatureNetwork) -> Reference | None:
    """Read statistics: ours, or ADM's, JiT's and torch-fidelity's, which are of Inception. None: only images are there.

    Raises:
        UserError: no such file, nothing of use in it, or statistics of other features.
    """
    has_images = find_array(path, "reference") is not None
    arrays = _read_arrays(path)
    about = _about(path, arrays)
    features = about.get("features", INCEPTION)
    if has_images and (network.name != features or NAMES[MAIN][0] not in arrays):
        return None
    if features != network.name:
        raise UserError(
            f"holds statistics of {features} features, not of {network.name}: measure with {features} features, or "
            f"make a file of {network.name} features from the images with --make_reference.",
            about="reference",
            value=path,
        )
    if about.get("weights_id", network.weights_id) != network.weights_id:
        raise UserError(
            f"was made with other weights of {features} ({about['weights_id']}, here "
            f"{network.weights_id}): give the same weights, or make it again with --make_reference.",
            about="reference",
            value=path,
        )
    gaussians = {
        layer: _gaussian(path, arrays, layer, network.sizes[layer])
        for layer, (mean, _) in NAMES.items()
        if mean in arrays and layer in network.sizes
    }
    if MAIN not in gaussians:
        raise UserError(
            "has neither statistics (mu, sigma) nor images (arr_0): give another.", about="reference", value=path
        )
    kept = _kept(path, arrays, network.sizes[MAIN])
    counts = tuple(about.get("label_counts", ()))
    return Reference(path, features, gaussians, kept, about.get("num_images"), about.get("img_size"), counts)


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """All arrays but the images; nothing in the file is run."""
    known = {"about", "kept", *(name for names in NAMES.values() for name in names)}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in known}
    except BROKEN as error:
        raise UserError(
            f"cannot be read ({reason_of(error)}): give another file.", about="reference", value=path
        ) from None


def _about(path: str, arrays: dict[str, np.ndarray]) -> dict:
    if "about" not in arrays:
        return {}
    try:
        about = json.loads(str(arrays["about"]))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("maker") != MAKER:
        raise UserError("its description is no one of ours: make it again.", about="reference", value=path)
    counts, sizes = about.get("label_counts") or [], (about.get("num_images"), about.get("img_size"))
    numbers = [*counts, *(size for size in sizes if size is not None)] if isinstance(counts, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or 0 in sizes:
        raise UserError("its description has counts that are none: make it again.", about="reference", value=path)
    return about | {"label_counts": counts}


def _kept(path: str, arrays: dict[str, np.ndarray], size: int) -> Tensor | None:
    if "kept" not in arrays:
        return None
    kept = arrays["kept"]
    if (
        kept.ndim != 2
        or len(kept) < LEAST_FEATURES
        or kept.shape[1] != size
        or kept.dtype.kind != "f"
        or not np.isfinite(kept).all()
    ):
        raise UserError(
            f"kept is {kept.dtype} {kept.shape}, not finite floats (n, {size}) of {LEAST_FEATURES} "
            "images or more: make it again.",
            about="reference",
            value=path,
        )
    return torch.from_numpy(kept).float()


def _gaussian(path: str, arrays: dict[str, np.ndarray], layer: str, size: int) -> Gaussian:
    names = [name for name in NAMES[layer] if name in arrays and arrays[name].dtype.kind in "fiu"]
    found = [torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in names]
    shapes = [tuple(array.shape) for array in found]
    if shapes != [(size,), (size, size)] or not all(bool(array.isfinite().all()) for array in found):
        names, wanted = ", ".join(NAMES[layer]), f"{(size,)} and {(size, size)}"
        raise UserError(
            f"{names} have the shapes {shapes}, not {wanted}, or are not finite.", about="reference", value=path
        )
    variances = found[1].diagonal()
    is_positive = variances.min() >= -1e-6 * max(1.0, variances.max())  # rounding may leave a constant one below 0
    if not is_positive or not torch.allclose(found[1], found[1].T, rtol=1e-4, atol=1e-6):
        raise UserError(f"{NAMES[layer][1]} is no covariance: give another file.", about="reference", value=path)
    return Gaussian(*found)
