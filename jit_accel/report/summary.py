"""The words and numbers of a page: its head, health events and settings. All text of a run is escaped here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime, timezone
from html import escape
from math import nan

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
    "finished": ("✓", "Finished"),
    "failed": ("✗", "Failed"),
    "interrupted": ("❙❙", "Interrupted"),
    "running": ("▶", "Running"),
    "silent": ("?", "Unfinished"),
    "not started": ("…", "Not started"),
}


def header(runs: list[Run], title: str) -> str:
    """Return title, facts and the most important numbers: as tiles of one run, as a table of several."""
    if len(runs) > 1:
        return f"<h1>{escape(title)}</h1>{runs_table(runs)}"
    run = runs[0]
    tiles = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd><dd class="sub">{escape(sub)}</dd></div>'
        for name, value, sub in numbers(run)
    )
    return (
        f'<h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(facts(run)))}</p>'
        f'{progress(run)}<dl class="tiles">{tiles}</dl>'
    )


def facts(run: Run) -> list[str]:
    """Return model, size, data and devices, as far as they are known."""
    known = run.settings
    found = []
    if known.get("model"):
        parameters = known.get("num_parameters")
        count = f" ({short(parameters)} parameters)" if is_count(parameters) else ""
        found.append(f"{known['model']}{count}")
    if known.get("img_size"):
        found.append(f"{known['img_size']} px")
    if known.get("data_path"):
        images = known.get("num_images")
        found.append(f"{known['data_path']}" + (f" ({images:,} images)" if is_count(images) else ""))
    if is_count(known.get("global_batch_size")):
        found.append(f"global batch {known['global_batch_size']:,}")
    if known.get("device"):
        found.append(f"{known.get('num_processes', 1)} × {known['device']}")
    return found


def progress(run: Run) -> str:
    """Return state, step and time, with a bar where the length of the run is known."""
    parts = [f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")]
    if curve := run.measurements.curve(metrics.EPOCH):
        parts.append(f"epoch {curve.high:.2f}")
    step_time = run.measurements.curve(metrics.STEP_TIME)
    if run.state == "running" and run.total_steps and step_time:
        parts.append(f"{duration((run.total_steps - run.step) * step_time.latest)} to go")
    if run.updated is not None:
        parts.append(f"last row {datetime.fromtimestamp(run.updated, timezone.utc):%Y-%m-%d %H:%M} UTC")
    bar = ""
    if run.total_steps:
        share = min(1.0, run.step / run.total_steps)
        bar = f'<progress max="1" value="{share:.4f}" aria-label="Progress">{share:.0%}</progress>'
    failure = f'<p class="failed">{escape(run.failure)}</p>' if run.failure else ""
    return f'<div class="state">{badge(run)}<span>{escape(" · ".join(parts))}</span>{bar}</div>{failure}'


def badge(run: Run) -> str:
    sign, word = STATES[run.state]
    return f'<span class="badge {run.state.replace(" ", "-")}">{sign} {word}</span>'


def numbers(run: Run) -> list[tuple[str, str, str]]:
    """Return name, value and remark of each tile; a value is HTML."""
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
    remark = ", ".join(event_name(name).lower() for name in run.measurements.events)
    return [*found, ("Health", health_badge(run), remark or "nothing noticed")]


def current_loss(run: Run) -> float | None:
    curve = run.measurements.curve(metrics.TRAIN_LOSS)
    return curve.smoothed_end(SMOOTHING * run.step) if curve else None


def best_epoch(run: Run) -> Curve | None:
    return run.measurements.curve(metrics.BEST_LOSS, metrics.EPOCH_LOSS)


def health_badge(run: Run) -> str:
    count = len(run.measurements.events)
    if not count:
        return '<span class="good">✓ good</span>'
    return f'<a class="bad" href="#health-title">⚠ {count} finding{"s" * (count > 1)}</a>'


def runs_table(runs: list[Run]) -> str:
    names = ("Run", "State", "Step", "Loss", "Best epoch", "Validation", "Val., EMA", "Images/s", "Health")
    rows = [
        f'<tr data-run="{i}"><th scope="row"><label><input type="checkbox" checked data-run="{i}">'
        f'<span class="swatch" data-run="{i}"></span>{escape(run.label)}</label></th>'
        f"{tagged('td', run_cells(run))}</tr>"
        for i, run in enumerate(runs)
    ]
    return scrolled("Runs", names, rows, ' class="runs"')


def run_cells(run: Run) -> list[str]:
    """Return the HTML of a run's cells behind its name."""
    best, curve_of = best_epoch(run), run.measurements.curve
    latest = map(curve_of, (metrics.VAL_LOSS, metrics.EMA_VAL_LOSS, metrics.IMAGES_PER_SECOND))
    return [
        badge(run),
        f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else ""),
        number(current_loss(run)),
        number(best and best.low),
        *(number(curve and curve.latest) for curve in latest),
        health_badge(run),
    ]


def health(runs: list[Run]) -> str:
    """Return the table of health events, each kind once; empty where there are none."""
    columns = ["Run", "What", "Count", "Step", "At worst", "Likely cause and remedy"][len(runs) == 1 :]
    rows = []
    for run in runs:
        for name, event in sorted(run.measurements.events.items(), key=lambda item: item[1].ends):
            first, last = event.ends
            cells = [
                escape(run.label),
                f"<strong>{escape(event_name(name))}</strong> <code>health/{escape(name)}</code>",
                f"{event.count:,}×",
                f"{first:,}" if first == last else f"{first:,} – {last:,}",
                escape(at_worst(name, event)),
                remedy_of(name),
            ][len(runs) == 1 :]
            rows.append("".join(f'<td data-column="{column}">{cell}</td>' for column, cell in zip(columns, cells)))
    if not rows:
        return ""
    table = scrolled("Health events", columns, [f"<tr>{row}</tr>" for row in rows], ' class="events"')
    return (
        '<section aria-labelledby="health-title"><h2 id="health-title">Health</h2>'
        f'<div class="card">{table}</div></section>'
    )


def at_worst(name: str, event: Occurrences) -> str:
    """Return the event in words, with the value that was furthest from what it should be."""
    value = (event.values.low if name in WORSE_BELOW else event.values.high) if event.values.count else None
    if name not in KINDS:
        return number(value)
    return KINDS[name].describe(nan if value is None else value)


def remedy_of(name: str) -> str:
    """Return the likely cause and what to do, as HTML with its flags marked."""
    remedy = KINDS[name].remedy if name in KINDS else UNKNOWN_KIND
    return re.sub(r"--\w+", r"<code>\g<0></code>", escape(remedy[:1].upper() + remedy[1:]))


def settings(runs: list[Run]) -> str:
    """Return every setting, by group and searchable; of several runs those that differ come first."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if not names:
        return ""
    values = {name: [shown(run.settings[name]) if name in run.settings else "–" for run in runs] for name in names}
    partial = [name for name in names if any(name not in run.settings for run in runs)]
    differing = [name for name in names if name not in partial and len(set(values[name])) > 1]
    same = [name for name in names if name not in partial and name not in differing]
    labels = [run.label for run in runs]
    parts = [
        settings_group("Differing", differing, values, labels, ' class="differing" open'),
        settings_group("Not recorded by all", partial, values, labels),
        *(settings_group(title, members, values, []) for title, members in groups(same)),
    ]
    return (
        '<section aria-labelledby="settings-title"><h2 id="settings-title">Configuration</h2>'
        '<div class="card settings"><label class="search">Find a setting '
        '<input type="search" id="search" placeholder="learning_rate" autocomplete="off"></label>'
        f"{''.join(parts)}</div></section>"
    )


def settings_group(title: str, names: list[str], values: dict, labels: list[str], attributes: str = "") -> str:
    """Return a part that opens and closes: a column for each of the `labels`, or one value for all runs."""
    if not names:
        return ""
    rows = [
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        f"{tagged('td', map(escape, values[name] if labels else values[name][:1]))}</tr>"
        for name in names
    ]
    table = scrolled(title, map(escape, ("Setting", *labels)) if labels else (), rows)
    return f"<details{attributes}><summary>{escape(title)} <span>{len(names)}</span></summary>{table}</details>"


def groups(names: list[str]) -> list[tuple[str, list[str]]]:
    """Return the names by the groups of the settings; what is recorded besides comes first."""
    found = [("Facts", [name for name in names if name not in SETTINGS])]
    for group in GROUPS:
        title = group.__name__.removesuffix("Config")
        members = {f.name for f in fields(group)}
        found.append((GROUP_TITLES.get(title, title), [name for name in names if name in members]))
    return found


def scrolled(name: str, heads: Iterable[str], rows: Iterable[str], attributes: str = "") -> str:
    """Return a table that scrolls inside itself, by keyboard too; heads and rows are HTML."""
    heads = tagged('th scope="col"', heads)
    head = f"<tr>{heads}</tr>" if heads else ""
    return (
        f'<div class="scrolled" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table{attributes}><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def tagged(tag: str, cells: Iterable[str]) -> str:
    return "".join(f"<{tag}>{cell}</{tag.split()[0]}>" for cell in cells)


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
