"""The objective of JiT (arXiv 2511.13720), and the draws for each image: its time, noise and dropped label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jit_accel.base import rng
from jit_accel.model.spaces import convert, noised


@dataclass(frozen=True)
class FlowPoint:
    """Noised images z (B, 3, H, W) at the times t (B,) of their way from noise (t = 0) to images (t = 1)."""

    z: Tensor
    t: Tensor

    def convert(self, value: Tensor, source: str, target: str, t_eps: float) -> Tensor:
        """Express a prediction of `source` ("x", "e" or "v") at this point as one of `target`."""
        return convert(value, self.z, self.t.view(-1, 1, 1, 1), source, target, t_eps)


def between(x: Tensor, e: Tensor, t: Tensor) -> FlowPoint:
    """Return the point z = t x + (1 - t) e between clean images x and noise e (B, 3, H, W), at times t (B,)."""
    return FlowPoint(noised(x, e, t), t)


def diffusion_loss(
    model,
    x: Tensor,
    t: Tensor,
    e: Tensor,
    labels: Tensor,
    *,
    prediction: str = "x",
    loss_space: str = "v",
    t_eps: float = 0.05,
) -> Tensor:
    """Return the squared error of the network's prediction, a mean over each image's pixels (the paper's Algorithm 1).

    Args:
        model: called as `model(z, t, labels).sample`.
        x: clean images (B, 3, H, W) in [-1, 1].
        t: times (B,) in [0, 1].
        e: noise (B, 3, H, W), already scaled by noise_scale.
        labels: classes (B,), the last one meaning "no class".

    Returns:
        Losses (B,), float32, on the device.
    """
    point = between(x, e, t)
    predicted = model(point.z, t, labels).sample.float()
    truth = {"x": x, "e": e, "v": x - e}[prediction]
    error = point.convert(predicted, prediction, loss_space, t_eps) - point.convert(
        truth, prediction, loss_space, t_eps
    )
    return error.square().mean(dim=(1, 2, 3))


def draw_times(seed: int, positions, P_mean: float = -0.8, P_std: float = 0.8) -> Tensor:
    """Draw logit-normal times of the images at these positions of the run: float32 (B,) in (0, 1), on the CPU."""
    normal = torch.special.ndtri(torch.from_numpy(rng.uniform(seed, "t", positions)))
    return torch.sigmoid(P_std * normal + P_mean).float()


def draw_noise(seed: int, positions, like: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Draw Gaussian noise of the shape of `like` (B, 3, H, W), each image's from its own position in the run.

    So no image's noise depends on which process, micro-step or slot of the batch it falls into.
    """
    generator = torch.Generator(device=like.device)
    noise = torch.empty_like(like, dtype=torch.float32)
    # 63 bits, since some backends take the seed as a signed number.
    for image, key in zip(noise, rng.hash64(seed, "noise", positions).tolist()):
        image.normal_(generator=generator.manual_seed(key >> 1))
    return noise.mul_(noise_scale)


def drop_labels(seed: int, positions, labels: Tensor, num_classes: int, label_drop_prob: float = 0.1) -> Tensor:
    """Replace labels (B,) by "no class" (`num_classes`) with this probability, for classifier-free guidance."""
    dropped = torch.from_numpy(rng.uniform(seed, "label_drop", positions) < label_drop_prob)
    return labels.masked_fill(dropped.to(labels.device, non_blocking=True), num_classes)


@dataclass(frozen=True)
class Objective:
    """The functions above with the settings of one run; a subclass may draw other times or take another loss.

    The fields are the settings of the same names. Positions are the images' numbers in the run, (B,) integers.
    """

    prediction: str = "x"
    loss_space: str = "v"
    P_mean: float = -0.8
    P_std: float = 0.8
    noise_scale: float = 1.0
    t_eps: float = 0.05
    label_drop_prob: float = 0.1

    def times(self, seed: int, positions) -> Tensor:
        """Draw times, float32 (B,) in (0, 1), on the CPU."""
        return draw_times(seed, positions, self.P_mean, self.P_std)

    def noise(self, seed: int, positions, like: Tensor) -> Tensor:
        """Draw noise of the shape of `like` (B, 3, H, W), scaled by `noise_scale`."""
        return draw_noise(seed, positions, like, self.noise_scale)

    def dropped(self, seed: int, positions, labels: Tensor, num_classes: int) -> Tensor:
        """Replace some of the labels (B,) by "no class"."""
        return drop_labels(seed, positions, labels, num_classes, self.label_drop_prob)

    def losses(self, model, x: Tensor, t: Tensor, e: Tensor, labels: Tensor) -> Tensor:
        """Return the losses, float32 (B,), of clean images x, times t and noise e, as `diffusion_loss` takes them."""
        how = {"prediction": self.prediction, "loss_space": self.loss_space, "t_eps": self.t_eps}
        return diffusion_loss(model, x, t, e, labels, **how)
