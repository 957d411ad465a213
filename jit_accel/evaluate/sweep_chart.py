"""The chart of a sweep: the metric over guidance, or over the widths of averages where these are what is tried most."""

import math

from jit_accel.config.groups import width_of
from jit_accel.evaluate.drawing import Setting
from jit_accel.evaluate.sweep import Measured, Outcome

Curves = dict[str, list[tuple[float, float]]]  # points by the curve's name


def scales_of(outcome: Outcome) -> list[float]:
    """Return the guidance scales that were tried."""
    return sorted({one.setting.guidance_scale for one in outcome.few or outcome.full})


def widths_of(outcome: Outcome) -> list[float]:
    """Return the widths of averages that were tried."""
    return sorted(filter(None, {width_of(one.setting.ema or "") for one in outcome.few or outcome.full}))


def draw_sweep(outcome: Outcome, file) -> None:
    """Draw the metric as a PNG: curves of few images, dots of all, and a star for the winner."""
    from matplotlib.figure import Figure

    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    is_over_widths = len(widths_of(outcome)) > len(scales_of(outcome))
    what = "width" if is_over_widths else "guidance"
    curves_of = curves_over_widths if is_over_widths else curves_over_guidance
    lines = curves_of(outcome.few or outcome.full, outcome)
    dots = curves_of(outcome.full, outcome) if outcome.few else {}
    for index, (name, points) in enumerate(lines.items()):
        colour, line = f"C{index % 10}", "-" if index < 10 else "--"
        axes.plot(*zip(*points), line, color=colour, label=name, linewidth=1.4)
        if name in dots:
            axes.plot(*zip(*dots[name]), "o", color=colour, markersize=8, markeredgecolor="black")
    best, value = outcome.best, outcome.best.values[outcome.select]
    width = width_of(best.setting.ema or "")
    x = (width or min(widths_of(outcome))) if is_over_widths else best.setting.guidance_scale
    where = f"EMA {in_words(best.setting)}" if is_over_widths else f"guidance {x:g}"
    text = f"best of {best.num_images:,} images: {value:.4g} at {where}"
    axes.plot(x, value, "*", color="gold", markersize=20, markeredgecolor="black", label=text, linestyle="none")
    counts = f" (lines: {outcome.few[0].num_images:,} images; dots: {best.num_images:,})" if outcome.few else ""
    title = f"{outcome.select} over {what}{counts}"
    axes.set(xlabel="relative width of the average" if is_over_widths else "guidance scale", ylabel=outcome.select)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150, format="png")


def curves_over_guidance(these: list[Measured], outcome: Outcome) -> Curves:
    """Return (guidance, value) by the curve's name; an unguided setting belongs to the curves of all intervals."""
    every = [*outcome.few, *outcome.full]
    intervals = {one.setting.guidance_interval: one.setting for one in every if not one.setting.is_unguided}
    curves: Curves = {}
    for one in these:
        setting = one.setting
        for other in (intervals or {None: setting}).values() if setting.is_unguided else (setting,):
            ema = f"EMA {in_words(setting)}" if setting.ema else ""
            parts = [ema, solver_of(setting, every), other.interval_text("t in {:g} to {:g}")]
            name = ", ".join(filter(None, parts)) or "no guidance"
            curves.setdefault(name, []).append((setting.guidance_scale, _value(one, outcome)))
    return {name: sorted(points) for name, points in curves.items()}


def curves_over_widths(these: list[Measured], outcome: Outcome) -> Curves:
    """Return (width, value) by the curve's name; an average of a decay is a level line, since it has no width."""
    every, widths = [*outcome.few, *outcome.full], widths_of(outcome)
    curves: Curves = {}
    for one in these:
        setting = one.setting
        width = width_of(setting.ema or "")
        guidance = f"guidance {setting.guidance_scale:g}{setting.interval_text(', t in {:g} to {:g}')}"
        guidance = "no guidance" if setting.is_unguided else guidance
        ema = "" if width else f"EMA {in_words(setting)}"
        name = ", ".join(filter(None, [ema, solver_of(setting, every), guidance]))
        places = [width] if width else [widths[0], widths[-1]]
        curves.setdefault(name, []).extend((place, _value(one, outcome)) for place in places)
    return {name: sorted(points) for name, points in curves.items()}


def in_words(setting: Setting) -> str:
    """Return the name of the weights as it is read."""
    return (setting.ema or "").replace("_", " ")


def solver_of(setting: Setting, among: list[Measured]) -> str:
    """Return a setting's steps, method and shift, where others have others."""
    return setting.solver_text() if has_several_solvers(among) else ""


def has_several_solvers(these: list[Measured]) -> bool:
    """Return True where settings differ in steps, method or shift."""
    return len({one.setting.solver_text() for one in these}) > 1


def _value(one: Measured, outcome: Outcome) -> float:
    value = one.values[outcome.select]
    return math.nan if value is None else value
