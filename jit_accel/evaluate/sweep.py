"""A sweep: a grid of settings measured on few images, the best of them on all, the one that wins, and their table."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jit_accel.base.files import append_json_lines, atomic_file, read_json_lines, write_text
from jit_accel.evaluate.grid import Setting

# Of 50,000 images the FID's standard deviation is 1 to 2% over trainings, and a third of that over other noise for one
# network (arXiv 2606.20536): two of the latter, and more for fewer images.
NOISE, NOISE_IMAGES = 0.01, 50_000
COLUMNS = (*(field.name for field in fields(Setting)), "num_images")


@dataclass(frozen=True)
class Measured:
    """Values of one setting, over `num_images` images."""

    setting: Setting
    num_images: int
    values: dict[str, float]

    def place(self) -> dict:
        """Return everything but the values on one level."""
        return {**asdict(self.setting), "num_images": self.num_images}

    def plain(self) -> dict:
        """Return all of it on one level, as JSON has it."""
        return self.place() | self.values


class SweepLog:
    """`sweep.jsonl`: a JSON object for each setting that has been measured, with which a stopped sweep goes on.

    context: whatever else the values depend on, as JSON: weights, reference, features, seed. Lines of another context
    stay and are not used. on_writer: calls a function on the one process that reads and writes, for all.
    """

    def __init__(self, path: Path, context: dict, on_writer: Callable[[Callable], Any] = lambda work: work()):
        self.path, self.context, self.on_writer = path, context, on_writer
        self.key = hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()[:16]
        self.done: dict[tuple[Setting, int], Measured] = on_writer(self._read)

    def _read(self) -> dict[tuple[Setting, int], Measured]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[tuple[Setting, int], Measured] = {}
        for row in read_json_lines(self.path):
            if row.get("key") == self.key:
                place = (Setting(**row["setting"]), row["num_images"])
                known = found[place].values if place in found else {}  # other metrics were asked for then
                found[place] = Measured(*place, known | row["values"])
        return found

    def measured(
        self, setting: Setting, num_images: int, metrics: Iterable[str], measure: Callable[[Setting, int], Measured]
    ) -> Measured:
        """Return what is known of a setting; where it lacks a metric, measure and append a line to the file."""
        found = self.done.get((setting, num_images))
        if found is None or not set(metrics) <= found.values.keys():
            found = self.done[setting, num_images] = measure(setting, num_images)
            row = {"key": self.key, **asdict(found), "context": self.context}
            self.on_writer(lambda: append_json_lines(self.path, [row], durable=True))
        return found


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep. `few` and `full` are in the grid's order; `full` holds the winner and the unguided one."""

    select: str
    higher_is_better: bool
    few: list[Measured]
    full: list[Measured]

    @property
    def best(self) -> Measured:
        """The winner: by the values over all images, and of equal ones the cheaper."""
        return ranked(self.full, self.select, self.higher_is_better)[0]

    @property
    def best_unguided(self) -> Measured | None:
        unguided = [one for one in self.full if one.setting.is_unguided]
        return next(iter(ranked(unguided, self.select, self.higher_is_better)), None)

    @property
    def not_told_apart(self) -> list[Measured]:
        """Other settings whose value over all images is as good as the winner's but for noise."""
        best = self.best
        value = best.values[self.select]
        near = abs(value) * noise_of(best.num_images)
        return [one for one in self.full if one is not best and abs(one.values[self.select] - value) <= near]


def sweep(
    settings: Sequence[Setting],
    measure: Callable[[Setting, int], Measured],
    *,
    sweep_images: int,
    num_images: int,
    top: int,
    select: str,
    higher_is_better: bool,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure all settings on `sweep_images` images, the `top` best and the best unguided one on `num_images`.

    Where that would be all of them, or few images are all images, everything is measured once, on all. `measure` takes
    a setting and the number of images; all processes call it alike.
    """

    def measured(these: Sequence[Setting], count: int) -> list[Measured]:
        found = []
        for i, setting in enumerate(these, 1):
            found.append(measure(setting, count))
            say(f"[{i}/{len(these)}] {setting}, {count:,} images: {select} {found[-1].values[select]:.5g}")
        return found

    if sweep_images >= num_images or len(settings) <= top:
        return Outcome(select, higher_is_better, [], measured(settings, num_images))
    few = measured(settings, sweep_images)
    order = [one.setting for one in ranked(few, select, higher_is_better)]
    unguided = [setting for setting in order if setting.is_unguided]
    finalists = {*order[:top], *unguided[:1]}
    full = measured([setting for setting in settings if setting in finalists], num_images)
    return Outcome(select, higher_is_better, few, full)


def noise_of(num_images: int) -> float:
    """Return the share of a Fréchet distance by which two settings must differ to be told apart, roughly."""
    return NOISE * max(1.0, NOISE_IMAGES / num_images) ** 0.5


def ranked(these: Sequence[Measured], select: str, higher_is_better: bool) -> list[Measured]:
    """Sort the best first; of equal ones that which costs fewer network calls. Values that are no numbers come last."""

    def rank(measured: Measured) -> tuple:
        value, setting = measured.values[select], measured.setting
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        goodness = (-value if higher_is_better else value) if is_number else math.inf
        calls = setting.num_inference_steps * (2 if setting.method == "heun" else 1)
        return goodness, not setting.is_unguided, calls, setting.guidance_scale

    return sorted(these, key=rank)


def write_sweep_files(outcome: Outcome, folder: Path, about: dict) -> list[Path]:
    """Write all of them into `folder`, each whole or not at all, and return their paths; `about` is JSON's head."""
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
            curves.setdefault(name, []).append((setting.guidance_scale, math.nan if value is None else value))
    return {name: sorted(points) for name, points in curves.items()}


def _has_several_solvers(these: list[Measured]) -> bool:
    return len({(one.setting.num_inference_steps, one.setting.method) for one in these}) > 1


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
