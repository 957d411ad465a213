"""The words and numbers of a page: its head, health events and settings."""

import json
import re
from dataclasses import fields
from datetime import datetime, timezone
from math import nan

from markupsafe import Markup, escape

from jit_accel.config.settings import GROUPS, SETTINGS
from jit_accel.monitor import metric_table as metrics
from jit_accel.monitor.health import KINDS
from jit_accel.report.charts import SMOOTHING, event_name, title_of
from jit_accel.report.curves import Curve, Occurrences
from jit_accel.report.runs import Run

GROUP_TITLES = {"Optim": "Optimization", "Sample": "Samples", "Sheet": "Samples", "Eval": "Evaluation"}
UNKNOWN_KIND = "Not known to this version of the report."
WORSE_BELOW = {"grad_vanishing"}  # of other kinds the highest value is the worst
STATES = {
    "finished": "✓ Finished",
    "failed": "✗ Failed",
    "interrupted": "❙❙ Interrupted",
    "running": "▶ Running",
    "silent": "? Unfinished",
    "not started": "… Not started",
}


def facts(run: Run) -> list[str]:
    """Return model, size, data and devices, as far as they are known."""
    known = run.settings
    counts = {name: known[name] for name in known if is_count(known[name])}
    found = []
    if known.get("model"):
        parameters = f" ({short(counts['num_parameters'])} parameters)" if "num_parameters" in counts else ""
        found.append(f"{known['model']}{parameters}")
    if known.get("img_size"):
        found.append(f"{known['img_size']} px")
    if known.get("data_path"):
        images = f" ({counts['num_images']:,} images)" if "num_images" in counts else ""
        found.append(f"{known['data_path']}{images}")
    if "global_batch_size" in counts:
        found.append(f"global batch {counts['global_batch_size']:,}")
    if known.get("device"):
        found.append(f"{known.get('num_processes', 1)} × {known['device']}")
    return found


def progress(run: Run) -> list[str]:
    """Return step, epoch and times, as far as they are known."""
    parts = [f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")]
    if curve := run.measurements.curve(metrics.EPOCH):
        parts.append(f"epoch {curve.high:.2f}")
    step_time = run.measurements.curve(metrics.STEP_TIME)
    if run.state == "running" and run.total_steps and step_time:
        parts.append(f"{duration((run.total_steps - run.step) * step_time.latest)} to go")
    if run.updated is not None:
        parts.append(f"last row {datetime.fromtimestamp(run.updated, timezone.utc):%Y-%m-%d %H:%M} UTC")
    return parts


def numbers(run: Run) -> list[tuple[str, str, str]]:
    """Return name, value and remark of each tile."""
    curve_of = run.measurements.curve
    found = [("Loss", number(current_loss(run)), "running mean")]
    if best := best_epoch(run):
        found.append(("Best epoch", number(best.low), "mean loss of an epoch"))
    names = {metrics.VAL_LOSS: "Validation", metrics.EMA_VAL_LOSS: "Validation, EMA"}
    for key in sorted(run.measurements.curves):
        is_distance = metrics.metric_of(key).when == "eval" and metrics.metric_of(key).better != "higher"
        if is_distance and not key.endswith(metrics.UNGUIDED):
            names[key] = title_of(key)
    for key, name in names.items():
        if curve := curve_of(key):
            found.append((name, number(curve.latest), f"lowest {number(curve.low)}"))
    if speed := curve_of(metrics.IMAGES_PER_SECOND):
        mfu = curve_of(metrics.MFU)
        found.append(("Images/s", short(speed.latest), f"MFU {mfu.latest:.0%}" if mfu else "all processes"))
    elif speed := curve_of(metrics.SAMPLES_PER_SECOND):
        found.append(("Images/s", short(speed.latest), "last epoch"))
    return found


def findings(run: Run) -> str:
    """Return the kinds of its health events in a line."""
    return ", ".join(event_name(name).lower() for name in run.measurements.events) or "nothing noticed"


def current_loss(run: Run) -> float | None:
    curve = run.measurements.curve(metrics.TRAIN_LOSS)
    return curve.smoothed_end(SMOOTHING * run.step) if curve else None


def best_epoch(run: Run) -> Curve | None:
    return run.measurements.curve(metrics.BEST_LOSS, metrics.EPOCH_LOSS)


def run_cells(run: Run) -> list[str]:
    """Return a run's cells in the table of several, between its state and its health."""
    best = best_epoch(run)
    latest = map(run.measurements.curve, (metrics.VAL_LOSS, metrics.EMA_VAL_LOSS, metrics.IMAGES_PER_SECOND))
    step = f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else "")
    values = [current_loss(run), best and best.low, *(curve and curve.latest for curve in latest)]
    return [step, *map(number, values)]


def health(runs: list[Run]) -> list[dict[str, str]]:
    """Return the rows of the table of health events, by the heads of its columns; each kind of a run once."""
    rows = []
    for run in runs:
        for name, event in sorted(run.measurements.events.items(), key=lambda item: item[1].ends):
            first, last = event.ends
            row = {"Run": run.label} if len(runs) > 1 else {}
            row["What"] = Markup("<strong>{}</strong> <code>health/{}</code>").format(event_name(name), name)
            row["Count"] = f"{event.count:,}×"
            row["Step"] = f"{first:,}" if first == last else f"{first:,} – {last:,}"
            row["At worst"] = at_worst(name, event)
            row["Likely cause and remedy"] = remedy_of(name)
            rows.append(row)
    return rows


def at_worst(name: str, event: Occurrences) -> str:
    """Return the event in words, with the value that was furthest from what it should be."""
    value = (event.values.low if name in WORSE_BELOW else event.values.high) if event.values.count else None
    return KINDS[name].describe(nan if value is None else value) if name in KINDS else number(value)


def remedy_of(name: str) -> Markup:
    """Return the likely cause and what to do, with its flags marked."""
    remedy = KINDS[name].remedy if name in KINDS else UNKNOWN_KIND
    return Markup(re.sub(r"--\w+", r"<code>\g<0></code>", str(escape(remedy[:1].upper() + remedy[1:]))))


def settings(runs: list[Run]) -> dict[str, list[str | None]]:
    """Return the value of every setting in each of the runs; None where it is not recorded."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return {name: [shown(run.settings[name]) if name in run.settings else None for run in runs] for name in names}


def groups(values: dict[str, list[str | None]]) -> list[tuple[str, list[str], str]]:
    """Return title, settings and kind of each group: first those that differ, then by the groups of a configuration.

    Those that are the same in all runs have the kind "same"; facts, which are no settings, are the first of them.
    """
    partial = [name for name in values if None in values[name]]
    differing = [name for name in values if name not in partial and len(set(values[name])) > 1]
    same = [name for name in values if name not in partial and name not in differing]
    found = [("Differing", differing, "differing"), ("Not recorded by all", partial, "partial")]
    found.append(("Facts", [name for name in same if name not in SETTINGS], "same"))
    for group in GROUPS:
        title = group.__name__.removesuffix("Config")
        members = {f.name for f in fields(group)}
        found.append((GROUP_TITLES.get(title, title), [name for name in same if name in members], "same"))
    return found


# --- numbers in words


def shown(value) -> str:
    if isinstance(value, str):
        return value
    if is_count(value) and value >= 10_000:
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False, default=str)


def is_count(value) -> bool:
    return type(value) is int and value >= 0


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def short(value: float) -> str:
    """Return 1234567 as 1.23M."""
    for limit, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{max(1, minutes)} min"
