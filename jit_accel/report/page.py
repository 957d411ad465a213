"""Some runs as one HTML page that needs no network: its words and numbers, put into the templates beside this file."""

import base64
import io
import json
import re
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from math import isnan
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.base.image_rows import without_paper
from jit_accel.config.presets import in_pixels
from jit_accel.config.settings import GROUPS, SETTINGS
from jit_accel.monitor import metric_table as metrics
from jit_accel.monitor.health import KINDS
from jit_accel.report.charts import SMOOTHING, charts_of, event_name, title_of
from jit_accel.report.runs import Curve, Run, find_sheets

FOLDER = Path(__file__).parent
GROUP_TITLES = {"Optim": "Optimization", "Sample": "Samples", "Sheet": "Samples", "Eval": "Evaluation"}
NAMES = {"output_dir", "wandb_name", "wandb_notes", "wandb_tags"}
UNKNOWN_KIND = "Not known to this version of the report."
WORSE_BELOW = {"grad_vanishing"}  # of other kinds the highest value is the worst

MAX_SHEETS = 24
MAX_SHEETS_ON_PAGE = 72
MIN_SHEETS = 4
# A page of 15 MB less plotly's 5, in base64.
BYTES_ON_PAGE = 6_500_000
SIZES = ((1600, 82), (1280, 78), (960, 75), (720, 70), (480, 60), (320, 40))  # longest side in pixels, WebP quality


def build_page(runs: list[Run]) -> str:
    """Return the whole page: of one run, or of several laid over each other."""
    from plotly.offline import get_plotlyjs

    sheets = [{"run": i, "sheets": load_sheets(run.folder, len(runs))} for i, run in enumerate(runs)]
    how = {"autoescape": True, "trim_blocks": True, "keep_trailing_newline": True}
    templates = Environment(loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, **how)
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    templates.globals |= {words.__name__: words for words in (facts, progress, numbers, findings, run_cells, groups)}
    return templates.get_template("page.html").render(
        title=f"{len(runs)} runs" if len(runs) > 1 else runs[0].settings.get("wandb_name") or runs[0].folder.name,
        runs=runs,
        labels=[run.label for run in runs],
        data={
            "runs": [{"label": run.label, "steps": run.step, "epochs": epochs_of(run)} for run in runs],
            "smoothing": SMOOTHING,
            "charts": charts_of(runs),
            "sheets": [of_run for of_run in sheets if of_run["sheets"]],
        },
        events=health(runs),
        values=settings(runs),
        plotly=Markup(get_plotlyjs()),
        file=lambda name: Markup((FOLDER / name).read_text(encoding="utf-8")),
    )


def epochs_of(run: Run) -> dict | None:
    """Return the epoch over the steps, which the charts show at the pointer."""
    if not (curve := run.curve(metrics.EPOCH)):
        return None
    points = curve.means()
    x, y = zip(*((x, y) for x, y in zip(points["x"], points["y"]) if y is not None))
    return {"x": x, "y": y}


def write_page(page: str, path: Path) -> None:
    """Write so that whoever opens `path` finds a whole page, the old one or the new. Raises `UserError`."""
    if path.is_dir():
        rule = f"this is a folder; name a file, such as {path / 'report.html'}."
        raise UserError(rule, about="output", value=path)
    with disk_errors("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")


def facts(run: Run) -> list[str]:
    """Return model, size, data and devices, as far as they are known."""
    known = run.settings
    counts = {name: known[name] for name in known if is_count(known[name])}
    found = []
    if known.get("model"):
        parameters = f" ({short(counts['num_parameters'])} parameters)" if "num_parameters" in counts else ""
        found.append(f"{known['model']}{parameters}")
    if known.get("img_size"):
        found.append(f"{in_pixels(known['img_size'])} px")
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
    if curve := run.curve(metrics.EPOCH):
        parts.append(f"epoch {curve.high:.2f}")
    if run.elapsed_s is not None:
        parts.append(f"trained for {duration(run.elapsed_s)}")
    step_time = run.curve(metrics.STEP_TIME)
    if run.state == "running" and run.total_steps and step_time:
        parts.append(f"{duration((run.total_steps - run.step) * step_time.latest)} to go")
    if run.updated is not None:
        parts.append(f"last row {datetime.fromtimestamp(run.updated, timezone.utc):%Y-%m-%d %H:%M} UTC")
    return parts


def numbers(run: Run) -> list[tuple[str, str, str]]:
    """Return name, value and remark of each tile."""
    curve_of = run.curve
    found = [("Loss", number(current_loss(run)), "running mean")]
    if best := best_epoch(run):
        found.append(("Best epoch", number(best.low), "mean loss of an epoch"))
    names = {metrics.VAL_LOSS: "Validation", metrics.EMA_VAL_LOSS: "Validation, EMA"}
    for key in sorted(run.curves):
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
    return ", ".join(event_name(name).lower() for name in run.events) or "nothing noticed"


def current_loss(run: Run) -> float | None:
    curve = run.curve(metrics.TRAIN_LOSS)
    return curve.smoothed_end(SMOOTHING * run.step) if curve else None


def best_epoch(run: Run) -> Curve | None:
    return run.curve(metrics.BEST_LOSS, metrics.EPOCH_LOSS)


def run_cells(run: Run) -> list[str]:
    """Return a run's cells in the table of several, between its state and its health."""
    best = best_epoch(run)
    latest = map(run.curve, (metrics.VAL_LOSS, metrics.EMA_VAL_LOSS, metrics.IMAGES_PER_SECOND))
    step = f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else "")
    values = [current_loss(run), best and best.low, *(curve and curve.latest for curve in latest)]
    return [step, "–" if run.elapsed_s is None else duration(run.elapsed_s), *map(number, values)]


def health(runs: list[Run]) -> list[dict[str, str]]:
    """Return the rows of the table of health events, by the heads of its columns; each kind of a run once."""
    rows = []
    for run in runs:
        for name, event in run.events.items():
            first, last = event.steps[0], event.steps[-1]
            row = {"Run": run.label} if len(runs) > 1 else {}
            row["What"] = Markup("<strong>{}</strong> <code>health/{}</code>").format(event_name(name), name)
            row["Count"] = f"{len(event.steps):,}×"
            row["Step"] = f"{first:,}" if first == last else f"{first:,} – {last:,}"
            kind, worst = KINDS.get(name), event.low if name in WORSE_BELOW else event.high
            row["At worst"] = kind.describe(worst) if kind else number(worst)
            row["Likely cause and remedy"] = with_flags(kind.remedy if kind else UNKNOWN_KIND)
            rows.append(row)
    return rows


def with_flags(remedy: str) -> Markup:
    """Return the likely cause and what to do, with its flags marked."""
    return Markup(re.sub(r"--\w+", r"<code>\g<0></code>", str(escape(remedy[:1].upper() + remedy[1:]))))


def settings(runs: list[Run]) -> dict[str, list[str | None]]:
    """Return the value of every setting in each of the runs; None where it is not recorded."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return {name: [shown(run.settings[name]) if name in run.settings else None for run in runs] for name in names}


def groups(values: dict[str, list[str | None]]) -> list[tuple[str, list[str], str]]:
    """Return title, settings and kind of each group: first those that differ, then by the groups of a configuration.

    Of those that differ, facts and the names of a run, which mostly do, are the last.
    Those that are the same in all runs have the kind "same"; facts, which are no settings, are the first of them.
    """
    partial = [name for name in values if None in values[name]]
    differing = [name for name in values if name not in partial and len(set(values[name])) > 1]
    differing.sort(key=lambda name: name not in SETTINGS or name in NAMES)
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


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def is_count(value) -> bool:
    return type(value) is int and value >= 0


def number(value: float | None) -> str:
    return "–" if value is None or isnan(value) else f"{value:.4g}"


def short(value: float) -> str:
    """Return 1234567 as 1.23M."""
    for limit, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- samples


def load_sheets(folder: Path, num_runs: int = 1) -> list[dict]:
    """Load some sheets of a run, evenly spaced in time, with the first and the newest that can be read.

    Returns of each, in order, the `step`, `src` (a data URI of WebP), `width` and `height` in pixels, and the share of
    the width that its `names` take; fewer and smaller ones where several runs share the page.
    """
    count = max(MIN_SHEETS, min(MAX_SHEETS, MAX_SHEETS_ON_PAGE // num_runs))
    max_bytes = BYTES_ON_PAGE // (count * num_runs)
    paths, loaded = find_sheets(folder), {}
    for step in evenly_spaced(list(paths), count):
        nearest = sorted((other for other in paths if other not in loaded), key=lambda other: abs(other - step))
        for candidate in nearest[:MIN_SHEETS]:  # the next one for a sheet that is broken or being written
            if sheet := encode(paths.pop(candidate), max_bytes):
                loaded[candidate] = {"step": candidate, **sheet}
                break
    return [loaded[step] for step in sorted(loaded)]


def evenly_spaced(steps: list[int], count: int) -> list[int]:
    """Return the steps nearest to `count` points evenly spaced between the first and the last."""
    if len(steps) <= count:
        return steps
    first, last = steps[0], steps[-1]
    points = [first + i * (last - first) / (count - 1) for i in range(count)]
    return sorted({min(steps, key=lambda step: abs(step - point)) for point in points})


def encode(path: Path, max_bytes: int) -> dict | None:
    """Return a sheet as a data URI of about `max_bytes` before base64 at most; None where it cannot be read."""
    try:
        data = path.read_bytes()
        Image.open(io.BytesIO(data)).verify()  # decoding a PNG looks at no checksum
        picture, names_end = without_paper(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    for side, quality in SIZES:
        small, file = picture.copy(), io.BytesIO()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small.save(file, "WEBP", quality=quality, method=2)
        if file.tell() <= max_bytes:
            break
    src = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"src": src, "width": small.width, "height": small.height, "names": names_end / picture.width}
