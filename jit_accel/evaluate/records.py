"""Results as a table to read and as records in a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from jit_accel import __version__
from jit_accel.base.console import say
from jit_accel.base.errors import UserError
from jit_accel.base.files import disk_errors, write_json
from jit_accel.evaluate.candidate import run_folder_of
from jit_accel.evaluate.settings import EvaluateConfig
from jit_accel.model.card import EVALUATION_FILE

FILE = EVALUATION_FILE  # where the model card looks for it
_SETTINGS = {  # header in the table, and how a value is written
    "guidance_scale": ("guidance", "{:g}"),
    "guidance_interval": ("interval", "{0[0]:g}-{0[1]:g}"),
    "num_inference_steps": ("steps", "{}"),
    "num_images": ("images", "{:,}"),
}


def record_file(config: EvaluateConfig) -> Path | None:
    """Return where the results go: `--output`, or the folder of the model, or of its run, if there is one."""
    if config.output:
        return Path(config.output).expanduser()
    folder = run_folder_of(Path(config.model).expanduser()) if config.model else None
    return folder / FILE if folder is not None and folder.is_dir() and os.access(folder, os.W_OK) else None


def read_records(file: Path | None) -> list[dict]:
    """Read the records of earlier evaluations, [] where there are none yet.

    Raises:
        UserError: the file holds something else, or its folder cannot be written to.
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
    """Add records, with date and versions, to a JSON list; written anew and then renamed.

    Args:
        only_new: leave out those that are there, as a sweep does that goes on or is run again.
    """
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
