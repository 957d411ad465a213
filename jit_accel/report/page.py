"""Charts, samples, settings and health events of some runs as one HTML page that needs no network."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.monitor.metric_table import EPOCH
from jit_accel.report import summary
from jit_accel.report.charts import SMOOTHING, charts_of
from jit_accel.report.runs import Run
from jit_accel.report.sample_sheets import load_sheets

FOLDER = Path(__file__).parent
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

    sheets = [{"run": i, "sheets": load_sheets(run.folder, len(runs))} for i, run in enumerate(runs)]
    templates = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return templates.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        labels=[run.label for run in runs],
        data={
            "runs": [{"label": run.label, "steps": run.step, "epochs": epochs_of(run)} for run in runs],
            "smoothing": SMOOTHING,
            "charts": charts_of(runs),
            "sheets": [of_run for of_run in sheets if of_run["sheets"]],
        },
        sections=SECTIONS,
        events=summary.health(runs),
        values=summary.settings(runs),
        summary=summary,
        plotly=Markup(get_plotlyjs()),
        file=lambda name: Markup((FOLDER / name).read_text(encoding="utf-8")),
    )


def epochs_of(run: Run) -> dict | None:
    """Return the epoch over the steps, which the charts show at the pointer."""
    if curve := run.measurements.curve(EPOCH):
        points = curve.means()
        known = [(x, y) for x, y in zip(points["x"], points["y"]) if y is not None]
        return {"x": [x for x, _ in known], "y": [y for _, y in known]}
    return None


def write_page(page: str, path: Path) -> None:
    """Write so that whoever opens `path` finds a whole page, the old one or the new. Raises `UserError`."""
    if path.is_dir():
        rule = f"this is a folder; name a file, such as {path / 'report.html'}."
        raise UserError(rule, about="output", value=path)
    with disk_errors("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")
