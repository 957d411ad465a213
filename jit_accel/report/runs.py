"""A run's folder: its settings, how far it is, and what it measured, thinned to what a page shows."""

import json
import os
import re
import time
from array import array
from functools import cached_property
from math import exp, isfinite, nan
from pathlib import Path

import numpy as np
import yaml

from jit_accel.base.errors import UserError
from jit_accel.monitor.log import FAILED_FILE, INTERRUPTED_FILE, METRICS_FILE, URL_FILE, iterate_metrics
from jit_accel.monitor.metric_table import ELAPSED, HEALTH, STEP_TIME, WAIT_FRACTION, metric_of, part_of

RECORD_FILE = "run.json"
CONFIG_FILE = "config.yaml"
SILENT_AFTER_S = 1800
MAX_NAMED_FOLDERS = 5
MAX_BUCKETS = 2000
SIGNIFICANT_DIGITS = 5
SHEET_NAME = re.compile(r"step_(\d{1,15})\.png")


class Curve:
    """One measurement over the steps, shown in at most `MAX_BUCKETS` buckets of equal width.

    The width is the smallest power of two that suffices, so that a curve of few points keeps each of them.
    """

    def __init__(self):
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float | None) -> None:
        """Take the value of a step; one that is None or not finite leaves a gap where nothing else is near."""
        try:
            number = nan if value is None else float(value)
        except OverflowError:  # an integer of more than 308 digits
            number = nan
        self.steps.append(step)
        self.values.append(number if isfinite(number) else nan)

    @property
    def latest(self) -> float | None:
        """The last finite value, or None."""
        return next((value for value in reversed(self.values) if isfinite(value)), None)

    @property
    def low(self) -> float:
        """The lowest finite value; NaN where there is none."""
        return float(np.fmin.reduce(self.values))

    @property
    def high(self) -> float:
        return float(np.fmax.reduce(self.values))

    @cached_property
    def _buckets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps and values in order, NaN where one is not finite, and where among them each bucket starts."""
        order = np.argsort(self.steps, kind="stable")
        steps, values = np.array(self.steps)[order], np.array(self.values)[order]
        width = 1
        while np.count_nonzero(np.diff(steps // width)) >= MAX_BUCKETS:
            width *= 2
        return steps, values, np.flatnonzero(np.diff(steps // width, prepend=-1))

    @cached_property
    def _sums(self) -> list[tuple[float, float, int]]:
        """Middle step, sum and number of the finite values of each bucket."""
        steps, values, starts = self._buckets
        middles = (steps[starts] + steps[np.append(starts[1:], len(steps)) - 1]) / 2
        sums = np.add.reduceat(np.nan_to_num(values), starts)
        counts = np.add.reduceat(np.isfinite(values).astype(int), starts)
        return list(zip(middles.tolist(), sums.tolist(), counts.tolist()))

    def means(self, factor: float = 1) -> dict[str, list]:
        """Return each bucket's middle step `x`, mean `y` (None: nothing finite) and number of values `n`."""
        return {
            "x": [plain(middle) for middle, _, _ in self._sums],
            "y": [rounded(factor * total / count) if count else None for _, total, count in self._sums],
            "n": [count for _, _, count in self._sums],
        }

    def extremes(self, factor: float = 1) -> dict[str, list]:
        """Return lowest and highest value of each bucket at their true steps `x`, in order: spikes survive."""
        steps, values, starts = self._buckets
        points: list[int] = []
        for start, bucket in zip(starts.tolist(), np.split(values, starts[1:])):
            ends = {np.nan_to_num(bucket, nan=np.inf).argmin(), np.nan_to_num(bucket, nan=-np.inf).argmax()}
            points += sorted(start + int(end) for end in ends)
        y = [rounded(factor * value) for value in values[points].tolist()]
        return {"x": steps[points].tolist(), "y": y}

    def smoothed_end(self, memory_steps: float) -> float | None:
        """Return the last value of the running mean with this memory, as the page draws it (`smooth` in charts.js)."""
        total = weight = 0.0
        before = None
        for step, bucket_sum, count in self._sums:
            if not count:
                continue
            kept = exp((before - step) / min(memory_steps, step / 10)) if before is not None and memory_steps > 0 else 0
            total, weight, before = total * kept + bucket_sum, weight * kept + count, step
        return total / weight if weight else None


class Run:
    """A run, with its curves by key and its health events by kind.

    `label` is its name among the others, `failure` the error that ended it, `updated` the time of its last row.
    """

    def __init__(self, folder: Path, label: str):
        metrics, failed = folder / METRICS_FILE, folder / FAILED_FILE
        self.folder, self.label, self.settings = folder, label, read_settings(folder)
        self.is_interrupted = (folder / INTERRUPTED_FILE).exists()
        self.failure = failed.read_text(encoding="utf-8", errors="replace").strip() if failed.is_file() else None
        self.updated = metrics.stat().st_mtime if metrics.exists() else None
        self.curves: dict[str, Curve] = {}
        self.events: dict[str, Curve] = {}
        self.step = self.num_rows = 0
        places: dict[str, Curve | None] = {}
        for row in iterate_metrics(folder):
            self.num_rows += 1
            self.step = max(self.step, row["step"])
            for key, value in row.items():
                if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                    continue
                if key not in places:
                    places[key] = self._place_of(key)
                if (place := places[key]) is not None:
                    place.add(row["step"], value)
        self._judge_waiting()

    def _judge_waiting(self) -> None:
        """Find the run starving for data where its whole curve, or the end, is beyond the limit; events need longer."""
        curve, limit = self.curve(WAIT_FRACTION), self.settings.get("health_max_wait")
        is_judged = "data_starving" in self.events or not isinstance(limit, float | int) or limit <= 0
        if curve and not is_judged and max(np.nanmean(curve.values), curve.latest) > limit:
            starving = self.events["data_starving"] = Curve()
            for step, value in zip(curve.steps, curve.values):
                if value > limit:
                    starving.add(step, value)

    def _place_of(self, key: str) -> Curve | None:
        """Return where the values of a key go; None for those that no page shows."""
        if (kind := part_of(key, HEALTH)) is not None:
            return self.events.setdefault(kind, Curve())
        metric = metric_of(key)
        if metric is None or metric.thinned == "nothing":
            return None
        return self.curves.setdefault(key, Curve())

    def curve(self, *keys: str) -> Curve | None:
        """Return the curve of the first of these keys that has a finite value."""
        found = (self.curves.get(key) for key in keys)
        return next((curve for curve in found if curve and curve.latest is not None), None)

    @property
    def total_steps(self) -> int | None:
        """Length of the run in optimizer steps, where it is known."""
        totals = (self.settings.get(key) for key in ("total_steps", "max_steps"))
        return next((total for total in totals if type(total) is int and total > 0), None)

    @property
    def elapsed_s(self) -> float | None:
        """Seconds of all its starts together; of its steps alone where it is older than that count."""
        if elapsed := self.curve(ELAPSED):
            return elapsed.latest
        step_time = self.curve(STEP_TIME)
        return step_time and float(np.nansum(np.diff(step_time.steps, prepend=0) * step_time.values))

    @property
    def url(self) -> str | None:
        """Its page in W&B."""
        file = self.folder / URL_FILE
        text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        return text if re.fullmatch(r"https?://\S+", text) else None

    @property
    def state(self) -> str:
        """failed, finished, interrupted, running, silent (no row for half an hour) or not started."""
        if self.failure:
            return "failed"
        if self.total_steps and self.step >= self.total_steps:
            return "finished"
        if self.is_interrupted:
            return "interrupted"
        if not self.num_rows:
            return "not started"
        is_silent = self.updated is not None and time.time() - self.updated > SILENT_AFTER_S
        return "silent" if is_silent else "running"


def read_runs(folders: list[Path]) -> list[Run]:
    """Read the runs of these folders, each folder once; raise `UserError` for one that holds no run."""
    by_place: dict[Path, Path] = {}
    for folder in folders:
        check_folder(folder)
        by_place.setdefault(folder.resolve(), folder)
    return [Run(folder, label) for folder, label in zip(by_place.values(), distinct_names(list(by_place)))]


def check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):  # Path's own raises where a path is too long
        hint = f"give its folder, {folder.parent}" if os.path.isfile(folder) else "check the path"
        raise UserError(f"{folder}: not a folder; {hint}.")
    if not holds_run(folder):
        raise UserError(f"{folder}: no run in this folder ({METRICS_FILE} or {RECORD_FILE}); {other_folders(folder)}")


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
    for name, parse in ((RECORD_FILE, json.loads), (CONFIG_FILE, yaml.safe_load)):
        try:
            record = parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue
        if isinstance(record, dict):
            # `experiment` is a hash of the others.
            return {str(key): value for key, value in record.items() if key != "experiment"}
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


def find_sheets(folder: Path) -> dict[int, Path]:
    """Return the sheets of a run's folder by step, in order."""
    matches = ((SHEET_NAME.fullmatch(path.name), path) for path in (folder / "samples").glob("*.png"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match and path.is_file()))


def rounded(value: float) -> float | None:
    """Return as many digits as a screen can show; None for what is not finite, such as a sum that overflowed."""
    return plain(float(f"{value:.{SIGNIFICANT_DIGITS}g}")) if isfinite(value) else None


def plain(value: float) -> float | int:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
