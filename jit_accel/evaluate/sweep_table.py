"""The files of a sweep to read: a table as Markdown, CSV and JSON, and a plot of the metric over guidance."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from math import nan
from pathlib import Path

from jit_accel.base.files import atomic_file, write_text
from jit_accel.evaluate.grid import Setting
from jit_accel.evaluate.sweep import Measured, Outcome, noise_of

COLUMNS = (*(field.name for field in fields(Setting)), "num_images")


def write_sweep_files(outcome: Outcome, folder: Path, about: dict) -> list[Path]:
    """Write all of them into `folder`, each whole or not at all, and return their paths.

    Args:
        about: what was measured and against what, as JSON.
    """
    texts = {
        "sweep.json": json.dumps(as_json(outcome, about), indent=1),
        "sweep.csv": as_csv(outcome),
        "sweep.md": as_markdown(outcome) + "\n\n" + verdict(outcome) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    with atomic_file(folder / "sweep.png") as temporary:
        draw_sweep(outcome, temporary)
    return [folder / name for name in (*texts, "sweep.png")]


def as_json(outcome: Outcome, about: dict) -> dict:
    unguided = outcome.best_unguided
    return {
        **about,
        "select": outcome.select,
        "best": outcome.best.plain(),
        "best_unguided": unguided and unguided.plain(),
        "not_told_apart_from_best": [one.plain() for one in outcome.not_told_apart],
        "all_images": [one.plain() for one in outcome.full],
        "few_images": [one.plain() for one in outcome.few],
    }


def as_csv(outcome: Outcome) -> str:
    """Return a line for each measurement, over all images first."""
    text = io.StringIO()
    columns = [*COLUMNS, *metrics_of(outcome), "is_best"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for one in [*outcome.full, *outcome.few]:
        interval = one.setting.interval_text("{:g}:{:g}")
        writer.writerow({**one.plain(), "guidance_interval": interval, "is_best": int(one is outcome.best)})
    return text.getvalue()


def as_markdown(outcome: Outcome) -> str:
    """Return the grid in its order; beside the values of few images stand those of all."""
    metrics, full = metrics_of(outcome), {one.setting: one for one in outcome.full}
    rows = outcome.few or outcome.full
    has_ema = any(one.setting.ema for one in rows)
    has_solver = _has_several_solvers(rows)
    heads = [*["ema"] * has_ema, *["steps", "method"] * has_solver, "interval", "guidance"]
    heads += [f"{outcome.select}, {one.num_images:,} images" for one in outcome.few[:1]]
    heads += [f"{metric}, {outcome.full[0].num_images:,} images" for metric in metrics]
    lines = [heads, ["---:" for _ in heads]]
    for one in rows:
        setting, measured = one.setting, full.get(one.setting)
        cells = [*[setting.ema or ""] * has_ema, *[str(setting.num_inference_steps), setting.method] * has_solver]
        cells += [setting.interval_text(), f"{setting.guidance_scale:g}"]
        cells += [_number(one.values[outcome.select])] if outcome.few else []
        cells += [_number(measured.values.get(metric)) if measured else "" for metric in metrics]
        is_best = measured is outcome.best
        lines.append([f"**{cell}**" if is_best and cell else cell for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(outcome: Outcome) -> str:
    """Say who won, by how much, and who might have."""
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
    """Return the end of the guidance scales that the winner lies at, where there are three or more."""
    scales = sorted({one.setting.guidance_scale for one in outcome.few or outcome.full})
    best = outcome.best.setting.guidance_scale
    if len(scales) < 3 or best not in (scales[0], scales[-1]) or best == 1:
        return None
    return "lower end" if best == scales[0] else "upper end"


def metrics_of(outcome: Outcome) -> list[str]:
    """Return the metrics' names, the one that decides first."""
    return list(dict.fromkeys([outcome.select, *(name for one in outcome.full for name in one.values)]))


def draw_sweep(outcome: Outcome, file) -> None:
    """Draw the metric over guidance as a PNG: a curve for each average, interval and solver; the winner is marked.

    Lines are few images, dots all of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines = curves_of(outcome.few or outcome.full, outcome)
    dots = curves_of(outcome.full, outcome) if outcome.few else {}
    for index, (name, points) in enumerate(lines.items()):
        colour, line = f"C{index % 10}", "-" if index < 10 else "--"
        axes.plot(*zip(*points), line, color=colour, label=name, linewidth=1.4)
        if name in dots:
            axes.plot(*zip(*dots[name]), "o", color=colour, markersize=8, markeredgecolor="black")
    best = outcome.best
    at = (best.setting.guidance_scale, best.values[outcome.select])
    text = f"best of {best.num_images:,} images: {_number(at[1])} at guidance {at[0]:g}"
    axes.plot(*at, "*", color="gold", markersize=20, markeredgecolor="black", label=text, linestyle="none")
    counts = f" (lines: {outcome.few[0].num_images:,} images; dots: {best.num_images:,})" if outcome.few else ""
    axes.set(xlabel="guidance scale", ylabel=outcome.select, title=f"{outcome.select} over guidance{counts}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)


def curves_of(these: list[Measured], outcome: Outcome) -> dict[str, list[tuple[float, float]]]:
    """Return (guidance, value) by the curve's name; an unguided setting belongs to the curves of all intervals."""
    every = [*outcome.few, *outcome.full]
    intervals = {one.setting.guidance_interval: one.setting for one in every if not one.setting.is_unguided}
    names_solver = _has_several_solvers(every)
    curves: dict[str, list[tuple[float, float]]] = {}
    for one in these:
        setting, value = one.setting, one.values[outcome.select]
        for other in (intervals or {None: setting}).values() if setting.is_unguided else (setting,):
            parts = [
                f"EMA {setting.ema}" if setting.ema else "",
                f"{setting.num_inference_steps} {setting.method} steps" if names_solver else "",
                other.interval_text("t in {:g} to {:g}"),
            ]
            name = ", ".join(filter(None, parts)) or "no guidance"
            curves.setdefault(name, []).append((setting.guidance_scale, nan if value is None else value))
    return {name: sorted(points) for name, points in curves.items()}


def _has_several_solvers(these: list[Measured]) -> bool:
    return len({(one.setting.num_inference_steps, one.setting.method) for one in these}) > 1


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
