"""Results to keep: tables, records in a JSON file and on a card, a sweep's files, its winner in the pipeline folder."""

import csv
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file

from jit_accel import __version__
from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, atomic_folder, disk_errors, restore_folder, write_json, write_text
from jit_accel.config.groups import UNAVERAGED, width_of
from jit_accel.evaluate.sweep import Outcome, noise_of
from jit_accel.evaluate.sweep_chart import draw_sweep, has_several_solvers, scales_of, widths_of
from jit_accel.model.card import CARD_FILE, EVALUATION_FILE, HIGH, LOW, interval_of, refresh_card, weights_in_words
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.checkpoints import complete_checkpoints
from jit_accel.model.loading import PIPELINE_FOLDER, averages_of, pipeline_of_checkpoint, write_defaults
from jit_accel.model.solvers import SOLVERS

_SETTINGS = {  # header in the table, and how a value is written
    "scored": ("", "{}"),
    "guidance_scale": ("guidance", "{:g}"),
    "guidance_interval": ("interval", "{0[0]:g}-{0[1]:g}"),
    "num_inference_steps": ("steps", "{}"),
    "num_images": ("images", "{:,}"),
}
WEIGHTS = "diffusion_pytorch_model*.safetensors"
BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"
# The card's sentence about the weights; the picture stays, and with it whose it is.
WEIGHTS_SENTENCE = re.compile(
    r"Weights: (?:moving average with decay `(?P<now>[^`]+)`|power-function average of relative width [\d.]+|"
    r"those of the last step)\.(?P<space>\s+)The samples above(?: are of decay `(?P<first>[^`]+)`)?: "
)


def read_records(file: Path | None) -> list[dict]:
    """Read the records of earlier evaluations, [] where there are none yet; UserError if none can be added to them."""
    if file is None:
        return []
    with disk_errors("output", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else "[]"
        tempfile.TemporaryFile(dir=file.parent).close()
    try:
        records = json.loads(text)
    except ValueError:
        records = None
    is_ours = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    if not is_ours:
        raise UserError("results cannot be added to it: give another file.", about="output", value=file)
    return records


def add_records(records: Iterable[dict], file: Path | None, *, only_new: bool = False) -> None:
    """Add records, with date and versions, to a JSON list; `only_new` leaves out those that are there already."""
    if file is None:
        return
    stamp = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions()}
    known = read_records(file)
    bare = [{name: value for name, value in record.items() if name not in stamp} for record in known]
    new = [record for record in records if not only_new or json.loads(json.dumps(record)) not in bare]
    with disk_errors("output", file):
        write_json(file, [*known, *({**record, **stamp} for record in new)])
    say(f"Results: {file}")


def versions() -> dict[str, str | None]:
    """Return the versions of what the numbers depend on."""
    packages = dict.fromkeys(("torch-fidelity", "efficientnet-lite-pytorch", "torchmetrics"))
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            packages[package] = metadata.version(package)
    return {"jit_accel": __version__, "torch": torch.__version__, **packages}


def keep(found: list[dict], file: Path | None, weights: str | None) -> None:
    """Say records and add them to the file, and to the model card where the `weights` are a pipeline folder's."""
    say(table_of(found))
    add_records(found, file)
    folder = Path(weights or "").expanduser()
    if weights and (folder / INDEX_FILE).is_file() and os.access(folder, os.W_OK):
        publish(found, folder, file)
        if found[0].get("on_card") is False:
            say("Card:    unchanged, since these are few images: --few_on_card shows them there all the same.")


def publish(records: Iterable[dict], folder: Path, file: Path | None, *, only_new: bool = False) -> None:
    """Add records to those of a pipeline folder, unless `file` is that one and has them, and show them on its card."""
    if file is None or file.resolve() != (folder / EVALUATION_FILE).resolve():
        add_records(records, folder / EVALUATION_FILE, only_new=only_new)
    change_card(folder, lambda _: refresh_card(folder))


def change_card(folder: Path, change: Callable[[Path], None]) -> None:
    """Change the model card of a pipeline folder, if it has one; warn where that fails."""
    card = folder / CARD_FILE
    if card.is_file():
        try:
            change(card)
        except (OSError, ValueError) as error:
            warn(f"{card} cannot be brought up to date ({error}).")


def table_of(records: list[dict]) -> str:
    """Return the records as lines of text, a metric a column."""
    settings = [key for key in _SETTINGS if key in records[0]]
    metrics = [name for name in records[0]["metrics"] if not name.endswith(("_std", LOW, HIGH))]
    rows = [[_SETTINGS[key][0] for key in settings] + metrics]
    for record in records:
        cells = ["" if record[key] is None else _SETTINGS[key][1].format(record[key]) for key in settings]
        found = record["metrics"]
        rows.append(
            cells + [f"{found[name]:.5g}{interval_of(found, name) or _deviation(found, name)}" for name in metrics]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _deviation(found: dict[str, float], name: str) -> str:
    return f" ± {found[f'{name}_std']:.2g}" if f"{name}_std" in found else ""


def write_sweep_files(outcome: Outcome, folder: Path, about: dict) -> list[Path]:
    """Write all of them into `folder`, each whole or not at all, and return their paths; `about` is JSON's head."""
    texts = {
        "sweep.json": json.dumps(about | outcome.plain(), indent=1),
        "sweep.csv": as_csv(outcome),
        "sweep.md": as_markdown(outcome) + "\n\n" + verdict(outcome) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    with atomic_file(folder / "sweep.png") as temporary:
        draw_sweep(outcome, temporary)
    return [folder / name for name in (*texts, "sweep.png")]


def as_csv(outcome: Outcome) -> str:
    """Return a line for each measurement, over all images first."""
    text, best = io.StringIO(), outcome.best
    columns = [*best.place(), *outcome.metrics, "is_best"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for one in [*outcome.full, *outcome.few]:
        interval = one.setting.interval_text("{:g}:{:g}")
        writer.writerow({**one.plain(), "guidance_interval": interval, "is_best": int(one is best)})
    return text.getvalue()


def as_markdown(outcome: Outcome) -> str:
    """Return the grid in its order; beside the values of few images stand those of all."""
    metrics = [name for name in outcome.metrics if not name.endswith((LOW, HIGH))]
    full = {one.setting: one for one in outcome.full}
    rows = outcome.few or outcome.full
    has_ema = any(one.setting.ema for one in rows)
    has_solver, has_shift = has_several_solvers(rows), len({one.setting.time_shift for one in rows}) > 1
    heads = [*["ema"] * has_ema, *["steps", "method"] * has_solver, *["shift"] * has_shift, "interval", "guidance"]
    heads += [f"{outcome.select}, {one.num_images:,} images" for one in outcome.few[:1]]
    heads += [f"{metric}, {outcome.full[0].num_images:,} images" for metric in metrics]
    lines = [heads, ["---:" for _ in heads]]
    for one in rows:
        setting, measured = one.setting, full.get(one.setting)
        cells = [*[setting.ema or ""] * has_ema, *[str(setting.num_inference_steps), setting.method] * has_solver]
        cells += [f"{setting.time_shift:g}"] * has_shift
        cells += [setting.interval_text(), f"{setting.guidance_scale:g}"]
        cells += [_number(one.values[outcome.select])] if outcome.few else []
        cells += [_with_interval(measured.values, metric) if measured else "" for metric in metrics]
        is_best = measured is outcome.best
        lines.append([f"**{cell}**" if is_best and cell else cell for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(outcome: Outcome) -> str:
    """Say who won, by how much, and who might have."""
    best, unguided, select = outcome.best, outcome.best_unguided, outcome.select
    lines = [
        f"Best {select} over {best.num_images:,} images: {_with_interval(best.values, select)} with {best.setting}."
    ]
    if unguided is not None and unguided is not best:
        lines.append(f"Without guidance: {_with_interval(unguided.values, select)} with {unguided.setting}.")
    if near := outcome.not_told_apart:
        those = "; ".join(f"{one.setting} ({_number(one.values[select])})" for one in near)
        lines.append(f"Within {noise_of(best.num_images):.1%} of it, which other noise may turn around: {those}.")
    for what, at in (("guidance scales", edges(outcome)), ("widths", edge_of_widths(outcome))):
        if at:
            lines.append(f"It lies at the {at} of the {what}: a wider range may hold a better one.")
    return "\n".join(lines)


def edges(outcome: Outcome) -> str | None:
    """Return the end of the guidance scales that the winner lies at, where there are three or more."""
    best = outcome.best.setting
    return None if best.is_unguided else _end_of(scales_of(outcome), best.guidance_scale)


def edge_of_widths(outcome: Outcome) -> str | None:
    """Return the end of the averages' widths that the winner lies at, where there are three or more."""
    return _end_of(widths_of(outcome), width_of(outcome.best.setting.ema or ""))


def _end_of(values: list[float], value: float | None) -> str | None:
    return {values[0]: "lower end", values[-1]: "upper end"}.get(value) if len(values) >= 3 else None


def _with_interval(values: dict[str, float], name: str) -> str:
    ends = [_number(values.get(name + end)) for end in (LOW, HIGH)]
    return _number(values.get(name)) + (" [{}, {}]".format(*ends) if all(ends) else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def run_folder_of(folder: Path) -> Path:
    """Return the folder of the run that owns this checkpoint, which is sealed; any other folder itself."""
    place = folder.resolve()
    return folder.parent.parent if folder.parent.name == place.parent.name == "checkpoints" else folder


def pipeline_folder_of(model: str, checkpoint: Path | None) -> Path | None:
    """Return the pipeline folder that a result for this model may change: itself, or `pipeline` in the run's folder.

    None for the Hub, and for a checkpoint that is not its run's newest, unless the folder was made of it.
    """
    folder = Path(model).expanduser()
    if (folder / INDEX_FILE).is_file():
        return folder
    run = run_folder_of(folder)
    pipeline = run / PIPELINE_FOLDER
    if not (run / "checkpoints").is_dir() and not pipeline.is_dir():
        return None
    if checkpoint is None or complete_checkpoints(checkpoint.parent)[-1].name == checkpoint.resolve().name:
        return pipeline
    return pipeline if any(holds(pipeline, checkpoint, ema) for ema in (*averages_of(checkpoint), UNAVERAGED)) else None


def holds(folder: Path, checkpoint: Path, ema: str) -> bool:
    """Return True where a pipeline folder has exactly these weights of a checkpoint."""
    files = (folder / "transformer").glob(WEIGHTS)
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wanted = pipeline_of_checkpoint(checkpoint, ema).transformer.state_dict()
    return held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in wanted)


def write_winner(checkpoint: Path | None, folder: Path, outcome: Outcome) -> str:
    """Make the winner the default of this pipeline folder, weights included, and return what was done in words.

    The averages that were compared are the checkpoint's; None: the folder's own weights. Raises `OSError`.
    """
    restore_folder(folder)
    setting, is_new = outcome.best.setting, not (folder / INDEX_FILE).is_file()
    comes_from_there = checkpoint is not None and setting.ema is not None
    replaces = comes_from_there and (is_new or not holds(folder, checkpoint, setting.ema))

    def write_card(card: Path) -> None:
        text = card.read_text(encoding="utf-8")
        if replaces and not is_new:
            text = with_average(text, setting.ema)
        write_text(card, with_defaults(text, outcome))

    with atomic_folder(folder) if replaces else nullcontext(folder) as place:
        if replaces:
            pipeline_of_checkpoint(checkpoint, setting.ema).save_pretrained(place, safe_serialization=True)
            for path in folder.iterdir() if folder.exists() else ():  # what else the folder held stays in it
                if not (place / path.name).exists():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, place / path.name)
        found = {name: value for name, value in setting.sampling.items() if value is not None}
        if setting.method not in SOLVERS:
            del found["method"]  # the folder's scheduler, one of diffusers
        write_defaults(place, **found)
        change_card(place, write_card)
    weights = f", with the weights {setting.ema}" if replaces else ""
    return f"Pipeline:  {folder} {'made' if is_new else 'has new defaults'}{weights}"


def with_average(text: str, ema: str) -> str:
    """Return the card with its sentence about the weights changed."""
    if (match := WEIGHTS_SENTENCE.search(text)) is None:
        return text
    of = match["first"] or match["now"]
    whose = f" are of decay `{of}`" if of and of != ema else ""
    return text.replace(match[0], f"Weights: {weights_in_words(ema)}.{match['space']}The samples above{whose}: ")


def with_defaults(text: str, outcome: Outcome) -> str:
    """Return the card with a paragraph on the defaults, in place of an earlier sweep's."""
    best, unguided, select = outcome.best, outcome.best_unguided, outcome.select
    without = f", {unguided.values[select]:.4g} without guidance" if unguided and unguided is not best else ""
    block = (
        f"{BEGIN}\nDefaults: {best.setting}. They won a sweep by {select} over {best.num_images:,} images: "
        f"{best.values[select]:.4g}{without}.\n{END}"
    )
    marked, count = re.subn(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)
    if count:
        return marked
    heading = re.search(r"^## (Training|Origin)$", text, re.MULTILINE)
    at = heading.start() if heading else len(text)
    return f"{text[:at].rstrip()}\n\n{block}\n\n{text[at:]}".rstrip() + "\n"
