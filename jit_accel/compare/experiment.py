"""The folder of a comparison: what it was begun with, and what its finished runs have measured."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jit_accel.base.console import redacted
from jit_accel.base.errors import UserError, changed_settings
from jit_accel.base.files import write_json
from jit_accel.compare.settings import Arm, Measure
from jit_accel.config.identity import WITHOUT_EFFECT
from jit_accel.monitor.log import iterate_metrics
from jit_accel.monitor.metric_table import STEP_TIME

EXPERIMENT_FILE, EVALUATION_FILE = "experiment.json", "evaluation.json"
# What leaves trained weights as they are, but not what is compared: their start, and the defaults of the pipeline.
OF_RESULTS = ("init_from", "guidance_scale", "guidance_on", "num_inference_steps")
SETTLED_SHARE = 0.1  # of a run's steps: the first ones are slower


class RunResult(NamedTuple):
    """The result of a finished run: its metrics by name, and the median time of its steps in seconds."""

    metrics: dict[str, float]
    step_s: float | None


class Experiment:
    """A comparison in its folder, with the lengths that `--equal time` has found.

    Raises `UserError` where the folder holds another one, or something else.
    """

    def __init__(self, folder: Path, arms: Sequence[Arm], measure: Measure, equal: str, launch: str | None):
        self.folder, self.base = folder, arms[0].name
        self.settings = {arm.name: _identity(arm) for arm in arms}
        self.evaluation = {name: redacted(words) for name, words in measure.words().items() if name != "batch_size"}
        self.rules = {"equal": equal, "launch": redacted(launch or "")}
        self.lengths: dict[str, dict] = {}
        self._others: dict[str, dict] = {}
        file = folder / EXPERIMENT_FILE
        if file.exists():
            self._go_on(_read_json(file, dict))
        elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError("holds something else: give a new folder.", about="output_dir", value=folder)

    def save(self) -> None:
        """Write what the comparison is, for later starts. Raises `OSError`."""
        about = {"base": self.base, "settings": self._others | self.settings, **self.about}
        write_json(self.folder / EXPERIMENT_FILE, about)

    @property
    def about(self) -> dict[str, Any]:
        """The rules that all of its runs have in common, and the lengths that were found."""
        return {**self.rules, "evaluation": self.evaluation, "lengths": self.lengths}

    def run_folder(self, name: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / name / f"seed{seed}"

    def result(self, name: str, seed: int) -> RunResult | None:
        """Return the result of a run; None where it is not finished. Raises `UserError` for one that is damaged."""
        folder = self.run_folder(name, seed)
        file = folder / EVALUATION_FILE
        if not file.exists():
            return None
        found = _read_json(file, list)
        metrics = found[0].get("metrics") if found and isinstance(found[0], dict) else None
        if not isinstance(metrics, dict):
            raise UserError(f"{file} holds no result: remove it, and the run is measured again.")
        return RunResult(metrics, median_step_s(folder))

    def _go_on(self, then: dict[str, Any]) -> None:
        """Take over what an earlier start has found; `UserError` where that was another comparison."""
        changes = [] if then.get("base") == self.base else [f"the base was {then.get('base')} and is {self.base} now"]
        changes += changed_settings(then, self.rules)
        measured = then.get("evaluation", {})
        now = dict.fromkeys(measured) | self.evaluation
        changes += [f"--evaluate: {change}" for change in changed_settings(measured, now)]
        known = then.get("settings", {})
        for name, settings in self.settings.items():
            changes += [f"{name}: {change}" for change in changed_settings(known.get(name, settings), settings)]
        if changes:
            more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
            rule = f"holds another comparison: {'; '.join(changes[:3])}{more}."
            remedy = "Give another folder, or what it was begun with."
            raise UserError(rule, about="output_dir", value=self.folder, remedy=remedy)
        self.lengths = dict(then.get("lengths", {}))
        self._others = {name: settings for name, settings in known.items() if name not in self.settings}


def median_step_s(*folders: Path) -> float | None:
    """Return the median time of a step in runs' logs, but for the first ones; None without any."""
    times: list[float] = []
    for folder in folders:
        rows = [row for row in iterate_metrics(folder) if is_number(row.get(STEP_TIME))]
        last = max((row["step"] for row in rows), default=0)
        times += [row[STEP_TIME] for row in rows if row["step"] > SETTLED_SHARE * last]
    return statistics.median(times) if times else None


def is_number(value: object) -> bool:
    """Return True for a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean of positive numbers; None of none."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def _identity(arm: Arm) -> dict[str, Any]:
    ignored = {*WITHOUT_EFFECT, "seed"} - {*OF_RESULTS}
    return {name: value for name, value in arm.recorded.items() if name not in ignored}


def _read_json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from None
    if not isinstance(value, kind):
        raise UserError(f"{file} was not written by jit_accel.compare: give another folder.", about="output_dir")
    return value
