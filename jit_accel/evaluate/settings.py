"""The settings of `jit_accel.evaluate`, and the metrics; imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jit_accel.base.errors import UserError, check_ranges, lookup
from jit_accel.config.settings import MOST_IMAGES, MOST_PIXELS
from jit_accel.evaluate.grid import AXES, axes_of, words

INCEPTION, EFFICIENTNET_LITE0 = "inception", "efficientnet_lite0"
FEATURES = dict.fromkeys((INCEPTION, EFFICIENTNET_LITE0))


class ImageMetric(NamedTuple):
    """A row of `METRICS`.

    short: its name in `--metrics` with any features. inception: its name with the Inception network, which belongs to
    that network alone. other: its name with other features, before theirs; None: not measured with them. is_pairwise:
    images are compared one by one, by features that are kept.
    """

    short: str
    inception: str
    other: str | None
    is_better_higher: bool = False
    is_pairwise: bool = False


# A new one is a row here and a function in `formulas.MEASURES`.
METRICS = (
    ImageMetric("fd", "fid", "fd"),
    ImageMetric("sfd", "sfid", None),
    ImageMetric("is", "inception_score", None, is_better_higher=True),
    ImageMetric("kd", "kid", "kd", is_pairwise=True),
    ImageMetric("precision", "precision", "precision", is_better_higher=True, is_pairwise=True),
    ImageMetric("recall", "recall", "recall", is_better_higher=True, is_pairwise=True),
)
_LIMITS = (
    *(("num_images", 2, MOST_IMAGES), ("sweep_images", 2, MOST_IMAGES), ("sweep_top", 1, MOST_IMAGES)),
    *(("batch_size", 1, MOST_IMAGES), ("img_size", 1, MOST_PIXELS), ("seed", 0, 2**63 - 1)),
)
RANGES = [
    *((name, range(low, high + 1).__contains__, f"at least {low} and at most {high:,}") for name, low, high in _LIMITS),
    ("max_features", lambda v: v >= 4, "at least 4"),  # three neighbours of each
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how far generated images are from real ones: FID and others."""

    model: str | None = None
    """Source of the images: a pipeline folder, a run's output folder, a checkpoint, owner/name of the Hub."""
    images: str | None = None
    """Images to measure instead of a model's: whatever --data_path of training may be, or an .npz with arr_0."""
    reference: str | None = None
    """The real images: whatever --data_path of training may be; or statistics, an .npz that --make_reference wrote, or
    ADM's or JiT's."""
    ema: tuple[str, ...] = ()
    """Averaged weights of a run or checkpoint: a decay, "model" for the weights themselves (default: those of the
    pipeline folder, or the first average); several or "all" for a sweep."""
    features: str = INCEPTION
    """The network to compare by: inception (FID, sFID, Inception Score, KID, precision and recall), or
    efficientnet_lite0 (fd_efficientnet_lite0 and others; its weights come with a package, without a download)."""
    feature_weights: str | None = None
    """File of the network's weights (default: torch hub's cache, downloaded if they are not there)."""
    metrics: tuple[str, ...] = ()
    """Names: fid, sfid, inception_score, kid, precision, recall; or, with any features, fd, kd, precision, recall
    (default: all that the features and the reference allow)."""
    num_images: int = 50_000
    """Number of images to generate; image n is of class n % classes."""
    batch_size: int = 64
    """Images that a process works on together."""
    img_size: int | None = None
    """Side in pixels to crop images to (default: the model's, or that of the images)."""
    max_features: int = 10_000
    """Number of images, drawn at random, to compare one by one for KID, precision and recall."""
    seed: int = 0
    """Seed of the noise."""
    num_inference_steps: tuple[str, ...] = ()
    """ODE steps (default: the pipeline's own); several for a sweep: 25,50."""
    guidance_scale: tuple[str, ...] = ()
    """Classifier-free guidance (default: the pipeline's own); where it is not 1, images without it are measured too.
    Several for a sweep: 1,1.5,2 or start:stop:step, both ends included, 1.0:4.0:0.1."""
    guidance_interval: tuple[str, ...] = ()
    """Interval of t with guidance, low:high, such as 0.1:1.0 (default: the pipeline's own); several for a sweep:
    0.1:1.0,0:1."""
    method: tuple[str, ...] = ()
    """Solver of the ODE, heun or euler (default: the pipeline's own); both for a sweep."""
    sweep_images: int | None = None
    """Number of images that each setting of a sweep is measured on (default: a tenth of --num_images)."""
    sweep_top: int = 3
    """Number of the best settings of a sweep that are then measured on all of --num_images, beside the best without
    guidance; the best of these wins."""
    select: str | None = None
    """The metric that a sweep goes by (default: the first one, fid or fd_FEATURES)."""
    write_best: bool = True
    """Make the setting that wins a sweep the default of the pipeline folder: guidance, steps, solver, weights."""
    unguided: bool = True
    """Measure the images without guidance too."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the model (default: accelerate's configuration, else bf16 where the device is good at it)."""
    compile: bool = False
    """torch.compile each block: faster after a slower start."""
    make_reference: str | None = None
    """Write the statistics of --reference to this .npz, to be used as --reference later; no model is needed."""
    output: str | None = None
    """JSON file that the results are added to (default: evaluation.json in the model's folder, of a
    checkpoint in its run's)."""


def check(config: EvaluateConfig) -> None:
    """Refuse settings that are missing, out of range, or contradict each other.

    Raises `UserError`: naming the flag, its value and the rule.
    """
    lookup(FEATURES, config.features, "features")
    for flag in ("ema", "metrics", "method"):
        if (value := getattr(config, flag)) and not words(value):
            raise UserError("names nothing: give some, or leave the flag out.", about=flag, value=" ".join(value))
    chosen = chosen_metrics(config.features, config.metrics)
    if config.reference is None:
        raise UserError("not given: name the real images, or a file of their statistics.", about="reference")
    if config.model is not None and config.images is not None:
        raise UserError("does not go with --model: give the one or the other.", about="images", value=config.images)
    if config.model is None and config.images is None and config.make_reference is None:
        raise UserError("not given: name what makes the images, or measure others with --images.", about="model")
    if config.make_reference is not None and not config.make_reference.endswith(".npz"):
        raise UserError("must end in .npz.", about="make_reference", value=config.make_reference)
    axes_of(config)
    for flag in AXES:
        if (value := getattr(config, flag)) and config.model is None:
            rule = "says how --model makes images, which is not given: leave it out."
            raise UserError(rule, about=flag, value=" ".join(value))
    if config.select is not None and chosen_metrics(config.features, (config.select,), "select")[0] not in chosen:
        rule = f"is not among --metrics {','.join(config.metrics)}: add it."
        raise UserError(rule, about="select", value=config.select)
    check_ranges(vars(config), RANGES)


def metric_names(features: str) -> dict[str, ImageMetric]:
    """Return the metrics of these features by the names of their results, the Fréchet distance first."""
    if features == INCEPTION:
        return {metric.inception: metric for metric in METRICS}
    return {f"{metric.other}_{features}": metric for metric in METRICS if metric.other}


def chosen_metrics(features: str, names: tuple[str, ...], about: str = "metrics") -> tuple[str, ...]:
    """Return the results' names of the metrics that the setting `about` names; all of the features' for none.

    Raises `UserError`: no such metric, or not with these features.
    """
    table = metric_names(features)
    if not names:
        return tuple(table)
    aliases = {metric.short: name for name, metric in table.items()} | {name: name for name in table}
    for name in names:
        if name in metric_names(INCEPTION) and name not in aliases:
            remedy = f"use {next(iter(table))}, or --features {INCEPTION}"
            raise UserError(f"is measured with the Inception network alone: {remedy}.", about=about, value=name)
    chosen = [lookup(aliases, name, about) for name in names]
    return tuple(name for name in table if name in chosen)
