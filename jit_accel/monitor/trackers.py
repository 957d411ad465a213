"""Where a run reports to besides its own files: Weights & Biases, and the other trackers of Accelerate.

Only the main process reports. A tracker that fails is left out from then on, with one warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from jit_accel.base.console import warn
from jit_accel.config.settings import TRACKERS, TrackingConfig
from jit_accel.monitor.log import iterate_metrics
from jit_accel.monitor.wandb_run import FINISH_TIMEOUT_S, WandbRun, in_time


class Trackers:
    """All trackers of a run; each method does nothing on other processes, and never raises.

    Args:
        accelerator: tells the main process.
        tracking: the settings.
        record: the flat configuration, without secrets.
        output_dir: of the run; its `metrics.jsonl` has all rows up to `step` at least.
        step: the optimizer step resumed from, 0 in a new run.
    """

    def __init__(self, accelerator, tracking: TrackingConfig, record: dict, output_dir: Path, step: int):
        self.open: dict[str, WandbRun | OtherTracker] = {}
        for name in tracking.trackers if accelerator.is_main_process else ():
            if not is_installed(name):
                warn(f"{name} not available. Install with: pip install {TRACKERS[name]}")
                continue
            try:
                if name == "wandb":
                    self.open[name] = WandbRun(tracking, record, output_dir, step)
                else:
                    self.open[name] = OtherTracker(name, tracking, record, output_dir, step)
            except (Exception, SystemExit) as error:  # a tracker's failure, whatever it is, must not stop the training
                warn(f"{name} could not start ({describe(error)}). Training goes on without it.")

    def log(self, rows: list[dict]) -> None:
        """Report rows in order, each under its own `step`."""
        self._each("log", lambda tracker: tracker.log(rows))

    def log_image(self, name: str, path: Path, step: int, caption: str, is_late: bool = False) -> None:
        """Report a picture; one that `is_late` also where an earlier start has reported this step."""
        for tracker_name, tracker in self.open.items():
            try:
                tracker.log_image(name, path, step, caption, is_late)
            except Exception as error:  # a picture less
                warn(f"{tracker_name} did not take {path} ({describe(error)}).")

    def alert(self, title: str, text: str) -> None:
        self._each("send an alert", lambda tracker: tracker.alert(title, text))

    def finish(self, exit_code: int = 0, is_preempted: bool = False) -> None:
        """End all; `is_preempted` where a signal stopped the training and it can go on."""
        self._each("finish", lambda tracker: tracker.finish(exit_code, is_preempted))
        self.open = {}

    @property
    def newest_step(self) -> int:
        """The newest step that any of them has of earlier starts; it takes none before that."""
        return max((tracker.last_step for tracker in self.open.values()), default=0)

    def _each(self, what: str, action: Callable) -> None:
        for name, tracker in list(self.open.items()):
            try:
                action(tracker)
            except Exception as error:  # see __init__
                del self.open[name]
                if what != "finish":
                    with contextlib.suppress(Exception):
                        tracker.finish(1, False)
                warn(
                    f"{name} failed to {what} ({describe(error)}). Training goes on without it; metrics.jsonl has "
                    "every row."
                )


class OtherTracker:
    """One of Accelerate's own trackers; raises what it raises.

    TensorBoard and trackio continue where they were, with no step twice; the others begin a new run at each start.
    """

    def __init__(self, name: str, tracking: TrackingConfig, record: dict, output_dir: Path, step: int):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        self.name, self.last_step = name, step
        is_new, project, options = True, tracking.wandb_project, {}
        if name == "tensorboard":
            is_new, project = not (output_dir / name).exists(), name
            self.last_step = 0 if is_new else step
            options = {"purge_step": step + 1} if not is_new else {}
        elif name == "trackio":
            run_name = tracking.wandb_name or output_dir.name
            self.last_step = last_trackio_step(project, run_name) if step else 0
            options = {"name": run_name, "resume": "allow" if step else "never", "embed": False}
        folder = (str(output_dir),) if kind.requires_logging_directory else ()
        self.tracker = kind(project, *folder, **options)
        self.tracker.start()
        if is_new:  # TensorBoard makes a run of its own of each configuration it is given
            self.tracker.store_init_configuration({key: as_scalar(value) for key, value in record.items()})
        self.log(row for row in iterate_metrics(output_dir) if row["step"] <= step)

    def log(self, rows: Iterable[dict]) -> None:
        for row in rows:
            if row["step"] > self.last_step:
                values = {key: value for key, value in row.items() if key != "step" and value is not None}
                self.tracker.log(values, step=row["step"])

    def log_image(self, name: str, path: Path, step: int, caption: str, is_late: bool) -> None:
        if self.name == "tensorboard":
            image = np.asarray(Image.open(path).convert("RGB"))
            self.tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
            self.tracker.writer.flush()  # as accelerate does with numbers
        elif self.name == "trackio" and (is_late or step > self.last_step):
            import trackio

            self.tracker.log({name: trackio.Image(str(path), caption=caption)}, step=step)

    def alert(self, title: str, text: str) -> None:
        pass  # Accelerate has no word for it

    def finish(self, exit_code: int, is_preempted: bool) -> None:
        if failure := in_time(self.tracker.finish, FINISH_TIMEOUT_S):
            raise failure


def is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def last_trackio_step(project: str, run_name: str) -> int:
    """Of what trackio's own files hold of a run; 0 where there is none."""
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_max_step_for_run(project, run_name) or 0


def as_scalar(value):
    """A setting as trackers of settings take it: lists and None as text."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
