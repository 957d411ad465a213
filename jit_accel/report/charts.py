"""The charts of a page and their curves; how they look is charts.js's business.

A chart is a JSON object: `id`, `section`, `title`, `note`, `scale` of the y axis (log or linear), `unit`, `series`,
`thresholds` and `events`. A series is `{run, name, style, x, y}`, x in optimizer steps; one that can be smoothed has
the number of values `n` behind each y, and `raw`, the curve's extremes.
"""

import re
from operator import itemgetter
from typing import NamedTuple

from jit_accel.monitor.health import KINDS
from jit_accel.monitor.metric_table import BAD_IMAGES, LOSS_BY_T, METRICS, UNGUIDED, Metric, metric_of, part_of
from jit_accel.report.runs import Curve, Run, rounded

# The share of the run that a smoothed curve remembers before the reader moves the slider.
SMOOTHING = 0.02
# Further than this factor from the curve, a threshold would press it flat.
MAX_THRESHOLD_RATIO = 10
OF_IMAGES = "Of images made with the averaged weights, against the reference"
OF_PAIRS = "Of images made of held-out conditions with the averaged weights; untouched: the conditions themselves"
ONCE_A_WHILE = ("epoch", "val", "eval")  # rows of metrics that are drawn as points


class Chart(NamedTuple):
    """A chart over the steps."""

    id: str
    section: str
    title: str
    note: str
    scale: str = "linear"


CHARTS = (
    Chart("loss", "loss", "Training and validation", "Faint: each optimizer step. Strong: its running mean", "log"),
    Chart("aux", "loss", "Further losses", "Of the prediction as an image, before their weights", "log"),
    Chart("grad_norm", "optimization", "Gradient norm", "L2 over all parameters, before clipping", "log"),
    Chart("learning_rate", "optimization", "Learning rate", "What the optimizer was given"),
    Chart("update_ratio", "optimization", "Update ratio", "Length of a step over the length of the weights", "log"),
    Chart(
        "ema",
        "optimization",
        "Distance of the averages",
        "From the weights to their moving average, over the length of the weights; by decay.",
        "log",
    ),
    Chart("images_per_second", "speed", "Throughput", "All processes together"),
    Chart("step_time", "speed", "Step time", "Seconds for an optimizer step"),
    Chart(
        "use",
        "speed",
        "Use of the device",
        "MFU: the model's FLOP/s over the device's peak. Waiting: share of the time lost to data",
    ),
    Chart("memory", "speed", "Memory", "Peak of the device, and of the data workers of a process"),
    Chart("epoch_time", "speed", "Time per epoch", "Seconds, samples and validation included"),
    *(
        Chart(f"pair_{name}", "evaluation", title, OF_PAIRS)
        for name, title in (("psnr", "PSNR in dB"), ("ssim", "SSIM"), ("mae", "Mean absolute error"))
    ),
    Chart("bad_images", "speed", "Broken images", "Images that could not be decoded and were skipped"),
)
BY_T = Chart(
    "loss_by_t",
    "by_t",
    "Loss by t, over time",
    "Running mean of each tenth of t. t near 0 is nearly noise, t near 1 nearly the image",
    "log",
)
PROFILE = Chart("profile", "by_t", "Loss by t, latest", "Where along t the loss is, at the end of the curves", "log")


def charts_of(runs: list[Run]) -> list[dict]:
    """Return the charts that have data."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.curves):
        if chart := chart_of(key):
            found.setdefault(chart, []).append(key)
    of_images = sorted(id for id in found if id.startswith("eval_"))
    charts = [*CHARTS, *(Chart(id, "evaluation", title_of(found[id][0]), OF_IMAGES) for id in of_images)]
    drawn = [steps_chart(chart, sorted(found[chart.id], key=place_of), runs) for chart in charts if chart.id in found]
    return [chart for chart in [*drawn, *by_t_charts(runs)] if chart["series"]]


def chart_of(key: str) -> str:
    """Return the id of the chart that a curve belongs into; "" for none."""
    metric = metric_of(key)
    return metric.chart.replace("{name}", part_of(key, metric.key) or "").removesuffix(UNGUIDED)


def place_of(key: str) -> tuple[int, str]:
    """Return the place of a key among others: as their rows stand in the table."""
    return list(METRICS).index(metric_of(key).key), key


def title_of(key: str) -> str:
    """Return the title of a metric; of one that has no row of its own the end of its key as a heading."""
    metric = metric_of(key)
    if (part := part_of(key, metric.key)) is None:
        return metric.title
    return part.removesuffix(UNGUIDED).replace("_", " ").capitalize()


def name_of(key: str, metric: Metric) -> str:
    """Return the name of a curve in its chart."""
    if metric.when == "eval":
        return "without guidance" if key.endswith(UNGUIDED) else "guided"
    return part_of(key, metric.key) or metric.title


def steps_chart(chart: Chart, keys: list[str], runs: list[Run]) -> dict:
    unit = metric_of(keys[0]).unit
    factor, unit = (100, "%") if unit == "share" else (1, unit)
    series, curves = [], []
    for index, run in enumerate(runs):
        for key in keys:
            curve = run.curve(key)
            if not curve or (key == BAD_IMAGES and curve.high == 0):
                continue
            metric, points = metric_of(key), curve.means(factor)
            style = "smooth" if metric.thinned == "extremes" else "points" if metric.when in ONCE_A_WHILE else "line"
            if style == "smooth":
                points["raw"] = curve.extremes(factor)
            else:
                del points["n"]
                if chart.scale == "log":  # where an average is the weights themselves, say
                    points["y"] = [y or None for y in points["y"]]
            series.append({"run": index, "name": name_of(key, metric), "style": style, **points})
            curves.append(curve)
    kinds = {name: kind for name, kind in KINDS.items() if METRICS[kind.metric].chart == chart.id}
    events = [
        {"run": index, "name": event_name(kind), "x": event.means()["x"]}
        for index, run in enumerate(runs)
        for kind, event in run.events.items()
        if kind in kinds
    ]
    limits = [kind.limit for kind in kinds.values() if kind.limit]
    thresholds = thresholds_of(limits, curves, runs, factor) if curves else []
    return {**chart._asdict(), "unit": unit, "thresholds": thresholds, "events": events, "series": series}


def thresholds_of(limits: list[tuple[str, ...]], curves: list[Curve], runs: list[Run], factor: float) -> list[dict]:
    """Return the health thresholds that apply, each with `is_drawn`: it is near enough to the curves."""
    low, high = min(curve.low for curve in curves) * factor, max(curve.high for curve in curves) * factor
    found = {}
    for setting, name in limits:
        for run in runs:
            value = run.settings.get(setting)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                value *= factor
                is_near = low / MAX_THRESHOLD_RATIO <= value <= high * MAX_THRESHOLD_RATIO
                found[setting, value] = {"name": name, "value": rounded(value), "is_drawn": is_near}
    return list(found.values())


def event_name(kind: str) -> str:
    """Return a kind of health event as a heading: `grad_exploding` as Gradient exploding."""
    return re.sub(r"\bgrad\b", "gradient", kind.replace("_", " ")).capitalize()


def bins_of(run: Run) -> list[tuple[float, str, Curve]]:
    """Return the run's bins of t, in order: middle, name and curve of each."""
    found = []
    for key in run.curves:
        ends = re.fullmatch(r"(\d\.\d+)-(\d\.\d+)", part_of(key, LOSS_BY_T) or "")
        if ends and (curve := run.curve(key)):
            found.append((rounded((float(ends[1]) + float(ends[2])) / 2), f"{ends[1]}–{ends[2]}", curve))
    return sorted(found, key=itemgetter(0))


def by_t_charts(runs: list[Run]) -> list[dict]:
    """Return the loss of each bin of t over the steps (of several runs, one bin at a time is shown), and the latest."""
    over_time, latest = [], []
    for index, run in enumerate(runs):
        if bins := bins_of(run):
            for middle, name, curve in bins:
                over_time.append({"run": index, "name": name, "style": "bin", **curve.means(), "t": middle})
            x, names, curves = zip(*bins)
            y = [rounded(curve.smoothed_end(SMOOTHING * run.step)) for curve in curves]
            latest.append({"run": index, "name": "loss", "style": "profile", "x": x, "y": y, "bins": names})
    more = {"unit": "", "thresholds": [], "events": []}
    return [{**chart._asdict(), **more, "series": lines} for chart, lines in ((BY_T, over_time), (PROFILE, latest))]
