"""`jit_accel.compare`: run after run, seed by seed, each in a process of its own, and what they come to."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jit_accel.base.console import in_words, say, warn
from jit_accel.base.errors import StopRequest, shown
from jit_accel.base.files import disk_errors
from jit_accel.base.folder_lock import FolderLock
from jit_accel.compare.children import last_lines, run_command
from jit_accel.compare.experiment import EVALUATION_FILE, Experiment, is_number
from jit_accel.compare.outcome import Comparison, outcome_of
from jit_accel.compare.output_files import as_text, write_outcome
from jit_accel.compare.settings import Arm, CompareConfig, Measure, differences, read_arms, read_measure
from jit_accel.compare.step_time import settle_lengths

GO_ON = "give the same command again"
MOST_DIFFERENCES = 8  # named of each setting


class RunFailure(Exception):
    """A run has failed, which the log has the reason of."""


def compare(settings: CompareConfig, texts: Sequence[str], common: list[str]) -> int:
    """Compare what the words name; return the exit code. Raises `UserError`, `Stopped`."""
    arms = read_arms(texts, common, settings.equal)
    measure = read_measure(settings, arms)
    folder = Path(settings.output_dir).expanduser()
    experiment = Experiment(folder, arms, measure, settings.equal, settings.launch)
    _introduce(settings, arms, measure)
    with FolderLock(folder).held(), disk_errors("output_dir", folder, GO_ON), StopRequest() as stop:
        experiment.save()
        return Schedule(settings, experiment, arms, measure, stop).run()


class Schedule:
    """The runs of a comparison, in turn: all settings of a seed, then of the next one."""

    def __init__(
        self, settings: CompareConfig, experiment: Experiment, arms: list[Arm], measure: Measure, stop: StopRequest
    ):
        self.settings, self.experiment, self.arms, self.measure = settings, experiment, arms, measure
        self.stop = stop
        self.launcher = shlex.split(settings.launch) if settings.launch else [sys.executable]
        self.failed: list[str] = []

    def run(self) -> int:
        """Run what is not finished, and say what all of it comes to. Returns the exit code; raises `Stopped`."""
        try:
            if self.settings.equal == "time":
                settle_lengths(self.experiment, self.arms, self.settings.time_steps, self._train)
            self._run_all()
        except RunFailure as failure:  # of the base, without which there is nothing to compare with
            self.failed.append(str(failure))
        finally:
            self._report()
        for failure in self.failed:
            say(f"error: {failure}", sys.stderr)
        return 1 if self.failed else 0

    def outcome(self) -> Comparison:
        """Return what the finished runs come to."""
        return outcome_of(self.experiment, self.arms, self.measure, self.settings.seeds)

    def _run_all(self) -> None:
        runs = [(arm, seed) for seed in range(self.settings.seeds) for arm in self.arms]
        left = [(arm, seed) for arm, seed in runs if not self._is_finished(arm, seed)]
        if len(left) < len(runs):
            say(f"{len(runs) - len(left)} of {len(runs)} runs are finished already.")
        lost: set[str] = set()
        began, done = time.monotonic(), 0
        for number, (arm, seed) in enumerate(left):
            if arm.name in lost:
                continue
            rest = (time.monotonic() - began) / done * (len(left) - number) if done else None
            say(
                f"[{len(runs) - len(left) + number + 1}/{len(runs)}] {arm.name}, seed {seed}"
                + (f"; {in_words(rest)} left" if rest else "")
            )
            try:
                self._run(arm, seed)
                done += 1
            except RunFailure as failure:
                if arm is self.arms[0]:
                    raise
                warn(f"{failure} The other settings go on without it.")
                self.failed.append(str(failure))
                lost.add(arm.name)

    def _is_finished(self, arm: Arm, seed: int) -> bool:
        """Return False too where the deciding metric is not finite: then the run is tried again."""
        result = self.experiment.result(arm.name, seed)
        return result is not None and is_number(result.metrics.get(self.measure.metric))

    def _run(self, arm: Arm, seed: int) -> None:
        """Train and measure one run, and say what it came to."""
        folder = self.experiment.run_folder(arm.name, seed)
        own: dict[str, object] = {"seed": seed, "output_dir": folder, "resume": "auto"}
        if length := self.experiment.lengths.get(arm.name):
            own["max_steps"] = length["steps"]
        if arm.uses_wandb:
            own |= {"wandb_name": f"{arm.name}-seed{seed}", "wandb_group": arm.recorded["wandb_group"] or arm.name}
        what = f"{arm.name}, seed {seed}"
        self._train(what, arm.flags(**own), folder)
        (folder / EVALUATION_FILE).unlink(missing_ok=True)  # of a result that was not finite
        flags = [*self.measure.flags, f"--model={folder}", f"--output={folder / EVALUATION_FILE}"]
        self._start(what, "evaluate", flags, folder.parent / f"{folder.name}.log")
        outcome = self.outcome()
        (found,) = (one for one in outcome.arms if one.name == arm.name)
        value = found.values.get(seed)
        if value is None:
            known = ", ".join(found.metrics.get(seed, {})) or "none"
            raise RunFailure(f"{what}: {self.measure.metric} is not among its finite results ({known}).")
        beside = f", {found.differences[seed]:+.4g} beside {outcome.base.name}" if seed in found.differences else ""
        say(f"    {self.measure.metric} {value:.5g}{beside}")
        write_outcome(outcome, self.experiment.folder, with_plot=False)

    def _train(self, what: str, flags: list[str], folder: Path) -> None:
        # Beside the run's folder, which has to hold nothing before a run.
        self._start(what, "train", flags, folder.parent / f"{folder.name}.log")

    def _start(self, what: str, program: str, flags: list[str], log: Path) -> None:
        """Run a program of ours to its end. Raises `RunFailure`, or `Stopped` once a signal has come."""
        self.stop.raise_if_asked()
        code = run_command([*self.launcher, "-m", f"jit_accel.{program}", *flags], log, self.stop)
        self.stop.raise_if_asked()
        if code:
            say(last_lines(log), sys.stderr)
            raise RunFailure(f"{what}: jit_accel.{program} ended with {code}; {log} has what it said.")

    def _report(self) -> None:
        outcome = self.outcome()
        if not any(arm.values for arm in outcome.arms):
            return
        paths = write_outcome(outcome, self.experiment.folder)
        say("\n" + as_text(outcome))
        say("Comparison: " + ", ".join(map(str, paths)))


def _introduce(settings: CompareConfig, arms: Sequence[Arm], measure: Measure) -> None:
    base = arms[0]
    seeds = f"{settings.seeds} seed{'s' * (settings.seeds > 1)}"
    say(f"Base:       {base.name}; {len(arms)} settings with {seeds} each, equal {settings.equal}")
    for arm in arms[1:]:
        pairs = differences(base, arm)
        named = [
            f"{name} {shown(new)} (not {shown(old)})" for name, (old, new) in list(pairs.items())[:MOST_DIFFERENCES]
        ]
        more = f" and {len(pairs) - MOST_DIFFERENCES} more" if len(pairs) > MOST_DIFFERENCES else ""
        say(f"{arm.name + ':':<11} {', '.join(named) or 'as the base'}{more}")
    better = "higher" if measure.is_better_higher else "lower"
    say(f"Measured:   {measure.metric} of {measure.num_images:,} images of each run, {better} is better")
