"""Charts, samples, settings and health events of some runs as one HTML page that needs no network."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.monitor.metric_table import EPOCH
from jit_accel.report import summary
from jit_accel.report.charts import SMOOTHING, charts_of
from jit_accel.report.runs import Run
from jit_accel.report.sample_sheets import load_sheets

SECTIONS = {
    "loss": "Loss",
    "evaluation": "Generated images",
    "by_t": "Loss by t",
    "optimization": "Optimization",
    "speed": "Speed and memory",
}


def build_page(runs: list[Run]) -> str:
    """Return the whole page: of one run, or of several laid over each other."""
    from plotly.offline import get_plotlyjs

    charts = charts_of(runs)
    sheets = [{"run": i, "sheets": load_sheets(run.folder, len(runs))} for i, run in enumerate(runs)]
    sheets = [of_run for of_run in sheets if of_run["sheets"]]
    data = {
        "runs": [{"label": run.label, "steps": run.step, "epochs": epochs_of(run)} for run in runs],
        "smoothing": SMOOTHING,
        "charts": charts,
        "sheets": sheets,
    }
    findings = summary.health(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return Template(part("page.html")).substitute(
        title=escape(title),
        style=part("page.css"),
        head=summary.header(runs, title),
        findings=findings if len(runs) == 1 else "",
        findings_below=findings if len(runs) > 1 else "",
        sections=sections(charts, bool(sheets)),
        settings=summary.settings(runs),
        data=embedded(data),
        plotly=get_plotlyjs(),
        charts=part("charts.js"),
        script=part("page.js"),
    )


def part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def epochs_of(run: Run) -> dict | None:
    """Return the epoch over the steps, which the charts show at the pointer."""
    if curve := run.measurements.curve(EPOCH):
        points = curve.means()
        known = [(x, y) for x, y in zip(points["x"], points["y"]) if y is not None]
        return {"x": [x for x, _ in known], "y": [y for _, y in known]}
    return None


def sections(charts: list[dict], has_sheets: bool) -> str:
    """Return sections with a place for each chart; the samples stand behind the loss."""
    parts = []
    for name, title in SECTIONS.items():
        inside = "".join(place_of(chart) for chart in charts if chart["section"] == name)
        if inside:
            parts.append(section(name, title, f'<div class="charts">{inside}</div>'))
        if name == "loss" and has_sheets:
            parts.append(section("samples", "Samples", part("samples.html")))
    return "\n".join(parts) or '<p class="card empty">No optimizer step has been logged yet.</p>'


def section(name: str, title: str, inside: str) -> str:
    return f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{inside}</section>'


def place_of(chart: dict) -> str:
    notes = [chart["note"], *(f"{line['name']} {line['value']:g}{chart['unit']}" for line in chart["thresholds"])]
    title, note = escape(chart["title"]), escape(" · ".join(notes))
    unit = f' <span class="unit">{escape(chart["unit"])}</span>' if chart["unit"] else ""
    return (
        f'<figure class="card chart" data-chart="{escape(chart["id"])}"><figcaption><h3>{title}{unit}</h3><p>{note}</p>'
        f'</figcaption><div class="options"></div><div class="plot" role="img" aria-label="{title}"></div></figure>'
    )


def embedded(data: dict) -> str:
    """Return JSON that nothing inside it can break out of: no tag ends or begins in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write_page(page: str, path: Path) -> None:
    """Write so that whoever opens `path` finds a whole page, the old one or the new.

    Raises:
        UserError: it cannot be written there.
    """
    if path.is_dir():
        rule = f"this is a folder; name a file, such as {path / 'report.html'}."
        raise UserError(rule, about="output", value=path)
    with disk_errors("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")
