"""Losses of the predicted clean image beside the objective's: a row of `AUX_LOSSES` each."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jit_accel.base.devices import full_float32
from jit_accel.base.errors import UserError, lookup
from jit_accel.base.spans import span
from jit_accel.model.batch_losses import BATCH_LOSSES, CONTRASTIVE, LAYERSYNC, Seen, synced_blocks
from jit_accel.model.spaces import convert

FORM = re.compile(r"(\w+)=([^:@]+)(?::(\d+))?(?:@([\d.]+)-([\d.]+))?", re.ASCII)
CHARBONNIER_EPS = 1e-3  # as in super-resolution (1704.03915)
# Wang et al. 2004: the window's deviation and reach in pixels, and the constants K1 and K2.
SSIM_SIGMA, SSIM_REACH, SSIM_K = 1.5, 5, (0.01, 0.03)
SSIM_RANGE = 2.0  # from black to white
Features = Callable[[Tensor], Tensor]  # of images (B, C, H, W) in [-1, 1], float32 (B, n), with gradients


def l1(x: Tensor, truth: Tensor, features: Features | None = None) -> Tensor:
    """Return the mean absolute error."""
    return (x - truth).abs().mean(dim=(1, 2, 3))


def charbonnier(x: Tensor, truth: Tensor, features: Features | None = None) -> Tensor:
    """Return the mean of sqrt(d^2 + eps^2): the absolute error, but smooth at 0."""
    return ((x - truth).square() + CHARBONNIER_EPS**2).sqrt().mean(dim=(1, 2, 3))


def ssim(x: Tensor, truth: Tensor, features: Features | None = None) -> Tensor:
    """Return 1 - SSIM (Wang et al. 2004), by a Gaussian window; beyond their edges images are mirrored."""
    with full_float32():  # variances are small differences
        moments = _windowed(torch.cat([x, truth, x * x, truth * truth, x * truth]))
    mean_x, mean_y, xx, yy, xy = moments.chunk(5)
    luminance, contrast = ((k * SSIM_RANGE) ** 2 for k in SSIM_K)
    variances = (xx - mean_x.square()).clamp_min(0) + (yy - mean_y.square()).clamp_min(0)
    above = (2 * mean_x * mean_y + luminance) * (2 * (xy - mean_x * mean_y) + contrast)
    below = (mean_x.square() + mean_y.square() + luminance) * (variances + contrast)
    return 1 - (above / below).mean(dim=(1, 2, 3))


def _windowed(maps: Tensor) -> Tensor:
    """Return the mean of maps (B, C, H, W) in a Gaussian window around each place; small images have a smaller one."""
    reach = min(SSIM_REACH, *(side - 1 for side in maps.shape[-2:]))
    places = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    window = torch.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    window = (window / window.sum()).view(1, 1, 1, -1)
    padded = F.pad(maps, (reach,) * 4, mode="reflect").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(padded, window), window.mT).view(maps.shape)


def feature_distance(x: Tensor, truth: Tensor, features: Features) -> Tensor:
    """Return the squared distance of the features, over the squared length of the true image's."""
    with torch.no_grad():
        wanted = features(truth)
    return (features(x) - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)


# Each takes predicted and true images, float32 (B, C, H, W), the true ones in [-1, 1]; it returns (B,).
FEATURES = "features"
AUX_LOSSES = {"l1": l1, "charbonnier": charbonnier, "ssim": ssim, FEATURES: feature_distance}
ALL_LOSSES = AUX_LOSSES | BATCH_LOSSES


@dataclass(frozen=True)
class AuxLoss:
    """A loss as it is asked for: the first optimizer step with it, and the times at which it acts, both included."""

    name: str
    weight: float
    from_step: int = 0
    low: float = 0.0
    high: float = 1.0


def aux_losses_of(texts: Iterable[str], about: str = "aux_loss") -> tuple[AuxLoss, ...]:
    """Return what `l1=0.5:2000@0.3-1.0` and the like mean.

    UserError: a loss that is not known, or is given twice; a weight that is not positive; times that are no part of
    0 to 1.
    """
    found: dict[str, AuxLoss] = {}
    for text in texts:
        wrong = partial(UserError, about=about, value=text)
        name = re.match(r"\w*", text)[0]
        lookup(ALL_LOSSES, name, about, value=text)
        if name in found:
            raise wrong("is there already: give each loss once.")
        if not (parts := FORM.fullmatch(text)):
            rule = (
                "must be NAME=WEIGHT, and maybe :STEP, from which on it acts, and @LOW-HIGH, the times t at which it "
            )
            raise wrong(f"{rule}does, such as {name}=0.5:2000@0.3-1.0.")
        weight, low, high = map(_number, (parts[2], parts[4] or "0", parts[5] or "1"))
        if not 0 < weight < math.inf:
            raise wrong(f"the weight must be a positive number, such as {name}=0.5.")
        if name == CONTRASTIVE and weight >= 1:
            raise wrong("it is subtracted, and at a weight of 1 or more nothing is least: use one such as 0.05.")
        if not 0 <= low < high <= 1:
            raise wrong(f"the times must be two numbers from 0 to 1, the lower one first, such as {name}=0.5@0.3-1.0.")
        found[name] = AuxLoss(name, weight, int(parts[3] or 0), low, high)
    return tuple(found.values())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class WatchedNetwork:
    """A network whose last call is remembered: what it was given, z and t, and what it predicted."""

    def __init__(self, model: Callable):
        self._model = model

    def __call__(self, z: Tensor, t: Tensor, *args, **kwargs):
        output = self._model(z, t, *args, **kwargs)
        self.z, self.t, self.predicted = z, t, output[0]
        return output

    def __getattr__(self, name: str):
        return getattr(self._model, name)


class AuxLosses:
    """The losses of a training beside its objective's, all of what the network predicted, expressed as x."""

    def __init__(
        self,
        losses: Sequence[AuxLoss] = (),
        prediction: str = "x",
        t_eps: float = 0.05,
        features: Features | None = None,
        seed: int = 0,
        network=None,  # a `JiTTransformer2DModel`, for losses of its tokens
    ):
        self.losses, self.prediction, self.t_eps, self.features = tuple(losses), prediction, t_eps, features
        self.seed, self.network = seed, network
        self._acting: list[AuxLoss] = []

    def watched(self, model: Callable, step: int) -> Callable:
        """Return the network for a micro-step of this optimizer step, the first one being 1: itself, or watched."""
        self._acting = [loss for loss in self.losses if loss.from_step <= step]
        self._seen = WatchedNetwork(model) if self._acting else model
        if LAYERSYNC in [loss.name for loss in self._acting]:
            self.network.tokens_after = dict.fromkeys(synced_blocks(len(self.network.blocks)))
        return self._seen

    def added_to(
        self,
        loss: Tensor,
        truth: Tensor,
        record: Callable[[str, Tensor], None],
        labels: Tensor | None = None,
        positions=None,
    ) -> Tensor:
        """Return a loss plus the losses that act, by their weights, of what the network has predicted of this truth.

        Each is a mean over the images (B, C, H, W), where one counts 0 at times at which the loss does not act.
        `record` gets its name and its value, which the weight is not in. Labels and positions are as in `Seen`.
        """
        if not self._acting:
            return loss
        with span("aux_losses"):
            last, self._seen = self._seen, None
            of_batch = (truth, labels, positions, self.seed, self._kept_tokens())
            seen = Seen(last.predicted.float(), self.prediction, last.z, last.t, self.t_eps, *of_batch)
            x = convert(seen.predicted, seen.z, seen.t.view(-1, 1, 1, 1), self.prediction, "x", self.t_eps)
            for aux in self._acting:
                acts = (seen.t >= aux.low) & (seen.t <= aux.high)
                of_image, of_seen = AUX_LOSSES.get(aux.name), BATCH_LOSSES.get(aux.name)
                value = of_image(x, truth, self.features) if of_image else of_seen(seen)
                value = (value * acts).mean()
                record(aux.name, value)
                loss = loss + aux.weight * value
            return loss

    def _kept_tokens(self) -> tuple[Tensor, ...]:
        """Return the tokens that the network has kept for a loss; it keeps none in other calls."""
        kept = getattr(self.network, "tokens_after", None)
        if not kept:
            return ()
        self.network.tokens_after = {}
        return tuple(kept.values())
