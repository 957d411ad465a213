"""The settings of `jit_accel.evaluate`, its metrics, and the grid that flags name; no torch: `--help` is quick."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jit_accel.base.errors import UserError, check_ranges, lookup, shown, within
from jit_accel.config.groups import (
    MOST_IMAGES,
    MOST_PIXELS,
    RawType,
    problem_of_raw,
    problem_of_separator,
)
from jit_accel.evaluate.drawing import FLAGS, axes_of
from jit_accel.evaluate.flag_values import ALL, words

INCEPTION, EFFICIENTNET_LITE0 = "inception", "efficientnet_lite0"
FEATURES = dict.fromkeys((INCEPTION, EFFICIENTNET_LITE0))
CONDITIONS = ("condition_from", "condition_path", "condition_column")  # where those of `--pairs` come from
READING = ("image_column", "label_column", "label_separator", "raw_shape", "raw_dtype")  # of `--pairs`, `--reference`
PAIR_SCORES = dict.fromkeys(("psnr", "ssim", "mae", "lpips"))  # of `--pairs`; functions: `pair_scores.SCORES`
USUAL_SCORES = ("psnr", "ssim", "mae")


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


# A new one is a row here and a function in `statistics.MEASURES`.
METRICS = (
    ImageMetric("fd", "fid", "fd"),
    ImageMetric("sfd", "sfid", None),
    ImageMetric("is", "inception_score", None, is_better_higher=True),
    ImageMetric("kd", "kid", "kd", is_pairwise=True),
    ImageMetric("precision", "precision", "precision", is_better_higher=True, is_pairwise=True),
    ImageMetric("recall", "recall", "recall", is_better_higher=True, is_pairwise=True),
    ImageMetric("density", "density", "density", is_better_higher=True, is_pairwise=True),
    ImageMetric("coverage", "coverage", "coverage", is_better_higher=True, is_pairwise=True),
)
RANGES = [
    *within(2, MOST_IMAGES, "num_images", "sweep_images"),
    *within(1, MOST_IMAGES, "sweep_top", "batch_size", "samples_each"),
    *within(1, MOST_PIXELS, "img_size"),
    *within(0, 2**63 - 1, "seed"),
    ("max_features", lambda v: v >= 4, "at least 4"),  # three neighbours of each
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how far generated images are from real ones: FID and others."""

    model: str | None = None
    """Source of the images (required, or --images): a pipeline folder, a run, a checkpoint, owner/name of the Hub."""
    images: str | None = None
    """Images to measure in place of a model's (default: none): as --data_path of training, or an .npz with arr_0."""
    reference: str | None = None
    """The real images: whatever --data_path of training may be; or statistics, an .npz that --make_reference wrote, or
    ADM's or JiT's (required)."""
    split: str | None = None
    """Split of the reference's images, or of the pairs, where there are several: test, train+test, all, ... (default:
    train)."""
    held_out: str | None = None
    """Real images that the model was not trained on, as --data_path (default: none): measures memorization, by the
    nearest of --reference, which are then all of the training's."""
    held_out_split: str | None = None
    """Split of these where there are several, such as test (default: train)."""
    pairs: str | None = None
    """Images, as --data_path of training, for a model that was trained with a condition (default: none): it makes each
    from its condition, and PSNR, SSIM and MAE are measured against it, beside those of the untouched condition."""
    condition_from: str | None = None
    """What makes the conditions of --pairs, such as downscale:4 (default: what the data brings, or as in training)."""
    condition_path: str | None = None
    """Folder with the condition of each image of --pairs, as in training (default: none)."""
    condition_column: str | None = None
    """Column of the conditions of --pairs, as in training (default: that of the training, if any)."""
    image_column: str | None = None
    """Column of the images of --pairs, or of --reference (default: the one that holds images)."""
    label_column: str | None = None
    """Column of the labels of --pairs, or of --reference (default: label, cls, ... where present)."""
    label_separator: str | None = None
    """What stands between labels in the cells of label_column, as in training (default: a cell is one label)."""
    raw_shape: tuple[int, ...] = ()
    """Shape of images of --pairs, or of --reference, that are bare bytes, as in training (default: none are)."""
    raw_dtype: RawType | None = None
    """Type of their numbers, as in training (default: none; required with raw_shape)."""
    samples_each: int = 1
    """Images made of each condition; of several their mean is scored too."""
    ema: tuple[str, ...] = ()
    """Averaged weights of a run or checkpoint: a decay, "model" for the weights themselves (default: those of the
    pipeline folder, or the first average); several or "all" for a sweep."""
    ema_width: tuple[str, ...] = ()
    """Relative widths, 0.001 or more and below 0.288, of averages to make of those that a training with
    --average_snapshots stored, such as 0.05 (default: none is made); several for a sweep: 0.05,0.1 or start:stop:step,
    0.02:0.25:0.02; beside those of --ema."""
    guide: str | None = None
    """A worse model of the same data, as --model: guidance leads away from it (default: none, guidance leads away from
    images of no class)."""
    features: str = INCEPTION
    """The network to compare by: inception (FID, sFID, Inception Score, KID, precision and others), or
    efficientnet_lite0 (fd_efficientnet_lite0 and others; its weights come with a package, without a download)."""
    feature_weights: str | None = None
    """File of the network's weights (default: torch hub's cache, downloaded if they are not there)."""
    metrics: tuple[str, ...] = ()
    """Names: fid, sfid, inception_score, kid; or, with any features, fd, kd, precision, recall, density, coverage
    (default: all that the features and the reference allow). With --pairs: psnr, ssim, mae (the
    default), lpips, and fd beside them."""
    num_images: int = 50_000
    """Number of images to generate; image n is of class n % classes, or has the numbers and labels of one of the
    reference's images. Of --pairs so many at most."""
    batch_size: int = 64
    """Images that a process works on together."""
    img_size: int | tuple[int, int] | None = None
    """Side in pixels, or height and width, to crop images to (default: the model's, or that of the images)."""
    max_features: int = 10_000
    """Number of images, drawn at random, to compare one by one for KID, precision, recall, density and coverage."""
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
    """Solver of the ODE, heun, euler, ab2 or etd2 (default: the pipeline's own); several for a sweep."""
    time_shift: tuple[str, ...] = ()
    """1: equal steps; above it they are finer near the noise (default: the pipeline's own); several for a sweep."""
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
    """Precision of the model (default: accelerate's configuration, else what is faster on this device)."""
    compile: bool = False
    """torch.compile each block: faster after a slower start."""
    make_reference: str | None = None
    """Write the statistics of --reference to this .npz, a --reference of later; needs no model (default: none)."""
    few_on_card: bool = False
    """Show results of so few images that they say little, too, on the pipeline folder's model card."""
    output: str | None = None
    """JSON file that the results are added to (default: evaluation.json in the model's folder, of a
    checkpoint in its run's)."""


def check(config: EvaluateConfig) -> None:
    """Raise `UserError` for settings that are missing, out of range, or contradict each other."""
    lookup(FEATURES, config.features, "features")
    for flag in ("metrics", *FLAGS):
        if (value := getattr(config, flag)) and not words(value):
            raise UserError("names nothing: give some, or leave the flag out.", about=flag, value=" ".join(value))
    check_ranges(vars(config), RANGES)
    if rule := problem_of_separator(config.label_separator, config.label_column):
        raise UserError(rule, about="label_separator", value=config.label_separator)
    if problem := problem_of_raw(config.raw_shape, config.raw_dtype):
        raise UserError(problem[1], about=problem[0], value=shown(getattr(config, problem[0])))
    if config.pairs is not None:
        return _check_pairs(config)
    for flag, otherwise in (*((name, None) for name in CONDITIONS), ("samples_each", 1)):
        if (value := getattr(config, flag)) != otherwise:
            raise UserError("is for conditions: add --pairs.", about=flag, value=value)
    chosen = chosen_metrics(config.features, config.metrics)
    if config.reference is None:
        raise UserError("not given: name the real images, or a file of their statistics.", about="reference")
    if config.model is not None and config.images is not None:
        raise UserError("does not go with --model: give the one or the other.", about="images", value=config.images)
    if config.model is None and config.images is None and config.make_reference is None:
        raise UserError("not given: name what makes the images, or measure others with --images.", about="model")
    for flag, what in (("split", "splits"), *((name, "columns") for name in READING)):
        if (value := getattr(config, flag)) not in (None, ()) and config.reference.endswith(".npz"):
            raise UserError(f"a file as --reference has no {what}: leave it out.", about=flag, value=shown(value))
    _check_held_out(config)
    if config.label_column is not None and config.model is None:
        rule = "says which labels --model is given, and there is none: leave it out."
        raise UserError(rule, about="label_column", value=config.label_column)
    if config.make_reference is not None and not config.make_reference.endswith(".npz"):
        raise UserError("must end in .npz.", about="make_reference", value=config.make_reference)
    axes_of(config)
    for flag in FLAGS:
        if (value := getattr(config, flag)) and config.model is None:
            rule = "says how --model makes images, which is not given: leave it out."
            raise UserError(rule, about=flag, value=" ".join(value))
    if config.select is not None and chosen_metrics(config.features, (config.select,), "select")[0] not in chosen:
        rule = f"is not among --metrics {','.join(config.metrics)}: add it."
        raise UserError(rule, about="select", value=config.select)


def _check_held_out(config: EvaluateConfig) -> None:
    """Raise `UserError` for held-out images where they have nothing to be compared with."""
    held_out, axes = config.held_out, axes_of(config)
    if held_out is None:
        if config.held_out_split is not None:
            raise UserError("is of --held_out: add that.", about="held_out_split", value=config.held_out_split)
        return
    rule = None
    if config.reference.endswith(".npz"):
        rule = "is compared with the training images as --reference, which is a file: name the images."
    elif (held_out, config.held_out_split) == (config.reference, config.split):
        rule = "names the same images as --reference: add --held_out_split, or give others."
    elif config.model is None and config.images is None:
        rule = "is compared with images of --model or --images: give one of them."
    elif ALL in axes["ema"] or any(len(values) > 1 for values in axes.values()):
        rule = "does not go with a sweep: measure the setting that wins."
    if rule:
        raise UserError(rule, about="held_out", value=held_out)


def reading_of(config: EvaluateConfig) -> dict[str, Any]:
    """Return how the data of `--pairs`, or of `--reference`, are read, as `open_images` takes it."""
    return {name: getattr(config, name) for name in READING}


def _check_pairs(config: EvaluateConfig) -> None:
    """Raise `UserError` for settings that do not go with `--pairs`."""
    chosen_scores(config.metrics, config.features)
    given = [name for name in CONDITIONS if getattr(config, name) is not None]
    if len(given) > 1:
        rule = f"does not go with --{given[0]}: give only one of them."
        raise UserError(rule, about=given[1], value=getattr(config, given[1]))
    if config.model is None:
        raise UserError("not given: name the model that is shown the conditions.", about="model")
    for flag in ("images", "reference", "make_reference", "select", "held_out", "held_out_split"):
        if (value := getattr(config, flag)) is not None:
            rule = "does not go with --pairs, whose images are what is compared with: leave it out."
            raise UserError(rule, about=flag, value=value)
    for flag, values in axes_of(config).items():
        if len(values) > 1 or values == [ALL]:
            rule = "must be one value with --pairs: there is no sweep."
            flag = "ema_width" if flag == "ema" and config.ema_width else flag
            raise UserError(rule, about=flag, value=" ".join(getattr(config, flag)))


def chosen_scores(names: tuple[str, ...], features: str) -> tuple[tuple[str, ...], str | None]:
    """Return the scores of pairs that `--metrics` names, else the usual ones, and the Fréchet distance's if named.

    Raises `UserError` for other names.
    """
    (distance, metric), *_ = metric_names(features).items()
    table = PAIR_SCORES | {metric.short: distance, distance: distance}
    wanted = {name: lookup(table, name, "metrics") for name in words(names)}
    scores = tuple(name for name in wanted if name in PAIR_SCORES)
    return scores or USUAL_SCORES, distance if distance in wanted.values() else None


def metric_names(features: str) -> dict[str, ImageMetric]:
    """Return the metrics of these features by the names of their results, the Fréchet distance first."""
    if features == INCEPTION:
        return {metric.inception: metric for metric in METRICS}
    return {f"{metric.other}_{features}": metric for metric in METRICS if metric.other}


def chosen_metrics(features: str, names: tuple[str, ...], about: str = "metrics") -> tuple[str, ...]:
    """Return the results' names of the metrics that the setting `about` names, all of these features' for none."""
    table, names = metric_names(features), words(names)
    aliases = {metric.short: name for name, metric in table.items()} | {name: name for name in table}
    for name in names:
        if name in metric_names(INCEPTION) and name not in aliases:
            remedy = f"use {next(iter(table))}, or --features {INCEPTION}"
            raise UserError(f"is measured with the Inception network alone: {remedy}.", about=about, value=name)
    chosen = [lookup(aliases, name, about) for name in names] or table
    return tuple(name for name in table if name in chosen)
