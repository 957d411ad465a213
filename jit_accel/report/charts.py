"""Which charts a page has and what is in them; how they look is charts.js's business.

A chart is a JSON object: `id`, `section`, `title`, `note`, `scale` of the y axis (log or linear), `unit`, `series`, and
where it has them `thresholds` and `events`. A series is `{run, name, style, x, y}`, x in optimizer steps; one that can
be smoothed has the number of values `n` behind each y, and `raw`, the curve's extremes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jit_accel.report.curves import EVAL, LOSS_BY_T, Curve, rounded
from jit_accel.report.runs import Run

# The share of the run that a smoothed curve remembers before the reader moves the slider.
SMOOTHING = 0.02
# Further than this factor from the curve, a threshold would press it flat.
MAX_THRESHOLD_RATIO = 10
UNGUIDED = "_unguided"


@dataclass(frozen=True)
class Line:
    """A curve of a chart. `style` is smooth (raw values behind it), line or points."""

    key: str
    name: str
    style: str = "line"


@dataclass(frozen=True)
class Chart:
    """A chart over the steps. `thresholds` names the settings that are drawn into it, `events` the kinds of event."""

    id: str
    section: str
    title: str
    note: str
    lines: tuple[Line, ...]
    scale: str = "linear"
    unit: str = ""
    thresholds: tuple[tuple[str, str], ...] = ()
    events: tuple[str, ...] = ()


CHARTS = (
    Chart(
        "loss",
        "loss",
        "Training and validation",
        "Faint: each optimizer step. Strong: its running mean",
        (
            Line("train/loss", "train", "smooth"),
            Line("train/epoch_loss", "train, epoch", "points"),
            Line("val/loss", "validation", "points"),
            Line("ema/val_loss", "validation, EMA", "points"),
        ),
        scale="log",
        events=("loss_not_finite", "loss_jump", "loss_flat"),
    ),
    Chart(
        "grad_norm",
        "optimization",
        "Gradient norm",
        "L2 over all parameters, before clipping",
        (Line("train/grad_norm", "gradient norm", "smooth"),),
        scale="log",
        thresholds=(("health_max_grad_norm", "exploding above"), ("health_min_grad_norm", "vanishing below")),
        events=("grad_exploding", "grad_vanishing"),
    ),
    Chart(
        "learning_rate",
        "optimization",
        "Learning rate",
        "What the optimizer was given",
        (Line("train/learning_rate", "learning rate"),),
    ),
    Chart(
        "update_ratio",
        "optimization",
        "Update ratio",
        "Length of a step over the length of the weights",
        (Line("train/update_ratio", "update ratio", "smooth"),),
        scale="log",
    ),
    Chart(
        "images_per_second",
        "speed",
        "Throughput",
        "All processes together",
        (Line("perf/images_per_second", "images/s", "smooth"),),
        unit="images/s",
    ),
    Chart(
        "step_time",
        "speed",
        "Step time",
        "Seconds for an optimizer step",
        (Line("perf/step_time", "step time", "smooth"),),
        unit="s",
    ),
    Chart(
        "use",
        "speed",
        "Use of the device",
        "MFU: the model's FLOP/s over the device's peak. Waiting: share of the time lost to data",
        (Line("perf/mfu", "MFU", "smooth"), Line("data/wait_fraction", "waiting for data", "smooth")),
        unit="%",
        thresholds=(("health_max_wait", "starving above"),),
        events=("data_starving",),
    ),
    Chart(
        "memory",
        "speed",
        "Memory",
        "Peak of the device, and of the data workers of a process",
        (Line("perf/peak_memory_gib", "device"), Line("data/worker_rss_gib", "data workers")),
        unit="GiB",
    ),
    Chart(
        "epoch_time",
        "speed",
        "Time per epoch",
        "Seconds, samples and validation included",
        (Line("train/epoch_time", "time per epoch", "points"),),
        unit="s",
    ),
    Chart(
        "bad_images",
        "speed",
        "Broken images",
        "Images that could not be decoded and were skipped",
        (Line("data/bad_images", "broken images"),),
    ),
)


def charts_of(runs: list[Run]) -> list[dict]:
    """The charts that have data, in the order of the page."""
    charts = [steps_chart(chart, runs) for chart in [*CHARTS, *eval_charts(runs), ema_chart(runs)]]
    order = ("loss", "evaluation", "by_t", "optimization", "speed")
    charts += [loss_by_t_chart(runs), profile_chart(runs)]
    return sorted((chart for chart in charts if chart["series"]), key=lambda chart: order.index(chart["section"]))


def steps_chart(chart: Chart, runs: list[Run]) -> dict:
    series = []
    for index, run in enumerate(runs):
        for line in chart.lines:
            curve = run.measurements.curve(line.key)
            if curve and not (line.key == "data/bad_images" and curve.high == 0):
                series.append(steps_series(curve, index, line, factor=100 if chart.unit == "%" else 1))
    return {
        "id": chart.id,
        "section": chart.section,
        "title": chart.title,
        "note": chart.note,
        "scale": chart.scale,
        "unit": chart.unit,
        "series": series,
        "thresholds": thresholds_of(chart, runs) if series else [],
        "events": events_of(chart, runs) if series else [],
    }


def steps_series(curve: Curve, run: int, line: Line, factor: float = 1) -> dict:
    points = curve.means()
    if factor != 1:
        points["y"] = [None if y is None else rounded(y * factor) for y in points["y"]]
    series = {"run": run, "name": line.name, "style": line.style, **points}
    if line.style == "smooth":
        series["raw"] = curve.extremes()
    else:
        del series["n"]
    return series


def thresholds_of(chart: Chart, runs: list[Run]) -> list[dict]:
    """The health thresholds that apply, and whether each is near enough to the curves to be drawn."""
    factor = 100 if chart.unit == "%" else 1
    curves = [run.measurements.curve(line.key) for run in runs for line in chart.lines]
    low = min(curve.low for curve in curves if curve) * factor
    high = max(curve.high for curve in curves if curve) * factor
    found = {}
    for setting, name in chart.thresholds:
        for run in runs:
            value = run.settings.get(setting)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                value *= factor
                is_near = low / MAX_THRESHOLD_RATIO <= value <= high * MAX_THRESHOLD_RATIO
                found[setting, value] = {"name": name, "value": rounded(value), "is_drawn": is_near}
    return list(found.values())


def events_of(chart: Chart, runs: list[Run]) -> list[dict]:
    """Steps of the health events that belong into this chart."""
    return [
        {"run": index, "name": event_name(kind), "x": event.steps.means()["x"]}
        for index, run in enumerate(runs)
        for kind, event in run.measurements.events.items()
        if kind in chart.events
    ]


def event_name(kind: str) -> str:
    """A kind of health event as a heading: `grad_exploding` as Gradient exploding."""
    return re.sub(r"\bgrad\b", "gradient", kind.replace("_", " ")).capitalize()


def ema_chart(runs: list[Run]) -> Chart:
    keys = sorted({key for run in runs for key in run.measurements.curves if re.fullmatch("ema/.+/distance", key)})
    return Chart(
        "ema",
        "optimization",
        "Distance of the averages",
        "From the weights to their moving average, over the length of the weights; by decay.",
        tuple(Line(key, key.removeprefix("ema/").removesuffix("/distance")) for key in keys),
        scale="log",
    )


def eval_charts(runs: list[Run]) -> list[Chart]:
    """A chart for each metric of generated images, with and without guidance."""
    keys = {key for run in runs for key in run.measurements.curves if key.startswith(EVAL)}
    metrics = sorted({key.removeprefix(EVAL).removesuffix(UNGUIDED) for key in keys})
    return [
        Chart(
            f"eval_{metric}",
            "evaluation",
            metric_name(metric),
            "Of images made with the averaged weights, against the reference",
            (
                Line(f"{EVAL}{metric}", "guided", "points"),
                Line(f"{EVAL}{metric}{UNGUIDED}", "without guidance", "points"),
            ),
        )
        for metric in metrics
    ]


def metric_name(metric: str) -> str:
    """A key as a heading: `fid` as FID, `fd_efficientnet_lite0` as Fréchet distance, efficientnet_lite0."""
    kind, _, features = metric.partition("_")
    names = {"fid": "FID", "sfid": "sFID", "kid": "KID", "fd": "Fréchet distance"}
    if kind not in names:
        return metric.replace("_", " ").capitalize()
    return f"{names[kind]}, {features}" if features else names[kind]


def bins_of(run: Run) -> list[tuple[str, float]]:
    """Keys of the run's bins of t, and their middles."""
    found = []
    for key in run.measurements.curves:
        match = re.fullmatch(rf"{LOSS_BY_T}(\d\.\d+)-(\d\.\d+)", key)
        if match and run.measurements.curve(key):
            found.append((key, (float(match[1]) + float(match[2])) / 2))
    return sorted(found, key=lambda found: found[1])


def loss_by_t_chart(runs: list[Run]) -> dict:
    """The loss of each bin of t over the steps; of several runs, one bin at a time."""
    series = []
    for index, run in enumerate(runs):
        for key, middle in bins_of(run):
            name = key.removeprefix(LOSS_BY_T).replace("-", "–")
            points = {**run.measurements.curves[key].means(), "t": rounded(middle)}
            series.append({"run": index, "name": name, "style": "bin", **points})
    return {
        "id": "loss_by_t",
        "section": "by_t",
        "title": "Loss by t, over time",
        "note": "Running mean of each tenth of t. t near 0 is nearly noise, t near 1 nearly the image",
        "scale": "log",
        "unit": "",
        "series": series,
    }


def profile_chart(runs: list[Run]) -> dict:
    """The latest loss over t."""
    series = []
    for index, run in enumerate(runs):
        bins = bins_of(run)
        ends = [run.measurements.curves[key].smoothed_end(SMOOTHING * run.step) for key, _ in bins]
        if bins:
            names = [key.removeprefix(LOSS_BY_T).replace("-", "–") for key, _ in bins]
            middles = [rounded(middle) for _, middle in bins]
            values = [rounded(end) for end in ends]
            series.append({"run": index, "name": "loss", "style": "profile", "x": middles, "y": values, "bins": names})
    return {
        "id": "profile",
        "section": "by_t",
        "title": "Loss by t, latest",
        "note": "Where along t the loss is, at the end of the curves",
        "scale": "log",
        "unit": "",
        "series": series,
    }
