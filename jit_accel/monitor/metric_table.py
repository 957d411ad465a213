"""Every metric of a run, one row each; files, trackers, report, progress and documentation read this table."""

import re
from dataclasses import dataclass

UNGUIDED = "_unguided"  # behind the key of a metric of images made without guidance
UNTOUCHED = "_untouched"  # behind the key of a score of conditions themselves


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    key: str  # in `metrics.jsonl` and at the trackers; a part in braces stands for several keys
    title: str  # of its curve
    # Which rows have it: every "step", the last one of each "interval", the last one of an "epoch", those that the
    # holdout was measured at ("val"), those that images were generated at ("eval"), or "sample".
    when: str
    chart: str = ""  # the chart of the report with its curve
    unit: str = ""  # a "share" is 0 to 1 and shown in percent
    better: str = ""  # "lower" or "higher", where one is
    thinned: str = "mean"  # of neighbouring steps the report keeps their "mean", that and "extremes", or "nothing"


METRICS: dict[str, Metric] = {}


def row(key: str, title: str, when: str, **more: str) -> str:
    """Add a row to the table. Returns its key."""
    METRICS[key] = Metric(key, title, when, **more)
    return key


TRAIN_LOSS = row("train/loss", "train", "step", chart="loss", thinned="extremes")
EPOCH_LOSS = row("train/epoch_loss", "train, epoch", "epoch", chart="loss", better="lower")
BEST_LOSS = row("train/best_loss", "best epoch", "epoch", better="lower")
VAL_LOSS = row("val/loss", "validation", "val", chart="loss", better="lower")
EMA_VAL_LOSS = row("ema/val_loss", "validation, EMA", "val", chart="loss", better="lower")
AUX_LOSS = row("train/aux/{name}", "{name}", "step", chart="aux", thinned="extremes")
for _name, _title, _better in (("psnr", "PSNR in dB", "higher"), ("ssim", "SSIM", "higher"), ("mae", "MAE", "lower")):
    row(f"val/{_name}", _title, "val", chart=f"pair_{_name}", better=_better)
    row(f"val/{_name}{UNTOUCHED}", f"{_title}, untouched", "val", chart=f"pair_{_name}")
PAIR_SCORE = "val/{name}"  # the pattern of their keys
LOSS_BY_T = row("train/loss_by_t/{bin}", "{bin}", "interval", chart="loss_by_t")

for _name, _title, _better in (
    ("fid", "FID", "lower"),
    ("inception_score", "Inception score", "higher"),
    ("fd_efficientnet_lite0", "Fréchet distance, efficientnet_lite0", "lower"),
):
    for _ending in ("", UNGUIDED):
        row(f"eval/{_name}{_ending}", _title, "eval", chart=f"eval_{_name}", better=_better)
EVAL = row("eval/{name}", "{name}", "eval", chart="eval_{name}")  # of further features

LEARNING_RATE = row("train/learning_rate", "learning rate", "step", chart="learning_rate")
GRAD_NORM = row("train/grad_norm", "gradient norm", "step", chart="grad_norm", thinned="extremes")
UPDATE_RATIO = row("train/update_ratio", "update ratio", "interval", chart="update_ratio", thinned="extremes")
EMA_DISTANCE = row("ema/{decay}/distance", "{decay}", "interval", chart="ema")
AUTO_DECAY = row("ema/auto/decay", "decay of auto", "interval")

EPOCH = row("train/epoch", "epoch", "step")
IMAGES_SEEN = row("train/images_seen", "images seen", "step", thinned="nothing")
TIME = row("train/time", "time of day", "step", unit="s", thinned="nothing")  # since 1970; a tracker's own where it can
ELAPSED = row("train/elapsed", "time so far", "interval", unit="s")
EPOCH_TIME = row("train/epoch_time", "time per epoch", "epoch", chart="epoch_time", unit="s")
SAMPLES_PER_SECOND = row("train/samples_per_second", "images/s", "epoch", unit="images/s")

IMAGES_PER_SECOND = row(
    "perf/images_per_second", "images/s", "interval", chart="images_per_second", unit="images/s", thinned="extremes"
)
STEP_TIME = row("perf/step_time", "step time", "interval", chart="step_time", unit="s", thinned="extremes")
MFU = row("perf/mfu", "MFU", "interval", chart="use", unit="share", thinned="extremes")
PEAK_MEMORY = row("perf/peak_memory_gib", "device", "interval", chart="memory", unit="GiB")
WAIT_FRACTION = row("data/wait_fraction", "waiting for data", "interval", chart="use", unit="share", thinned="extremes")
WORKER_MEMORY = row("data/worker_rss_gib", "data workers", "interval", chart="memory", unit="GiB")
BAD_IMAGES = row("data/bad_images", "broken images", "interval", chart="bad_images")

HEALTH = row("health/{kind}", "{kind}", "step", thinned="nothing")  # the kinds stand in health.py
SAMPLES = row("samples/grid", "samples", "sample", thinned="nothing")
SAMPLES_OF_CLASS = row("samples/class/{name}", "{name}", "sample", thinned="nothing")


def metric_of(key: str) -> Metric | None:
    """Return the row of a key, its own one before one that stands for several; None for a key of somebody else."""
    if key in METRICS:
        return METRICS[key]
    return next((metric for metric in METRICS.values() if part_of(key, metric.key) is not None), None)


def part_of(key: str, pattern: str) -> str | None:
    """Return the text of `key` in the place of the braces of `pattern`, such as `auto` of `ema/auto/distance`."""
    before, brace, rest = pattern.partition("{")
    found = brace and re.fullmatch(re.escape(before) + "(.+)" + re.escape(rest.partition("}")[2]), key)
    return found[1] if found else None
