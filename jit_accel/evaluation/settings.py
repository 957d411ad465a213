"""The settings of `jit_accel.evaluate`; imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jit_accel.errors import UserError, lookup
from jit_accel.evaluation.names import FEATURES, INCEPTION, chosen_metrics


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how far generated images are from real ones: FID and others."""

    model: str | None = None
    """What makes the images: a pipeline folder, a run's output folder, a checkpoint, owner/name of the Hub."""
    images: str | None = None
    """Images to measure instead of a model's: whatever --data_path of training may be, or an .npz with arr_0."""
    reference: str | None = None
    """The real images: whatever --data_path of training may be; or statistics, an .npz that --make_reference wrote, or
    ADM's or JiT's."""
    ema: str | None = None
    """Which averaged weights of a run or checkpoint: a decay, or "model" for the weights themselves (default: those of
    the pipeline folder, or the first average)."""
    features: str = INCEPTION
    """The network to compare by: inception (FID, sFID, Inception Score, KID, precision and recall), or
    efficientnet_lite0 (fd_efficientnet_lite0 and others; its weights come with a package, without a download)."""
    feature_weights: str | None = None
    """File of the network's weights (default: torch hub's cache, downloaded if they are not there)."""
    metrics: tuple[str, ...] = ()
    """Which ones: fid, sfid, inception_score, kid, precision, recall; or, with any features, fd, kd, precision, recall
    (default: all that the features and the reference allow)."""
    num_images: int = 50_000
    """How many to generate; image n is of class n % classes."""
    batch_size: int = 64
    """Images that a process works on together."""
    img_size: int | None = None
    """Side in pixels to crop images to (default: the model's, or that of the images)."""
    max_features: int = 10_000
    """How many images, drawn at random, are compared one by one for KID, precision and recall."""
    seed: int = 0
    """Of the noise."""
    num_inference_steps: int = 50
    """ODE steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance (default: the pipeline's own); where it is not 1, images without it are measured too."""
    guidance_interval: tuple[float, float] | None = None
    """Where guidance acts, from t to t (default: the pipeline's own)."""
    method: Literal["heun", "euler"] | None = None
    """How the ODE is solved (default: the pipeline's own)."""
    unguided: bool = True
    """Measure the images without guidance too."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Of the generating network (default: accelerate's configuration, else bf16 where the device is good at it)."""
    compile: bool = False
    """torch.compile each block: faster after a slower start."""
    make_reference: str | None = None
    """Write the statistics of --reference to this .npz, to be used as --reference later; no model is needed."""
    output: str | None = None
    """JSON file that the results are added to (default: evaluation.json in the model's folder)."""


def check(config: EvaluateConfig) -> None:
    """Refuse settings that are missing, out of range, or contradict each other.

    Raises:
        UserError: naming the flag, its value and the rule.
    """
    lookup(dict.fromkeys(FEATURES), config.features, "--features")
    chosen_metrics(config.features, config.metrics)
    if config.reference is None:
        raise UserError("--reference: not given: name the real images, or a file of their statistics.")
    if config.model is not None and config.images is not None:
        raise UserError(f"--images {config.images}: does not go with --model: give the one or the other.")
    if config.model is None and config.images is None and config.make_reference is None:
        raise UserError("--model: not given: name what makes the images, or measure others with --images.")
    if config.ema is not None and config.model is None:
        raise UserError(f"--ema {config.ema}: chooses among the weights of --model, which is not given.")
    if config.make_reference is not None and not config.make_reference.endswith(".npz"):
        raise UserError(f"--make_reference {config.make_reference}: must end in .npz.")
    for flag, least in (("num_images", 2), ("batch_size", 1), ("img_size", 1), ("num_inference_steps", 1)):
        value = getattr(config, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}.")
    if config.max_features < 4:
        raise UserError(f"--max_features {config.max_features}: must be at least 4, for three neighbours of each.")
    if config.seed < 0:
        raise UserError(f"--seed {config.seed}: must not be negative.")
    interval = config.guidance_interval
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(
            f"--guidance_interval {interval[0]:g} {interval[1]:g}: must be two times from 0 to 1, the lower first."
        )
