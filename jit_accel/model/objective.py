"""The objective of JiT (arXiv 2511.13720), and the draws for each image: its time, noise and dropped label."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jit_accel.base import rng
from jit_accel.model.spaces import convert, noised

# What may be left out, the argument that says so, and the name of the draw.
DROPPED = (("condition_image", "condition_mask", "condition_drop"), ("vectors", "vector_mask", "vector_drop"))


@dataclass(frozen=True)
class Objective:
    """The loss that is minimised, and the draws for it; a subclass may draw other times or take another loss.

    The fields are the settings of the same names. Positions are the images' numbers in the run, (B,) integers: no draw
    depends on which process, micro-step or slot of the batch an image falls into.
    """

    prediction: str = "x"
    loss_space: str = "v"
    P_mean: float = -0.8
    P_std: float = 0.8
    noise_scale: float = 1.0
    t_eps: float = 0.05
    label_drop_prob: float = 0.1
    condition_drop_prob: float = 0.1
    path: str = "noise"
    model_guidance: float = 1.0
    no_class: int | None = None  # the label that says so, for model_guidance

    def unguided(self) -> "Objective":
        """Return the same objective without model guidance, whose losses can be compared with any other's."""
        return replace(self, model_guidance=1.0)

    def times(self, seed: int, positions) -> Tensor:
        """Draw logit-normal times, float32 (B,) in (0, 1), on the CPU."""
        normal = torch.special.ndtri(torch.from_numpy(rng.uniform(seed, "t", positions)))
        return torch.sigmoid(self.P_std * normal + self.P_mean).float()

    def noise(self, seed: int, positions, like: Tensor) -> Tensor:
        """Draw Gaussian noise of the shape of `like` (B, 3, H, W), scaled by `noise_scale`."""
        generator = torch.Generator(device=like.device)
        noise = torch.empty_like(like, dtype=torch.float32)
        # 63 bits, since some backends take the seed as a signed number.
        for image, key in zip(noise, rng.hash64(seed, "noise", positions).tolist()):
            image.normal_(generator=generator.manual_seed(key >> 1))
        return noise.mul_(self.noise_scale)

    def start(self, seed: int, positions, like: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return where the paths to images like these begin, at t = 0: noise, or of a bridge the condition."""
        return condition if self.path == "bridge" else self.noise(seed, positions, like)

    def dropped(self, seed: int, positions, labels: Tensor, num_classes: int) -> Tensor:
        """Replace some labels (B,), or all those of some images (B, k), by "no class" (`num_classes`), for guidance."""
        dropped = torch.from_numpy(rng.uniform(seed, "label_drop", positions) < self.label_drop_prob)
        dropped = dropped if labels.ndim == 1 else dropped[:, None]
        return labels.masked_fill(dropped.to(labels.device, non_blocking=True), num_classes)

    def left_out(self, seed: int, positions, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return conditions as the network's arguments, some of them left out, for classifier-free guidance."""
        found = dict(conditions)
        for name, mask, draw in DROPPED:
            if name in conditions:
                kept = torch.from_numpy(rng.uniform(seed, draw, positions) >= self.condition_drop_prob)
                found[mask] = kept.to(conditions[name].device, non_blocking=True)
        return found

    def losses(self, model, x: Tensor, t: Tensor, e: Tensor, labels: Tensor, **conditions: Tensor) -> Tensor:
        """Return each image's mean squared error (B,), float32 on the device (the paper's Algorithm 1).

        Args:
            model: called as `model(z, t, labels, **conditions).sample`.
            x: clean images (B, 3, H, W) in [-1, 1].
            t: times (B,) in [0, 1].
            e: noise (B, 3, H, W), already scaled by noise_scale; of a bridge the condition.
            labels: classes (B,), the last one meaning "no class".
            conditions: what else the network is given, such as `condition_image`, `vectors`, and their masks.
        """
        z, times = noised(x, e, t), t.view(-1, 1, 1, 1)
        away = None if self.model_guidance == 1 else self._without_class(model, z, t, labels, conditions)
        predicted = model(z, t, labels, **conditions).sample.float()
        truth = {"x": x, "e": e, "v": x - e}[self.prediction]
        if away is not None:
            has_class = (labels != self.no_class).view(len(labels), -1).any(1).view(-1, 1, 1, 1)
            truth = truth + has_class * (1 - 1 / self.model_guidance) * (predicted.detach() - away)
        found, wanted = (
            convert(value, z, times, self.prediction, self.loss_space, self.t_eps) for value in (predicted, truth)
        )
        return (found - wanted).square().mean(dim=(1, 2, 3))

    def _without_class(self, model, z: Tensor, t: Tensor, labels: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return what the network predicts of no class, for the targets of model guidance (arXiv 2502.12154).

        Where prediction and target agree, p = truth + w (p - p without class), the network has learnt what guidance of
        the scale 1 / (1 - w) makes of two predictions, and gives it by one.
        """
        with torch.no_grad():
            return model(z, t, torch.full_like(labels, self.no_class), **conditions).sample.float()

    def drawn_losses(
        self, model, x: Tensor, labels: Tensor, seed: int, positions, conditions: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) of images (B, 3, H, W) at times and from starts drawn for them, and the times (B,)."""
        t = self.times(seed, positions).to(x.device, non_blocking=True)
        e = self.start(seed, positions, x, conditions.get("condition_image"))
        return self.losses(model, x, t, e, labels, **conditions), t
