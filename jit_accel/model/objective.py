"""What JiT minimises (arXiv 2511.13720), and what is drawn for each image: its time, noise and dropped label."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_accel.base import rng
from jit_accel.model.spaces import convert, noised


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
    """Squared error of the network's prediction, a mean over each image's pixels (Algorithm 1 of the paper).

    Args:
        model: called as `model(z, t, labels).sample`.
        x: clean images (B, 3, H, W) in [-1, 1].
        t: times (B,) in [0, 1].
        e: noise (B, 3, H, W), already scaled by noise_scale.
        labels: classes (B,), the last one meaning "no class".

    Returns:
        Losses (B,), float32, on the device.
    """
    per_image = t.view(-1, 1, 1, 1)
    z = noised(x, e, t)
    output = model(z, t, labels).sample.float()
    truth = {"x": x, "e": e, "v": x - e}[prediction]
    error = convert(output, z, per_image, prediction, loss_space, t_eps) - convert(
        truth, z, per_image, prediction, loss_space, t_eps
    )
    return error.square().mean(dim=(1, 2, 3))


def draw_times(seed: int, positions, P_mean: float = -0.8, P_std: float = 0.8) -> Tensor:
    """Logit-normal times of the images at these positions of the run: float32 (B,) in (0, 1), on the CPU."""
    normal = torch.special.ndtri(torch.from_numpy(rng.uniform(seed, "t", positions)))
    return torch.sigmoid(P_std * normal + P_mean).float()


def draw_noise(seed: int, positions, like: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Gaussian noise of the shape of `like` (B, 3, H, W), each image's from its own position in the run.

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
