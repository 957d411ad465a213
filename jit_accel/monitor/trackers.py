"""The trackers of a run, as Accelerate holds them: W&B, its own others, and the user's.

`Accelerator(log_with=…)` gets what `build_trackers` returns, `accelerator.init_trackers` starts them, `accelerator.log`
reaches them, `accelerator.end_training` ends them; all of it on the main process alone.
"""

import contextlib
import importlib.util
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, TrackioTracker
from PIL import Image

from jit_accel.base.console import redacted, warn
from jit_accel.base.errors import UserError, shown
from jit_accel.config.run_groups import TRACKERS, TrackingConfig
from jit_accel.monitor.log import iterate_metrics
from jit_accel.monitor.metric_table import SAMPLES, TIME

# At the end of a training each tracker may take so long to send what is left.
FINISH_TIMEOUT_S = 60


class SafeTracker(GeneralTracker):
    """A tracker whose failures cost one warning, and neither the training nor the other trackers.

    Accelerate alone would raise on the main process, for which the others then wait for ever. `make(step,
    **init_kwargs)` builds the tracker itself, given the step that the run goes on from. Rows up to `last_step`, the
    newest that it has of earlier starts, are not logged again. `exit_code` says how the training ended: 0, or 128 and a
    signal's number, or else by an error.
    """

    requires_logging_directory = False

    def __init__(self, name: str, make: Callable[..., GeneralTracker]):
        self.name, self.make = name, make
        self.inner: GeneralTracker | None = None
        self.last_step, self.exit_code = 0, 1
        self.init_kwargs: dict = {}  # Accelerate hands them to no tracker that is an object already
        super().__init__()

    @property
    def tracker(self):
        return self.inner.tracker if self.inner else None

    def start(self) -> None:
        if self.name in TRACKERS and not is_installed(self.name):
            warn(f"{self.name} not available. Install with: pip install {self.name.replace('_', '-')}")
            return
        with self._left_out_if("could not start"):
            self.inner = self.make(self.last_step, **self.init_kwargs)
            is_wanted = self.inner.start() is not False
            # Trackers that begin a new run at each start have no rows before it.
            self.last_step = getattr(self.inner, "last_step", self.last_step)
            self.inner = self.inner if is_wanted else None

    def store_init_configuration(self, values: dict) -> None:
        if self.inner:
            if self.name != "wandb":  # the others take no lists and no None
                scalars = (bool, int, float, str)
                values = {key: value if isinstance(value, scalars) else shown(value) for key, value in values.items()}
            with self._left_out_if("could not start"):
                self.inner.store_init_configuration(values)

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        if self.inner and (step is None or step > self.last_step):
            with self._left_out_if("failed to log"):
                self.inner.log(values, step=step, **kwargs)

    def log_picture(self, path: Path, step: int, caption: str, is_late: bool = False) -> None:
        """Show a sheet of samples, where the tracker can; one that `is_late` also where it has this step."""
        if is_late or step > self.last_step:
            self.offer("log_picture", path, step, caption)

    def offer(self, method: str, *values) -> None:
        """Call a method that not all trackers have; what it raises costs a warning."""
        if hasattr(self.inner, method):
            try:
                getattr(self.inner, method)(*values)
            except ConnectionError:
                pass  # its service is gone, as the next row or the end says
            except Exception as error:
                what = values[0] if isinstance(values[0], str | Path) else method.removeprefix("log_").replace("_", " ")
                warn(f"{self.name} did not take {what} ({describe(error)}).")

    def finish(self) -> None:
        inner, self.inner = self.inner, None
        with self._left_out_if("failed to finish"):
            if hasattr(inner, "exit_code"):  # W&B's, which keeps time itself
                inner.exit_code = self.exit_code
                inner.finish()
            elif inner:
                in_time(inner.finish, FINISH_TIMEOUT_S)

    @contextlib.contextmanager
    def _left_out_if(self, failing: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever a tracker raises must not stop the training
            inner, self.inner = self.inner, None
            failure = f"{self.name} {failing} ({describe(error)}). Training goes on without it"
            if hasattr(inner, "warn_incomplete"):
                inner.warn_incomplete(failure)
            else:
                warn(f"{failure}; metrics.jsonl has every row.")
            with contextlib.suppress(Exception, SystemExit):
                in_time(inner.finish, FINISH_TIMEOUT_S)


class TensorBoard(TensorBoardTracker):
    """Event files in `output_dir/tensorboard` that a resumed run continues, with no step twice."""

    def __init__(self, tracking: TrackingConfig, output_dir: Path, step: int):
        self.is_new = not (output_dir / self.name).exists()
        self.last_step = 0 if self.is_new else step
        super().__init__(self.name, str(output_dir), **({} if self.is_new else {"purge_step": step + 1}))

    def store_init_configuration(self, values: dict) -> None:
        if self.is_new:  # TensorBoard makes a run of its own of each configuration it is given
            super().store_init_configuration(values)

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        values = dict(values)
        super().log(values, step=step, walltime=values.pop(TIME, None), **kwargs)

    def log_picture(self, path: Path, step: int, caption: str) -> None:
        self.writer.add_image(SAMPLES, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()  # as accelerate does with numbers


class Trackio(TrackioTracker):
    """A run of trackio that a resumed run continues, with no step twice."""

    def __init__(self, tracking: TrackingConfig, output_dir: Path, step: int):
        from trackio.sqlite_storage import SQLiteStorage

        project, name = tracking.wandb_project, tracking.wandb_name or output_dir.name
        self.last_step = (SQLiteStorage.get_max_step_for_run(project, name) or 0) if step else 0
        super().__init__(project, name=name, resume="allow" if step else "never", embed=False)

    def log_picture(self, path: Path, step: int, caption: str) -> None:
        import trackio

        self.log({SAMPLES: trackio.Image(str(path), caption=caption)}, step=step)


def weights_and_biases(tracking: TrackingConfig, output_dir: Path, step: int, **init_kwargs) -> GeneralTracker:
    # Before wandb is imported: its telemetry delays the exit by ten seconds.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    from jit_accel.monitor.wandb_tracker import WandbTracker

    return WandbTracker(output_dir=output_dir, **init_kwargs)


OURS = {"wandb": weights_and_biases, "tensorboard": TensorBoard, "trackio": Trackio}


def build_trackers(tracking: TrackingConfig, output_dir: Path) -> list[SafeTracker]:
    """Return the trackers of the settings, not started yet; `UserError` if a class of the user's own cannot be used."""

    def build(name: str) -> SafeTracker:
        if name in OURS:
            return SafeTracker(name, partial(OURS[name], tracking, output_dir))
        kind = imported_class(name) if ":" in name else LOGGER_TYPE_TO_CLASS[name]
        folder = [str(output_dir)] if kind.requires_logging_directory else []

        def make(step: int, project: str = tracking.wandb_project, **kwargs) -> GeneralTracker:
            return kind(project, *folder, **kwargs)  # as Accelerate calls its own

        return SafeTracker(kind.name, make)

    return list(map(build, tracking.trackers))


def imported_class(path: str) -> type[GeneralTracker]:
    """Return the user's tracker class that `package.module:Class` names; modules of the working directory count."""
    problem = partial(UserError, about="report_to", value=path)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        kind = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:
        remedy = "Give package.module:Class, installed or below the working directory."
        raise problem(f"cannot be imported ({describe(error)}).", remedy=remedy) from None
    parts = ("name", "requires_logging_directory", "tracker")
    if not isinstance(kind, type) or not issubclass(kind, GeneralTracker) or not all(hasattr(kind, p) for p in parts):
        raise problem(f"must be a subclass of accelerate.tracking.GeneralTracker with {', '.join(parts)}.")
    return kind


def wandb_init_kwargs(tracking: TrackingConfig) -> dict:
    """Return what the settings say about a run, as arguments of `wandb.init` without secrets."""
    texts = {"name": tracking.wandb_name, "notes": tracking.wandb_notes, "group": tracking.wandb_group}
    return {
        "entity": tracking.wandb_entity or os.environ.get("WANDB_ENTITY") or None,
        **{key: redacted(text) for key, text in texts.items() if text},
        "tags": [redacted(tag.strip()) for tag in tracking.wandb_tags] or None,
    }


def start_trackers(accelerator, tracking: TrackingConfig, record: dict, output_dir: Path, step: int) -> int:
    """Open the trackers of a run that goes on from `step` (0: a new one), and give each the rows that it lacks.

    `record` is the flat configuration, without secrets; what it calls a run of W&B counts. Returns the newest step that
    any of them has of earlier starts.
    """
    if record.get("use_wandb") or "wandb" in record.get("report_to", ()):
        names = (field.name for field in fields(tracking) if field.name.startswith("wandb_"))
        tracking = replace(tracking, **{name: record[name] for name in names if name in record})
    init_kwargs = {"wandb": {"project": tracking.wandb_project, **wandb_init_kwargs(tracking)}}
    for tracker in accelerator.log_with:
        tracker.last_step, tracker.init_kwargs = step, init_kwargs.get(tracker.name, {})
    accelerator.init_trackers(tracking.wandb_project, record, init_kwargs)
    known = [tracker.last_step for tracker in accelerator.trackers if tracker.inner]
    if known and min(known) < step:
        for row in iterate_metrics(output_dir):
            if min(known) < row["step"] <= step:
                log_row(accelerator, row)
                sheet = output_dir / "samples" / f"step_{row['step']:08d}.png"
                log_picture(accelerator, sheet, row["step"], f"step {row['step']}")
    return max(known, default=0)


def log_row(accelerator, row: dict) -> None:
    """Log what is finite of a row of `metrics.jsonl` under its own step."""
    values = {key: value for key, value in row.items() if key != "step" and value is not None}
    accelerator.log(values, step=row["step"])


def log_picture(accelerator, path: Path, step: int, caption: str, is_late: bool = False) -> None:
    """Show a sheet, if it is there, in all trackers that can; one that `is_late` also where they have its step."""
    for tracker in accelerator.trackers if path.exists() else ():
        tracker.log_picture(path, step, caption, is_late)


def is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def in_time(action: Callable[[], object], timeout_s: float) -> None:
    """Do something in a thread, and raise what it raises; or `TimeoutError` where it takes longer, and goes on."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise TimeoutError
    if raised:
        raise raised[0]


def describe(error: BaseException) -> str:
    """Return the kind of an error and its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
