"""What a page says in words and numbers: its head, health events and settings. All text of a run is escaped here."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from datetime import datetime, timezone
from html import escape
from math import nan

from jit_accel.config.settings import GROUPS, SETTINGS
from jit_accel.monitor.health import KINDS
from jit_accel.report.charts import SMOOTHING, UNGUIDED, event_name, metric_name
from jit_accel.report.curves import EVAL, Event
from jit_accel.report.runs import Run

GROUP_TITLES = {"Optim": "Optimization", "Sample": "Samples", "Eval": "Evaluation"}
FRECHET = (f"{EVAL}fid", f"{EVAL}fd_")  # of the metrics of generated images, those that a tile shows
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
    """Title, facts and the most important numbers: as tiles of one run, as a table of several."""
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
    """Model, size, data and devices, as far as they are known."""
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
    """State, step and time, with a bar where the length of the run is known."""
    sign, word = STATES[run.state]
    steps = f"step {run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
    parts = [steps, *epochs_in_words(run)]
    if run.updated is not None:
        parts.append(f"last row {when(run.updated)}")
    bar = ""
    if run.total_steps:
        share = min(1.0, run.step / run.total_steps)
        bar = f'<progress max="1" value="{share:.4f}" aria-label="Progress">{share:.0%}</progress>'
    return (
        f'<div class="state"><span class="badge {run.state.replace(" ", "-")}">{sign} {word}</span>'
        f"<span>{escape(' · '.join(parts))}</span>{bar}</div>"
        + (f'<p class="failed">{escape(run.failure)}</p>' if run.failure else "")
    )


def epochs_in_words(run: Run) -> list[str]:
    curve = run.measurements.curve("train/epoch")
    found = [f"epoch {curve.high:.2f}"] if curve else []
    step_time = run.measurements.curve("perf/step_time")
    if run.state == "running" and run.total_steps and step_time:
        found.append(f"{duration((run.total_steps - run.step) * step_time.latest)} to go")
    return found


def numbers(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and remark of each tile; a value is HTML."""
    found = [("Loss", number(current_loss(run)), "running mean")]
    best = run.measurements.curve("train/best_loss") or run.measurements.curve("train/epoch_loss")
    if best:
        found.append(("Best epoch", number(best.low), "mean loss of an epoch"))
    for key, name in (("val/loss", "Validation"), ("ema/val_loss", "Validation, EMA")):
        if curve := run.measurements.curve(key):
            found.append((name, number(curve.latest), f"lowest {number(curve.low)}"))
    found += [
        (metric_name(key.removeprefix(EVAL)), number(curve.latest), f"lowest {number(curve.low)}")
        for key, curve in sorted(run.measurements.curves.items())
        if key.startswith(FRECHET) and not key.endswith(UNGUIDED) and curve.count
    ]
    if speed := run.measurements.curve("perf/images_per_second"):
        mfu = run.measurements.curve("perf/mfu")
        found.append(("Images/s", short(speed.latest), f"MFU {mfu.latest:.0%}" if mfu else "all processes"))
    elif speed := run.measurements.curve("train/samples_per_second"):
        found.append(("Images/s", short(speed.latest), "last epoch"))
    found.append(("Health", health_badge(run), health_remark(run)))
    return found


def current_loss(run: Run) -> float | None:
    curve = run.measurements.curve("train/loss")
    return curve.smoothed_end(SMOOTHING * run.step) if curve else None


def health_badge(run: Run) -> str:
    count = len(run.measurements.events)
    if not count:
        return '<span class="good">✓ good</span>'
    return f'<a class="bad" href="#health-title">⚠ {count} finding{"s" * (count > 1)}</a>'


def health_remark(run: Run) -> str:
    return ", ".join(event_name(name).lower() for name in run.measurements.events) or "nothing noticed"


def runs_table(runs: list[Run]) -> str:
    names = ("Run", "State", "Step", "Loss", "Best epoch", "Validation", "Val., EMA", "Images/s", "Health")
    rows = "".join(
        f'<tr data-run="{i}"><th scope="row"><label><input type="checkbox" checked data-run="{i}">'
        f'<span class="swatch" data-run="{i}"></span>{escape(run.label)}</label></th>'
        + "".join(f"<td>{cell}</td>" for cell in run_cells(run))
        + "</tr>"
        for i, run in enumerate(runs)
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return scrolled(f'<table class="runs"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>', "Runs")


def run_cells(run: Run) -> list[str]:
    """The HTML of a run's cells behind its name."""
    sign, word = STATES[run.state]
    curves = {key: run.measurements.curve(key) for key in ("val/loss", "ema/val_loss", "perf/images_per_second")}
    best = run.measurements.curve("train/best_loss") or run.measurements.curve("train/epoch_loss")
    return [
        f'<span class="badge {run.state.replace(" ", "-")}">{sign} {word}</span>',
        f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else ""),
        number(current_loss(run)),
        number(best.low if best else None),
        *(number(curve.latest if curve else None) for curve in curves.values()),
        health_badge(run),
    ]


def health(runs: list[Run]) -> str:
    """The table of health events, each kind once; empty where there is none."""
    rows = []
    for run in runs:
        for name, event in sorted(run.measurements.events.items(), key=lambda item: item[1].first):
            steps = f"{event.first:,}" if event.first == event.last else f"{event.first:,} – {event.last:,}"
            cells = [
                *([("Run", escape(run.label))] if len(runs) > 1 else []),
                ("What", f"<strong>{escape(event_name(name))}</strong> <code>health/{escape(name)}</code>"),
                ("Count", f"{event.count:,}×"),
                ("Step", steps),
                ("At worst", escape(at_worst(name, event))),
                ("Likely cause and remedy", remedy_of(name)),
            ]
            columns = [column for column, _ in cells]
            rows.append("".join(f'<td data-column="{column}">{cell}</td>' for column, cell in cells))
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f'<table class="events"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return (
        '<section aria-labelledby="health-title"><h2 id="health-title">Health</h2>'
        f'<div class="card">{scrolled(table, "Health events")}</div></section>'
    )


def at_worst(name: str, event: Event) -> str:
    """What was seen, with the value that was furthest from what it should be."""
    value = event.low if name in WORSE_BELOW else event.high
    if name not in KINDS:
        return number(value)
    return KINDS[name].describe(nan if value is None else value)


def remedy_of(name: str) -> str:
    """Likely cause and what to do, as HTML with its flags marked."""
    remedy = KINDS[name].remedy if name in KINDS else UNKNOWN_KIND
    return re.sub(r"--\w+", r"<code>\g<0></code>", escape(remedy[:1].upper() + remedy[1:]))


def settings(runs: list[Run]) -> str:
    """Every setting, by group and searchable; of several runs those that differ come first."""
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
    """A part that opens and closes: a column for each of the `labels`, or one value for all runs."""
    if not names:
        return ""
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("Setting", *labels)) if labels else ""
    body = "".join(settings_row(name, values[name] if labels else values[name][:1]) for name in names)
    table = f"<table><thead>{f'<tr>{heads}</tr>' if heads else ''}</thead><tbody>{body}</tbody></table>"
    summary = f"<summary>{escape(title)} <span>{len(names)}</span></summary>"
    return f"<details{attributes}>{summary}{scrolled(table, title)}</details>"


def settings_row(name: str, values: list[str]) -> str:
    cells = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f'<tr><th scope="row"><code>{escape(name)}</code></th>{cells}</tr>'


def groups(names: list[str]) -> list[tuple[str, list[str]]]:
    """The names by the groups of the settings; what is recorded besides comes first."""
    found = [("Facts", [name for name in names if name not in SETTINGS])]
    for group in GROUPS:
        title = group.__name__.removesuffix("Config")
        members = {f.name for f in fields(group)}
        found.append((GROUP_TITLES.get(title, title), [name for name in names if name in members]))
    return found


def scrolled(table: str, name: str) -> str:
    """A table that scrolls inside itself, by keyboard too."""
    return f'<div class="scrolled" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


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
    """1234567 as 1.23M."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{max(1, minutes)} min"


def when(timestamp: float) -> str:
    return f"{datetime.fromtimestamp(timestamp, timezone.utc):%Y-%m-%d %H:%M} UTC"
