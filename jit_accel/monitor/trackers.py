"""The trackers of a run, as Accelerate holds them: W&B, its own others, and the user's.

`Accelerator(log_with=build_trackers(…))` gets them, `start_trackers` opens them by `accelerator.init_trackers`, rows go
through `accelerator.log`, and `accelerator.end_training` ends them; all of it happens on the main process alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, TrackioTracker
from PIL import Image

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError
from jit_accel.config.settings import TRACKERS, TrackingConfig
from jit_accel.monitor.log import iterate_metrics
from jit_accel.monitor.metric_table import SAMPLES
from jit_accel.monitor.wandb_tracker import FINISH_TIMEOUT_S, WandbTracker, in_time, one_line


class SafeTracker(GeneralTracker):
    """A tracker whose failures cost one warning each run, and neither the training nor the other trackers.

    Accelerate alone would raise on the main process, while the others wait for it for ever.

    Args:
        name: by which `accelerator.get_tracker` finds it.
        make: builds the tracker itself, given the step that the run goes on from.

    Attributes:
        tracker: what the tracker itself holds, such as the run of W&B; None where it is not open.
        last_step: the newest step that it has of earlier starts; rows up to that one are not logged again.
        exit_code: how the training ended: 0, or 128 and a signal's number, or else by an error.
    """

    requires_logging_directory = False

    def __init__(self, name: str, make: Callable[[int], GeneralTracker]):
        self.name, self.make = name, make
        self.inner: GeneralTracker | None = None
        self.first_step = self.last_step = 0
        self.exit_code = 1
        super().__init__()

    @property
    def tracker(self):
        return self.inner.tracker if self.inner else None

    def start(self) -> None:
        if self.name in TRACKERS and not is_installed(self.name):
            warn(f"{self.name} not available. Install with: pip install {TRACKERS[self.name]}")
            return
        try:
            self.inner = self.make(self.first_step)
            self.inner.start()
            # Trackers that begin a new run at each start have no rows before it.
            self.last_step = getattr(self.inner, "last_step", self.first_step)
        except (Exception, SystemExit) as error:  # a tracker's failure, whatever it is, must not stop the training
            self._leave_out("could not start", error)

    def store_init_configuration(self, values: dict) -> None:
        if not isinstance(self.inner, WandbTracker):
            values = {key: as_scalar(value) for key, value in values.items()}
        self._attempt("could not start", lambda inner: inner.store_init_configuration(values))

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        if step is None or step > self.last_step:
            self._attempt("failed to log", lambda inner: inner.log(values, step=step, **kwargs))

    def log_picture(self, key: str, path: Path, step: int, caption: str, is_late: bool = False) -> None:
        """Show a picture, where the tracker can; one that `is_late` also where it has this step."""
        if hasattr(self.inner, "log_picture") and (is_late or step > self.last_step):
            try:
                self.inner.log_picture(key, path, step, caption)
            except Exception as error:  # a picture less
                warn(f"{self.name} did not take {path} ({describe(error)}).")

    def alert(self, title: str, text: str) -> None:
        if hasattr(self.inner, "alert"):
            self._attempt("failed to send an alert", lambda inner: inner.alert(title, text))

    def finish(self) -> None:
        self._attempt("failed to finish", self._finish)
        self.inner = None

    def _finish(self, inner: GeneralTracker) -> None:
        if isinstance(inner, WandbTracker):
            inner.finish(self.exit_code)
        elif failure := in_time(inner.finish, FINISH_TIMEOUT_S):
            raise failure

    def _attempt(self, failing: str, action: Callable[[GeneralTracker], None]) -> None:
        if self.inner:
            try:
                action(self.inner)
            except (Exception, SystemExit) as error:
                self._leave_out(failing, error)

    def _leave_out(self, failing: str, error: BaseException) -> None:
        inner, self.inner = self.inner, None
        if inner and failing != "failed to finish":
            with contextlib.suppress(Exception, SystemExit):
                self._finish(inner)
        warn(f"{self.name} {failing} ({describe(error)}). Training goes on without it; metrics.jsonl has every row.")


class TensorBoard(TensorBoardTracker):
    """Event files in `output_dir/tensorboard` that a resumed run continues, with no step twice."""

    def __init__(self, tracking: TrackingConfig, output_dir: Path, step: int):
        self.is_new = not (output_dir / self.name).exists()
        self.last_step = 0 if self.is_new else step
        super().__init__(self.name, str(output_dir), **({} if self.is_new else {"purge_step": step + 1}))

    def store_init_configuration(self, values: dict) -> None:
        if self.is_new:  # TensorBoard makes a run of its own of each configuration it is given
            super().store_init_configuration(values)

    def log_picture(self, key: str, path: Path, step: int, caption: str) -> None:
        self.writer.add_image(key, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()  # as accelerate does with numbers


class Trackio(TrackioTracker):
    """A run of trackio that a resumed run continues, with no step twice."""

    def __init__(self, tracking: TrackingConfig, output_dir: Path, step: int):
        from trackio.sqlite_storage import SQLiteStorage

        project, name = tracking.wandb_project, tracking.wandb_name or output_dir.name
        self.last_step = (SQLiteStorage.get_max_step_for_run(project, name) or 0) if step else 0
        super().__init__(project, name=name, resume="allow" if step else "never", embed=False)

    def log_picture(self, key: str, path: Path, step: int, caption: str) -> None:
        import trackio

        self.log({key: trackio.Image(str(path), caption=caption)}, step=step)


def build_trackers(tracking: TrackingConfig, output_dir: Path) -> list[SafeTracker]:
    """Return the trackers that the settings ask for, not started yet, for `Accelerator(log_with=…)`.

    Raises:
        UserError: a class of the user's own cannot be used.
    """
    ours = {
        "wandb": lambda step: WandbTracker(tracking, output_dir),
        "tensorboard": lambda step: TensorBoard(tracking, output_dir, step),
        "trackio": lambda step: Trackio(tracking, output_dir, step),
    }
    found = []
    for name in tracking.trackers:
        if name in ours:
            found.append(SafeTracker(name, ours[name]))
        else:
            kind = imported_class(name) if ":" in name else LOGGER_TYPE_TO_CLASS[name]
            # Accelerate's own way of calling them.
            arguments = (tracking.wandb_project, *([str(output_dir)] if kind.requires_logging_directory else ()))
            found.append(SafeTracker(kind.name, lambda step, kind=kind, arguments=arguments: kind(*arguments)))
    return found


def imported_class(path: str) -> type[GeneralTracker]:
    """Return the user's tracker class that `package.module:Class` names; modules of the working directory count.

    Raises:
        UserError: it cannot be imported, or is no tracker.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    remedy = "Give package.module:Class, installed or below the working directory."
    try:
        kind = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        rule = f"cannot be imported ({describe(error)})."
        raise UserError(rule, about="report_to", value=path, remedy=remedy) from None
    is_tracker = isinstance(kind, type) and issubclass(kind, GeneralTracker)
    if not is_tracker or not all(hasattr(kind, part) for part in ("name", "requires_logging_directory", "tracker")):
        rule = "must be a subclass of accelerate.tracking.GeneralTracker with `name`, `requires_logging_directory` and "
        raise UserError(rule + "`tracker`.", about="report_to", value=path)
    return kind


def start_trackers(accelerator, project: str, record: dict, output_dir: Path, step: int) -> int:
    """Open the trackers of a run that goes on from `step` (0: a new one), and give each the rows that it lacks.

    Args:
        record: the flat configuration, without secrets.
        output_dir: its `metrics.jsonl` has all rows up to `step` at least.

    Returns:
        The newest step that any of them has of earlier starts.
    """
    for tracker in accelerator.log_with:
        tracker.first_step = step
    accelerator.init_trackers(project, record)
    oldest = min((tracker.last_step for tracker in accelerator.trackers if tracker.inner), default=step)
    for row in iterate_metrics(output_dir) if oldest < step else ():
        if oldest < row["step"] <= step:
            log_row(accelerator, row)
            sheet = output_dir / "samples" / f"step_{row['step']:08d}.png"
            if is_picture(sheet):
                log_picture(accelerator, SAMPLES, sheet, row["step"], f"step {row['step']}")
    return max((tracker.last_step for tracker in accelerator.trackers), default=0)


def log_row(accelerator, row: dict) -> None:
    """Log what is finite of a row of `metrics.jsonl` under its own step."""
    values = {key: value for key, value in row.items() if key != "step" and value is not None}
    accelerator.log(values, step=row["step"])


def log_picture(accelerator, key: str, path: Path, step: int, caption: str, is_late: bool = False) -> None:
    """Show a picture in all trackers that can; one that `is_late` also where an earlier start logged its step."""
    for tracker in accelerator.trackers:
        tracker.log_picture(key, path, step, caption, is_late)


def is_picture(path: Path) -> bool:
    """Return True where the file is there and whole."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    return True


def is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def as_scalar(value):
    """Return a setting as trackers of settings take it: lists and None as text."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
