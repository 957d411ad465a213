"""The charts of a page and their curves; how they look is charts.js's business.

A chart is a JSON object: `id`, `section`, `title`, `note`, `scale` of the y axis (log or linear), `unit`, `series`,
`thresholds` and `events`. A series is `{run, name, style, x, y}`, x in optimizer steps; one that can be smoothed has
the number of values `n` behind each y, and `raw`, the curve's extremes.
"""

import re
from dataclasses import asdict, dataclass

from jit_accel.monitor.metric_table import BAD_IMAGES, LOSS_BY_T, METRICS, UNGUIDED, Metric, metric_of, part_of
from jit_accel.report.curves import rounded
from jit_accel.report.runs import Run

# The share of the run that a smoothed curve remembers before the reader moves the slider.
SMOOTHING = 0.02
# Further than this factor from the curve, a threshold would press it flat.
MAX_THRESHOLD_RATIO = 10
OF_IMAGES = "Of images made with the averaged weights, against the reference"
ONCE_A_WHILE = ("epoch", "val", "eval")  # rows of metrics that are drawn as points


@dataclass(frozen=True)
class Chart:
    """A chart over the steps. `thresholds` names the settings that are drawn into it, `events` the kinds of event."""

    id: str
    section: str
    title: str
    note: str
    scale: str = "linear"
    thresholds: tuple[tuple[str, str], ...] = ()
    events: tuple[str, ...] = ()


CHARTS = (
    Chart(
        "loss",
        "loss",
        "Training and validation",
        "Faint: each optimizer step. Strong: its running mean",
        "log",
        events=("loss_not_finite", "loss_jump", "loss_flat"),
    ),
    Chart(
        "grad_norm",
        "optimization",
        "Gradient norm",
        "L2 over all parameters, before clipping",
        "log",
        thresholds=(("health_max_grad_norm", "exploding above"), ("health_min_grad_norm", "vanishing below")),
        events=("grad_exploding", "grad_vanishing"),
    ),
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
        thresholds=(("health_max_wait", "starving above"),),
        events=("data_starving",),
    ),
    Chart("memory", "speed", "Memory", "Peak of the device, and of the data workers of a process"),
    Chart("epoch_time", "speed", "Time per epoch", "Seconds, samples and validation included"),
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
    for key in dict.fromkeys(key for run in runs for key in run.measurements.curves):
        if chart := chart_of(key):
            found.setdefault(chart, []).append(key)
    of_images = sorted(id for id in found if id.startswith("eval_"))
    charts = [*CHARTS, *(Chart(id, "evaluation", title_of(found[id][0]), OF_IMAGES) for id in of_images)]
    drawn = [steps_chart(chart, in_order(found[chart.id]), runs) for chart in charts if chart.id in found]
    return [chart for chart in [*drawn, *by_t_charts(runs)] if chart["series"]]


def chart_of(key: str) -> str:
    """Return the id of the chart that a curve belongs into; "" for none."""
    metric = metric_of(key)
    part = part_of(key, metric.key) or ""
    return re.sub(r"\{\w+\}", lambda _: part, metric.chart).removesuffix(UNGUIDED)


def in_order(keys: list[str]) -> list[str]:
    """Sort keys as their rows stand in the table."""
    rows = list(METRICS)
    return sorted(keys, key=lambda key: (rows.index(metric_of(key).key), key))


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
    series = []
    for index, run in enumerate(runs):
        for key in keys:
            curve = run.measurements.curve(key)
            if not curve or (key == BAD_IMAGES and curve.high == 0):
                continue
            metric, points = metric_of(key), curve.means(factor)
            style = "smooth" if metric.thinned == "extremes" else "points" if metric.when in ONCE_A_WHILE else "line"
            if style == "smooth":
                points["raw"] = curve.extremes(factor)
            else:
                del points["n"]
            series.append({"run": index, "name": name_of(key, metric), "style": style, **points})
    if not series:
        return {"series": []}
    events = [
        {"run": index, "name": event_name(kind), "x": event.steps.means()["x"]}
        for index, run in enumerate(runs)
        for kind, event in run.measurements.events.items()
        if kind in chart.events
    ]
    more = {"unit": unit, "thresholds": thresholds_of(chart, keys, runs, factor), "events": events}
    return {**asdict(chart), **more, "series": series}


def thresholds_of(chart: Chart, keys: list[str], runs: list[Run], factor: float) -> list[dict]:
    """Return the health thresholds that apply, each with `is_drawn`: it is near enough to the curves."""
    curves = [curve for run in runs for key in keys if (curve := run.measurements.curve(key))]
    low, high = min(curve.low for curve in curves) * factor, max(curve.high for curve in curves) * factor
    found = {}
    for setting, name in chart.thresholds:
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


def bins_of(run: Run) -> list[tuple[float, str, str]]:
    """Return the run's bins of t: middle, name and key of each."""
    found = []
    for key in run.measurements.curves:
        ends = re.fullmatch(r"(\d\.\d+)-(\d\.\d+)", part_of(key, LOSS_BY_T) or "")
        if ends and run.measurements.curve(key):
            found.append((rounded((float(ends[1]) + float(ends[2])) / 2), f"{ends[1]}–{ends[2]}", key))
    return sorted(found)


def by_t_charts(runs: list[Run]) -> list[dict]:
    """Return the loss of each bin of t over the steps (of several runs, one bin at a time is shown), and the latest."""
    over_time, latest = [], []
    for index, run in enumerate(runs):
        for middle, name, key in bins_of(run):
            curve = run.measurements.curves[key]
            over_time.append({"run": index, "name": name, "style": "bin", **curve.means(), "t": middle})
        if bins := bins_of(run):
            x, names, keys = zip(*bins)
            y = [rounded(run.measurements.curves[key].smoothed_end(SMOOTHING * run.step)) for key in keys]
            latest.append({"run": index, "name": "loss", "style": "profile", "x": x, "y": y, "bins": names})
    return [{**asdict(chart), "unit": "", "series": lines} for chart, lines in ((BY_T, over_time), (PROFILE, latest))]
