"""A run's folder: its settings, how far it is, and what it measured."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from jit_accel.base.errors import UserError
from jit_accel.monitor.log import FAILED_FILE, INTERRUPTED_FILE, METRICS_FILE
from jit_accel.report.curves import Measurements, read_measurements
from jit_accel.report.sample_sheets import find_sheets

RECORD_FILE = "run.json"
CONFIG_FILE = "config.yaml"
SILENT_AFTER_S = 1800
MAX_NAMED_FOLDERS = 5


@dataclass
class Run:
    """A run. `label` is its name among the others, `failure` the error that ended it, `updated` its last row's time."""

    folder: Path
    label: str
    settings: dict
    measurements: Measurements
    is_interrupted: bool
    failure: str | None
    updated: float | None

    @property
    def name(self) -> str:
        return str(self.settings.get("wandb_name") or self.folder.name)

    @property
    def step(self) -> int:
        return self.measurements.last_step

    @property
    def total_steps(self) -> int | None:
        """Length of the run in optimizer steps, where it is known."""
        totals = (self.settings.get(key) for key in ("total_steps", "max_steps"))
        return next((total for total in totals if type(total) is int and total > 0), None)

    @property
    def state(self) -> str:
        """failed, finished, interrupted, running, silent (no row for half an hour) or not started."""
        if self.failure:
            return "failed"
        if self.total_steps and self.step >= self.total_steps:
            return "finished"
        if self.is_interrupted:
            return "interrupted"
        if not self.measurements.num_rows:
            return "not started"
        is_silent = self.updated is not None and time.time() - self.updated > SILENT_AFTER_S
        return "silent" if is_silent else "running"


def read_runs(folders: list[Path]) -> list[Run]:
    """Read the runs of these folders, each folder once; raise `UserError` for one that holds no run."""
    by_place: dict[Path, Path] = {}
    for folder in folders:
        by_place.setdefault(folder.resolve(), folder)
    labels = distinct_names(list(by_place))
    return [read_run(folder, place, label) for (place, folder), label in zip(by_place.items(), labels)]


def read_run(given: Path, folder: Path, label: str) -> Run:
    if not folder.is_dir():
        hint = f"give its folder, {given.parent}" if folder.is_file() else "check the path"
        raise UserError(f"{given}: not a folder; {hint}.")
    if not holds_run(folder):
        raise UserError(f"{given}: no run in this folder ({METRICS_FILE} or {RECORD_FILE}); {other_folders(given)}")
    metrics, failed = folder / METRICS_FILE, folder / FAILED_FILE
    return Run(
        folder=given,
        label=label,
        settings=read_settings(folder),
        measurements=read_measurements(folder),
        is_interrupted=(folder / INTERRUPTED_FILE).exists(),
        failure=failed.read_text(encoding="utf-8", errors="replace").strip() if failed.is_file() else None,
        updated=metrics.stat().st_mtime if metrics.exists() else None,
    )


def holds_run(folder: Path) -> bool:
    files = (METRICS_FILE, RECORD_FILE, CONFIG_FILE)
    return any((folder / name).is_file() for name in files) or bool(find_sheets(folder))


def other_folders(folder: Path) -> str:
    """Say which folder to give instead of one that holds no run."""
    inside = [child for child in sorted(folder.iterdir()) if child.is_dir() and holds_run(child)]
    if not inside:
        return "give the --output_dir of a training."
    more = f" ... ({len(inside)} in all)" if len(inside) > MAX_NAMED_FOLDERS else ""
    return "give one or more of those inside it: " + " ".join(map(str, inside[:MAX_NAMED_FOLDERS])) + more


def read_settings(folder: Path) -> dict:
    """Read the record of the run, else its settings alone; empty where neither can be read."""
    import yaml

    for name, parse in ((RECORD_FILE, json.loads), (CONFIG_FILE, yaml.safe_load)):
        try:
            record = parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue
        if isinstance(record, dict):
            return {str(key): value for key, value in record.items()}
    return {}


def distinct_names(folders: list[Path]) -> list[str]:
    """Return the folders' names, with as many parents before them as tell those of equal names apart."""
    names = []
    for folder in folders:
        depth = 1
        while sum(other.parts[-depth:] == folder.parts[-depth:] for other in folders) > 1:
            depth += 1
        names.append("/".join(folder.parts[-depth:]))
    return names
