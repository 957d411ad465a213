"""The files and the table of a comparison."""

import json
from pathlib import Path

from jit_accel.base.files import atomic_file, write_json, write_text
from jit_accel.compare.outcome import ArmOutcome, Comparison, p_text
from jit_accel.compare.t_test import LEAST_SEEDS, LEVEL

JSON_FILE, TABLE_FILE, PLOT_FILE = "compare.json", "compare.md", "compare.png"


def write_outcome(outcome: Comparison, folder: Path, with_plot: bool = True) -> list[Path]:
    """Write the outcome into the folder, each file whole or not at all. Returns their paths; raises `OSError`."""
    write_json(folder / JSON_FILE, plain(outcome))
    write_text(folder / TABLE_FILE, as_markdown(outcome))
    if with_plot:
        with atomic_file(folder / PLOT_FILE) as temporary:
            draw(outcome, temporary)
    return [folder / name for name in (TABLE_FILE, JSON_FILE, *[PLOT_FILE] * with_plot)]


def plain(outcome: Comparison) -> dict:
    """Return the outcome as JSON has it; what is not known is null."""
    arms = []
    for arm in outcome.arms:
        test = dict.fromkeys(("mean", "low", "high", "p")) if arm.test is None else arm.test._asdict()
        difference = {**test, "p_holm": arm.p_holm, "by_seed": arm.differences}
        arms.append(
            {
                "name": arm.name,
                "mean": arm.mean,
                "standard_deviation": arm.deviation,
                "values": arm.values,
                "difference": difference if arm is not outcome.base else None,
                "step_s": arm.step_s,
                "step_time_ratio": arm.step_ratio,
                "metrics": arm.metrics,
            }
        )
    about = {"metric": outcome.metric, "better": "higher" if outcome.is_better_higher else "lower", **outcome.about}
    found = {**about, "interval": LEVEL, "settings": arms}
    return json.loads(json.dumps(found), parse_constant=lambda name: None)


def table_of(outcome: Comparison) -> list[list[str]]:
    """Return the cells of the table, the heads first."""
    several = len(outcome.arms) > 2
    interval = f"{LEVEL:.0%} interval"
    heads = ["setting", "seeds", outcome.metric, "±", "difference", interval, "p", *["p, Holm"] * several, "step time"]
    rows = [heads]
    for arm in outcome.arms:
        test = arm.test
        has_interval = test is not None and test.low is not None
        rows.append(
            [
                arm.name,
                str(len(arm.values)),
                _number(arm.mean),
                _number(arm.deviation, 2),
                "" if test is None else f"{test.mean:+.4g}",
                f"{test.low:+.4g} to {test.high:+.4g}" if has_interval else "",
                p_text(test.p) if test else "",
                *[p_text(arm.p_holm)] * several,
                "" if arm.step_ratio is None else f"x {arm.step_ratio:.3g}",
            ]
        )
    return rows


def as_text(outcome: Comparison) -> str:
    """Return the table and the verdicts for a terminal."""
    rows = table_of(outcome)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*lines, "", *verdicts(outcome)])


def as_markdown(outcome: Comparison) -> str:
    """Return the table and the verdicts as Markdown."""
    heads, *rows = table_of(outcome)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {line}" for line in verdicts(outcome)) + "\n"


def verdicts(outcome: Comparison) -> list[str]:
    """Return what is to be said of each setting beside the base, and of the numbers as a whole."""
    lines = [outcome.verdict(arm) for arm in outcome.arms[1:]]
    better = "higher" if outcome.is_better_higher else "lower"
    lines.append(f"{outcome.metric}: {better} is better. Differences are those of runs with the same seed.")
    if any(arm.test is not None and arm.test.low is None for arm in outcome.arms[1:]):
        lines.append(f"Intervals and p-values need {LEAST_SEEDS} seeds.")
    for name, length in outcome.about["lengths"].items():
        if any(arm.name == name for arm in outcome.arms):
            ratio = length["step_s"] / length["base_step_s"]
            lines.append(
                f"{name}: {length['steps']:,} steps in the base's time, by steps of {ratio:.3g} times its own."
            )
    return lines


def draw(outcome: Comparison, file: Path) -> None:
    """Draw the values, those of a seed joined, and the differences from the base with their intervals, as a PNG."""
    from matplotlib.figure import Figure

    arms, others = outcome.arms, outcome.arms[1:]
    figure = Figure((10, max(3.2, 1.6 + 0.5 * len(arms))), layout="constrained")
    values, differences = figure.subplots(1, 2)
    places = {arm.name: len(arms) - 1 - index for index, arm in enumerate(arms)}
    for seed in range(outcome.seeds):
        points = [(arm.values[seed], places[arm.name]) for arm in arms if seed in arm.values]
        if points:
            values.plot(*zip(*points), "o-", color="#9ecae1", linewidth=0.9, markersize=4)
    for arm in arms:
        if arm.mean is not None:
            values.plot(arm.mean, places[arm.name], "|", color="#08519c", markersize=22, markeredgewidth=2.5)
    for arm in others:
        _draw_difference(differences, arm, places[arm.name])
    differences.axvline(0, color="black", linewidth=0.9)
    better = "higher is better" if outcome.is_better_higher else "lower is better"
    values.set(xlabel=f"{outcome.metric} ({better})", title="each seed, and the mean")
    title = f"mean and {LEVEL:.0%} interval" if any(arm.p_holm is not None for arm in others) else "mean"
    differences.set(xlabel=f"difference from {outcome.base.name}, same seed", title=title)
    for axes in (values, differences):
        axes.set_yticks(list(places.values()), list(places))
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150, format="png")


def _draw_difference(axes, arm: ArmOutcome, place: int) -> None:
    above = [place + 0.18] * len(arm.differences)
    axes.plot(list(arm.differences.values()), above, "o", color="#9ecae1", markersize=5)
    if arm.test is None:
        return
    reach = None if arm.test.low is None else [[arm.test.mean - arm.test.low], [arm.test.high - arm.test.mean]]
    axes.errorbar(arm.test.mean, place, xerr=reach, fmt="D", color="#08519c", markersize=6, capsize=5, linewidth=1.8)


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
