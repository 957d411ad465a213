"""Scores of images against those that they should be, a row of `SCORES` each, and intervals for their means."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jit_accel.base.devices import full_float32
from jit_accel.base.errors import UserError, lookup
from jit_accel.evaluate.features import has_torch_fidelity
from jit_accel.evaluate.perceptual import LEAST_SIDE, load_lpips
from jit_accel.model.card import HIGH, LOW

MOST_DB = 100.0  # of equal images, whose PSNR is infinite; more than images of 8 bits that differ come to
RESAMPLES = 1000
Score = Callable[[Tensor, Tensor], Tensor]  # of images and truths, float32 (B, C, H, W) in [0, 1]: (B,)


def import_torchmetrics() -> ModuleType:
    """Return `torchmetrics.functional`. Raises ImportError."""
    has_torch_fidelity()  # which torchmetrics imports, and fails where that does for want of torchvision
    return importlib.import_module("torchmetrics.functional")


def _psnr() -> Score:
    """Peak signal-to-noise ratio in dB, of the range 1."""
    measure = import_torchmetrics().image.peak_signal_noise_ratio
    how = {"data_range": 1.0, "dim": (1, 2, 3), "reduction": "none"}
    return lambda images, truths: measure(images, truths, **how).clamp(max=MOST_DB)


def _ssim() -> Score:
    """Structural similarity (Wang et al. 2004), Gaussian window of standard deviation 1.5."""
    measure = import_torchmetrics().image.structural_similarity_index_measure
    return lambda images, truths: measure(images, truths, data_range=1.0, reduction="none")


def _mae() -> Score:
    """Mean absolute error, of the range 1."""
    measure = import_torchmetrics().mean_absolute_error

    def score(images: Tensor, truths: Tensor) -> Tensor:
        columns = images.flatten(1).T.contiguous(), truths.flatten(1).T.contiguous()
        return measure(*columns, num_outputs=len(images)).reshape(-1)

    return score


def _lpips() -> Score:
    """Distance as AlexNet sees it, of images of 31 pixels and more."""
    return load_lpips(Path(import_torchmetrics().__file__).parent / "image" / "lpips_models" / "alex.pth")


SCORES: dict[str, Callable[[], Score]] = {"psnr": _psnr, "ssim": _ssim, "mae": _mae, "lpips": _lpips}


class PairScores:
    """Scores by their names, of images uint8 (B, C, H, W) against truths of the same shape."""

    def __init__(self, names: Sequence[str] = ("psnr", "ssim", "mae"), about: str = "metrics", side: int | None = None):
        """Raise `UserError`, about the setting `about`, for an unknown name, without what a score needs, and for one
        that cannot be taken of images of this `side` in pixels.
        """
        makers = {name: lookup(SCORES, name, about) for name in names}
        if "lpips" in names and (side or LEAST_SIDE) < LEAST_SIDE:
            rule = f"is for images of {LEAST_SIDE} pixels and more, and these have {side}: leave it out."
            raise UserError(rule, about=about, value="lpips")
        try:
            self._scores = {name: make() for name, make in makers.items()}
        except ImportError as error:
            raise UserError(f"{error}: pip install 'jit_accel[eval]'.", about=about) from None
        self.names = tuple(makers)

    @torch.inference_mode()
    def __call__(self, images: Tensor, truths: Tensor) -> Tensor:
        """Return float64 (B, scores), on the CPU; the images' device computes."""
        with torch.autocast(images.device.type, enabled=False), full_float32():
            pair = [pixels.to(images.device).float() / 255 for pixels in (images, truths)]
            return torch.stack([score(*pair) for score in self._scores.values()], 1).double().cpu()


def untouched(conditions: Tensor, like: Tensor) -> Tensor | None:
    """Return conditions, (B, C, H, W) in [0, 1], as images uint8 of the shape of `like`: grey as colour, and resized.

    None for a condition of other channels, which shows no such image.
    """
    channels, size = like.shape[1], like.shape[-2:]
    if conditions.shape[1] not in (1, channels):
        return None
    if conditions.shape[-2:] != size:
        conditions = F.interpolate(conditions, size, mode="bicubic", antialias=True).clamp(0, 1)
    return (conditions * 255).round().to(torch.uint8).expand(-1, channels, -1, -1)


def means(names: Sequence[str], scores: Tensor) -> dict[str, float]:
    """Return the mean of each column of (n, scores), the same for any order of the rows."""
    return {name: math.fsum(column) / len(column) for name, column in zip(names, scores.T.tolist())}


def with_intervals(names: Sequence[str], scores: Tensor, seed: int = 0) -> dict[str, float]:
    """Return the means, and the ends of their 95 % intervals, by a bootstrap over the images (rows of `scores`)."""
    found, rows = means(names, scores), scores.numpy()
    draws, count = np.random.default_rng(seed), len(rows)
    resampled = np.stack([rows[draws.integers(count, size=count)].mean(0) for _ in range(RESAMPLES)])
    ends = np.quantile(resampled, (0.025, 0.975), axis=0).tolist()
    return {
        name: value
        for place, key in enumerate(names)
        for name, value in ((key, found[key]), (key + LOW, ends[0][place]), (key + HIGH, ends[1][place]))
    }
