"""Statistics of real images in a file: written, and read with a look at every array."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.evaluate.catalogue import INCEPTION
from jit_accel.evaluate.features import MAIN, SPATIAL, FeatureNetwork
from jit_accel.evaluate.image_sets import BROKEN, find_array, reason_of
from jit_accel.evaluate.statistics import Gaussian, ImageStatistics

MAKER = "jit_accel"
LEAST_FEATURES = 2  # a kernel distance compares different images
# Names in the .npz of means and covariances, as ADM's evaluator and torch-fidelity's users have them
NAMES = {MAIN: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
ABOUT = ("features", "weights_id", "num_images", "img_size", "label_counts")


def save_reference(path: Path, reference: ImageStatistics) -> None:
    """Write an `.npz` that `read_reference` and others' evaluators read, atomically.

    Raises:
        UserError: it cannot be written.
    """
    about = {"maker": MAKER, "source": reference.name, **{name: getattr(reference, name) for name in ABOUT}}
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

    Raises:
        UserError: no such file, nothing of use in it, or statistics of other features.
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
        raise wrong(
            f"holds statistics of {features} features, not of {network.name}: use --features "
            f"{features}, or make a file of {network.name} features from the images with --make_reference."
        )
    if about.get("weights_id", network.weights_id) != network.weights_id:
        raise wrong(
            f"was made with other weights of {features} ({about['weights_id']}, here "
            f"{network.weights_id}): give the same --feature_weights, or make it again with --make_reference."
        )
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
            raise wrong(f"{covariance} is no covariance: give another file.")
    kept = checked_array(arrays, "kept", (-1, network.sizes[MAIN]), wrong).float() if "kept" in arrays else None
    sizes = {"num_images": about.get("num_images"), "img_size": about.get("img_size")}
    counts = tuple(about.get("label_counts", ()))
    return ImageStatistics(features, network.weights_id, gaussians, path, kept, **sizes, label_counts=counts)


def checked_about(arrays: dict[str, np.ndarray], wrong: Callable[[str], UserError]) -> dict:
    """Return the description in a file of ours, {} of others, or raise `wrong(rule)`."""
    if "about" not in arrays:
        return {}
    try:
        about = json.loads(str(arrays["about"]))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("maker") != MAKER:
        raise wrong("its description is no one of ours: make it again.")
    counts, sizes = about.get("label_counts") or [], (about.get("num_images"), about.get("img_size"))
    numbers = [*counts, *(size for size in sizes if size is not None)] if isinstance(counts, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or 0 in sizes:
        raise wrong("its description has counts that are none: make it again.")
    return about | {"label_counts": counts}


def checked_array(arrays: dict, name: str, shape: tuple[int, ...], wrong: Callable[[str], UserError]) -> Tensor:
    """Return an array as float64, or raise `wrong(rule)`; a first size of -1 stands for `LEAST_FEATURES` or more."""
    array = arrays.get(name, np.empty(()))
    least = (LEAST_FEATURES, *shape[1:]) if shape[0] == -1 else shape
    has_shape = array.ndim == len(shape) and array.shape[1:] == shape[1:] and len(array) >= least[0]
    if not has_shape or len(array) > shape[0] != -1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        more = " or more" if shape[0] == -1 else ""
        raise wrong(f"{name} is {array.dtype} {array.shape}, not finite numbers {least}{more}: give another file.")
    return torch.from_numpy(np.asarray(array, np.float64))
