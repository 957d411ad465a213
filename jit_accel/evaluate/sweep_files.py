"""What a sweep leaves to read: a table as Markdown, CSV and JSON, and a plot of the metric over guidance."""

from __future__ import annotations

import csv
import io
import json
from math import nan
from pathlib import Path

from jit_accel.base.files import atomic_file, write_text
from jit_accel.evaluate.grid import Setting
from jit_accel.evaluate.sweep import Measured, Outcome, noise_of

JSON_FILE, CSV_FILE, TABLE_FILE, PLOT_FILE = "sweep.json", "sweep.csv", "sweep.md", "sweep.png"
COLUMNS = ("ema", "guidance_scale", "guidance_interval", "num_inference_steps", "method", "num_images")


def write_sweep_files(outcome: Outcome, folder: Path, about: dict) -> list[Path]:
    """Write all of them into `folder`, each whole or not at all, and return their paths.

    Args:
        about: what was measured and against what, as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        JSON_FILE: json.dumps(as_json(outcome, about), indent=1),
        CSV_FILE: as_csv(outcome),
        TABLE_FILE: as_markdown(outcome) + "\n\n" + verdict(outcome) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    with atomic_file(folder / PLOT_FILE) as temporary:
        draw_sweep(outcome, temporary)
    return [folder / name for name in (*texts, PLOT_FILE)]


def as_json(outcome: Outcome, about: dict) -> dict:
    unguided = outcome.best_unguided
    return {
        **about,
        "select": outcome.select,
        "best": _plain(outcome.best),
        "best_unguided": None if unguided is None else _plain(unguided),
        "not_told_apart_from_best": [_plain(one) for one in outcome.not_told_apart],
        "all_images": [_plain(one) for one in outcome.full],
        "few_images": [_plain(one) for one in outcome.few],
    }


def as_csv(outcome: Outcome) -> str:
    """A line for each measurement, over all images first."""
    metrics = metrics_of(outcome)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *metrics, "is_best"])
    for one in [*outcome.full, *outcome.few]:
        writer.writerow([*_cells(one), *(one.values.get(metric) for metric in metrics), int(one is outcome.best)])
    return text.getvalue()


def as_markdown(outcome: Outcome) -> str:
    """The grid in its order; what was measured on all images stands beside what few images said."""
    metrics, full = metrics_of(outcome), {one.setting: one for one in outcome.full}
    rows = outcome.few or outcome.full
    has_ema = any(one.setting.ema for one in rows)
    settings = {(one.setting.num_inference_steps, one.setting.method) for one in rows}
    has_solver = len(settings) > 1
    heads = [*["ema"] * has_ema, *["steps", "method"] * has_solver, "interval", "guidance"]
    if outcome.few:
        heads += [f"{outcome.select}, {outcome.few[0].num_images:,} images"]
    heads += [f"{metric}, {outcome.full[0].num_images:,} images" for metric in metrics]
    lines = [heads, ["---:" for _ in heads]]
    for one in rows:
        setting, measured = one.setting, full.get(one.setting)
        cells = [*[setting.ema or ""] * has_ema]
        cells += [str(setting.num_inference_steps), setting.method] * has_solver
        cells += [_interval_text(setting), f"{setting.guidance_scale:g}"]
        cells += [_number(one.values[outcome.select])] if outcome.few else []
        cells += [_number(measured.values.get(metric)) if measured else "" for metric in metrics]
        is_best = measured is outcome.best
        lines.append([f"**{cell}**" if is_best and cell else cell for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(outcome: Outcome) -> str:
    """Who won, by how much, and who might have."""
    best, unguided, select = outcome.best, outcome.best_unguided, outcome.select
    lines = [f"Best {select} over {best.num_images:,} images: {_number(best.values[select])} with {best.setting}."]
    if unguided is not None and unguided is not best:
        lines.append(f"Without guidance: {_number(unguided.values[select])} with {unguided.setting}.")
    if near := outcome.not_told_apart:
        those = "; ".join(f"{one.setting} ({_number(one.values[select])})" for one in near)
        lines.append(f"Within {noise_of(best.num_images):.1%} of it, which other noise may turn around: {those}.")
    if at := edges(outcome):
        lines.append(f"It lies at the {at} of the guidance scales: a wider range may hold a better one.")
    return "\n".join(lines)


def edges(outcome: Outcome) -> str | None:
    """Which end of the guidance scales the winner lies at, where there is more than one scale."""
    scales = sorted({one.setting.guidance_scale for one in outcome.few or outcome.full})
    best = outcome.best.setting.guidance_scale
    if len(scales) < 3 or best not in (scales[0], scales[-1]) or best == 1:
        return None
    return "lower end" if best == scales[0] else "upper end"


def metrics_of(outcome: Outcome) -> list[str]:
    """The one that decides first."""
    found = dict.fromkeys([outcome.select])
    for one in outcome.full:
        found |= dict.fromkeys(one.values)
    return list(found)


def draw_sweep(outcome: Outcome, file) -> None:
    """The metric over guidance as a PNG: a curve for each average, interval and solver; the winner is marked.

    Lines are few images, dots all of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    every = [*outcome.few, *outcome.full]
    lines, dots = curves_of(outcome.few or outcome.full, outcome.select, every), {}
    if outcome.few:
        dots = curves_of(outcome.full, outcome.select, every)
    for index, (name, points) in enumerate(lines.items()):
        colour, line = f"C{index % 10}", "-" if index < 10 else "--"
        axes.plot(*zip(*points), line, color=colour, label=name, linewidth=1.4)
        if name in dots:
            axes.plot(*zip(*dots[name]), "o", color=colour, markersize=8, markeredgecolor="black")
    best = outcome.best
    at = (best.setting.guidance_scale, best.values[outcome.select])
    text = f"best of {best.num_images:,} images: {_number(at[1])} at guidance {at[0]:g}"
    axes.plot(*at, "*", color="gold", markersize=20, markeredgecolor="black", label=text, linestyle="none")
    title = f"{outcome.select} over guidance"
    if outcome.few:
        title += f" (lines: {outcome.few[0].num_images:,} images; dots: {best.num_images:,})"
    axes.set(xlabel="guidance scale", ylabel=outcome.select, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


def curves_of(these: list[Measured], select: str, every: list[Measured]) -> dict[str, list[tuple[float, float]]]:
    """(guidance, value) by the curve's name, which tells it from all those of `every`.

    An unguided setting belongs to the curves of all intervals.
    """
    intervals = {one.setting.guidance_interval for one in every if not one.setting.is_unguided}
    solvers = {(one.setting.num_inference_steps, one.setting.method) for one in every}
    curves: dict[tuple, list[tuple[float, float]]] = {}
    for one in these:
        setting = one.setting
        solver = (setting.ema, setting.num_inference_steps, setting.method)
        for interval in (intervals or {None}) if setting.is_unguided else (setting.guidance_interval,):
            value = one.values[select]
            curves.setdefault((*solver, interval), []).append((setting.guidance_scale, nan if value is None else value))
    return {_curve_name(key, len(solvers) > 1): sorted(points) for key, points in curves.items()}


def _curve_name(key: tuple, names_solver: bool) -> str:
    ema, steps, method, interval = key
    parts = [f"EMA {ema}"] if ema else []
    if names_solver:
        parts.append(f"{steps} {method} steps")
    if interval:
        parts.append("t in {:g} to {:g}".format(*interval))
    return ", ".join(parts) or "no guidance"


def _plain(one: Measured) -> dict:
    return {**one.setting.plain(), "num_images": one.num_images, **one.values}


def _cells(one: Measured) -> list:
    setting = one.setting
    interval = "" if setting.guidance_interval is None else ":".join(f"{end:g}" for end in setting.guidance_interval)
    return [
        *(setting.ema or "", setting.guidance_scale, interval, setting.num_inference_steps, setting.method),
        one.num_images,
    ]


def _interval_text(setting: Setting) -> str:
    return "" if setting.guidance_interval is None else "{:g} to {:g}".format(*setting.guidance_interval)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
