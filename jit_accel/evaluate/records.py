"""Results: a table to read, records in a JSON file, and the winner of a sweep as the default of its pipeline folder."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file

from jit_accel import __version__
from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_folder, disk_errors, restore_folder, write_json, write_text
from jit_accel.config.settings import UNAVERAGED
from jit_accel.evaluate.candidate import run_folder_of
from jit_accel.evaluate.settings import EvaluateConfig
from jit_accel.evaluate.sweep import Outcome
from jit_accel.model.card import CARD_FILE, EVALUATION_FILE, refresh_card
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.checkpoints import complete_checkpoints
from jit_accel.model.loading import averages_of, pipeline_of_checkpoint, write_defaults

FILE = EVALUATION_FILE  # where the model card looks for it
_SETTINGS = {  # header in the table, and how a value is written
    "guidance_scale": ("guidance", "{:g}"),
    "guidance_interval": ("interval", "{0[0]:g}-{0[1]:g}"),
    "num_inference_steps": ("steps", "{}"),
    "num_images": ("images", "{:,}"),
}
WEIGHTS = "diffusion_pytorch_model*.safetensors"
BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"
# The card's sentence about the weights; the picture stays, and with it whose it is.
WEIGHTS_SENTENCE = re.compile(
    r"Weights: (?:moving average with decay `(?P<now>[^`]+)`|those of the last step)\."
    r"(?P<space>\s+)The samples above(?: are of decay `(?P<first>[^`]+)`)?: "
)


def record_file(config: EvaluateConfig) -> Path | None:
    """Return where the results go: `--output`, or the folder of the model, or of its run, if there is one."""
    if config.output:
        return Path(config.output).expanduser()
    folder = run_folder_of(Path(config.model).expanduser()) if config.model else None
    return folder / FILE if folder is not None and folder.is_dir() and os.access(folder, os.W_OK) else None


def read_records(file: Path | None) -> list[dict]:
    """Read the records of earlier evaluations, [] where there are none yet.

    Raises `UserError`: the file holds something else, or its folder cannot be written to.
    """
    if file is None:
        return []
    with disk_errors("output", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else "[]"
    try:
        records = json.loads(text)
    except ValueError:
        records = None
    is_ours = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    if not is_ours or not os.access(file.parent, os.W_OK):
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
    found = {"jit_accel": __version__, "torch": torch.__version__}
    for package in ("torch-fidelity", "efficientnet-lite-pytorch"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def table_of(records: list[dict]) -> str:
    """Return the records as lines of text, a metric a column."""
    settings = [key for key in _SETTINGS if key in records[0]]
    metrics = [name for name in records[0]["metrics"] if not name.endswith("_std")]
    rows = [[_SETTINGS[key][0] for key in settings] + metrics]
    for record in records:
        cells = ["" if record[key] is None else _SETTINGS[key][1].format(record[key]) for key in settings]
        rows.append(cells + [_with_deviation(record["metrics"], name) for name in metrics])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _with_deviation(found: dict[str, float], name: str) -> str:
    deviation = found.get(f"{name}_std")
    return f"{found[name]:.5g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def pipeline_folder_of(model: str, checkpoint: Path | None) -> Path | None:
    """Return the pipeline folder that a result for this model may change: itself, or `pipeline` in the run's folder.

    None for the Hub, and for a checkpoint that is not its run's newest, unless the folder was made of it.
    """
    folder = Path(model).expanduser()
    if (folder / INDEX_FILE).is_file():
        return folder
    run = run_folder_of(folder)
    pipeline = run / "pipeline"
    if not (run / "checkpoints").is_dir() and not pipeline.is_dir():
        return None
    if checkpoint is None or complete_checkpoints(checkpoint.parent)[-1].name == checkpoint.resolve().name:
        return pipeline
    return pipeline if any(holds(pipeline, checkpoint, ema) for ema in (*averages_of(checkpoint), UNAVERAGED)) else None


def holds(folder: Path, checkpoint: Path, ema: str) -> bool:
    """Return True where a pipeline folder has exactly these weights of a checkpoint."""
    held = {}
    for file in sorted((folder / "transformer").glob(WEIGHTS)):
        held |= load_file(file)
    if not held:
        return False
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

    def write_settings(into: Path) -> None:
        write_defaults(into, **{name: value for name, value in setting.sampling.items() if value is not None})
        change_card(into, write_card)

    def write_card(card: Path) -> None:
        text = card.read_text(encoding="utf-8")
        if replaces and not is_new:
            text = with_average(text, setting.ema)
        write_text(card, with_defaults(text, outcome))

    if replaces:
        with atomic_folder(folder) as temporary:
            pipeline_of_checkpoint(checkpoint, setting.ema).save_pretrained(temporary, safe_serialization=True)
            for path in folder.iterdir() if folder.exists() else ():  # what else the folder held stays in it
                if not (temporary / path.name).exists():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary / path.name)
            write_settings(temporary)
    else:
        write_settings(folder)
    weights = f", with the weights {setting.ema}" if replaces else ""
    return f"Pipeline:  {folder} {'made' if is_new else 'has new defaults'}{weights}"


def publish(records: Iterable[dict], folder: Path, file: Path | None, *, only_new: bool = False) -> None:
    """Add records to those of a pipeline folder, unless `file` is that one and has them, and show them on its card."""
    if file is None or file.resolve() != (folder / FILE).resolve():
        add_records(records, folder / FILE, only_new=only_new)
    change_card(folder, lambda _: refresh_card(folder))


def change_card(folder: Path, change: Callable[[Path], None]) -> None:
    """Change the model card of a pipeline folder, if it has one; warn where that fails."""
    card = folder / CARD_FILE
    if card.is_file():
        try:
            change(card)
        except (OSError, ValueError) as error:
            warn(f"{card} cannot be brought up to date ({error}).")


def with_average(text: str, ema: str) -> str:
    """Return the card with its sentence about the weights changed."""
    weights = "those of the last step" if ema == UNAVERAGED else f"moving average with decay `{ema}`"

    def replaced(match: re.Match) -> str:
        of = match["first"] or match["now"]
        whose = f" are of decay `{of}`" if of and of != ema else ""
        return f"Weights: {weights}.{match['space']}The samples above{whose}: "

    return WEIGHTS_SENTENCE.sub(replaced, text)


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
