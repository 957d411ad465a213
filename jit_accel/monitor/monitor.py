"""The trainer's end of everything that watches a run: measured, judged, logged and shown here."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jit_accel.base.console import warn
from jit_accel.base.devices import device_name, peak_flops
from jit_accel.base.errors import UserError
from jit_accel.base.redaction import redacted
from jit_accel.config.completion import Plan
from jit_accel.config.presets import forward_macs
from jit_accel.config.settings import Config
from jit_accel.monitor.health import Health
from jit_accel.monitor.log import FAILED_FILE, MetricsLog
from jit_accel.monitor.metric_table import (
    BAD_IMAGES,
    GRAD_NORM,
    IMAGES_PER_SECOND,
    MFU,
    PEAK_MEMORY,
    SAMPLES,
    STEP_TIME,
    TRAIN_LOSS,
    UPDATE_RATIO,
)
from jit_accel.monitor.metrics import EpochMetrics, StepClock, StepMetrics, WeightWatch, of_each_process
from jit_accel.monitor.progress import Progress
from jit_accel.monitor.report_process import ReportProcess
from jit_accel.monitor.trackers import Trackers

TRAIN_FLOPS_PER_FORWARD_MAC = 6  # a multiply and an add, forward and twice backward
LORA_FLOPS_PER_FORWARD_MAC = 4  # frozen weights need no gradient of their own; the adapter's part is not counted


@dataclass(frozen=True)
class NotFinite:
    """The first metric of an interval that is infinite or not a number."""

    key: str
    value: float
    step: int


@dataclass(frozen=True)
class Interval:
    """The steps since the last reading, the same on all processes.

    rows: one a step. stop_asked: a signal asked any process to stop. bad_images: how many images could not be decoded
    since the start of the run, and images_seen how many were trained on, over all processes.
    """

    rows: tuple[dict, ...]
    stop_asked: bool
    bad_images: int
    images_seen: int
    not_finite: NotFinite | None


def first_not_finite(rows: list[dict], keys: tuple[str, ...]) -> NotFinite | None:
    """Return the first of these metrics that is not finite, if any."""
    found = (NotFinite(key, row[key], row["step"]) for row in rows for key in keys if not math.isfinite(row[key]))
    return next(found, None)


class Monitor:
    """What a run tells about itself. All processes call it together; only the main one writes.

    Args:
        feed: the run's `Feed`, which knows how long it was waited for.
        network, ema: what is trained, and its averages.
    """

    def __init__(self, config: Config, plan: Plan, accelerator, feed, network, ema):
        self.config, self.plan, self.accelerator, self.feed = config, plan, accelerator, feed
        self.output_dir = Path(config.run.output_dir)
        self.is_main = accelerator.is_main_process
        self.steps = StepMetrics(accelerator.device)
        self.weights = WeightWatch(ema.params, ema.averages, network.config.depth)
        self.clock = StepClock(accelerator.device)
        self.epochs = EpochMetrics(plan.num_images)
        self.health = Health(
            config.health, must_fall=config.tune.init_from is None, has_scaler=accelerator.scaler is not None
        )
        self.ema = ema
        flops_per_mac = LORA_FLOPS_PER_FORWARD_MAC if config.tune.lora_rank else TRAIN_FLOPS_PER_FORWARD_MAC
        self.flops_per_image = flops_per_mac * forward_macs(
            network.config, network.config.patch_size, config.data.img_size, config.data.img_size
        )
        self.peak_flops = peak_flops(device_name(accelerator.device), config.performance.mixed_precision)
        self.trackers = None

    def open(self, step: int, record: dict, is_other_training: bool = False) -> None:
        """Start, or go on from `step`.

        Args:
            record: the run in settings and facts, as `record.record_run` gives it.
            is_other_training: it goes on with other settings than before.
        """
        self.trackers = Trackers(self.accelerator, self.config.tracking, record, self.output_dir, step)
        if is_other_training and self.trackers.newest_step > step:
            warn(
                f"the trackers have steps {step + 1:,} to {self.trackers.newest_step:,} as they were trained with "
                "other settings, and keep them; metrics.jsonl and report.html have the new ones. For a curve of its "
                "own give another --output_dir and the checkpoint as --resume."
            )
        self.log = MetricsLog(self.output_dir, step) if self.is_main else None
        self.report = ReportProcess(self.output_dir, self.is_main and self.config.tracking.html_report)
        self.progress = Progress(self.plan.total_steps, step, self.is_main)
        self.clock.start()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            if self.is_main:
                self._leave_word(str(error) if kind is UserError else f"{kind.__name__}: {error}")
            self.close(exit_code=1)

    def _leave_word(self, problem: str) -> None:
        with contextlib.suppress(OSError):
            (self.output_dir / FAILED_FILE).write_text(redacted(problem) + "\n", encoding="utf-8")

    def close(self, exit_code: int = 0, is_preempted: bool = False) -> None:
        """Build the last report and end the trackers; once."""
        if self.trackers is None:
            return
        trackers, self.trackers = self.trackers, None
        self.progress.close()
        patience_s = 5.0 if is_preempted else 120.0  # whoever stops a run soon kills it
        self.report.start_last(patience_s)
        trackers.finish(exit_code, is_preempted=is_preempted)
        self.report.wait(patience_s)

    def pause(self) -> AbstractContextManager:
        """Of what happens inside, the speed of the training is not told."""
        return self.clock.pause()

    @contextmanager
    def watched_step(self, step: int) -> Iterator[None]:
        """Around the optimizer's part of a step, in which the weights change and `record` is called."""
        is_watched = step % self.config.run.log_every_steps == 0
        before = self.weights.copy() if is_watched else None
        yield
        if before is not None:
            self.weights.record(self.steps, before)

    def record(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Keep one step's values, on the device."""
        self.steps.record(step, learning_rate, loss, grad_norm)
        self.clock.tick()
        self.progress.step_done()

    def read(self, is_told_to_stop: bool) -> Interval:
        """Read the kept metrics: the only place where the host waits for the device."""
        accelerator = self.accelerator
        memory = of_each_process(
            peak_memory_gib(accelerator.device), accelerator.process_index, accelerator.num_processes
        )
        counters = [float(is_told_to_stop), *memory, *self.feed.counters()]
        rows, (stops, *means) = self.steps.flush(lambda values: accelerator.reduce(values, "mean"), counters)
        durations_s, trained_s = self.clock.end_interval()
        memory, waits = means[: len(memory)], means[len(memory) :]
        bad_images, measured = self.feed.read_counters(waits, len(rows))
        if rows:
            rows[-1] |= {BAD_IMAGES: bad_images, **measured, PEAK_MEMORY: max(memory)}
            rows[-1] |= self._speed(len(rows), trained_s)
            self._tell(rows, durations_s)
        # A gradient scaler meets infinite gradients as a matter of course, and skips those steps.
        keys = (TRAIN_LOSS,) if accelerator.scaler else (TRAIN_LOSS, GRAD_NORM)
        return Interval(tuple(rows), stops > 0, bad_images, self.epochs.images_seen, first_not_finite(rows, keys))

    def _tell(self, rows: list[dict], durations_s: list[float]) -> None:
        for row, seconds in zip(rows, durations_s):
            self.epochs.add(row, seconds, self.plan.global_batch_size)
            if not math.isfinite(row[GRAD_NORM]):  # a step that a gradient scaler skips
                row.pop(UPDATE_RATIO, None)
        rows[-1] |= self.ema.measured_at(rows[-1]["step"])
        events = self.health.examine(rows, *self.feed.lost_lately())
        if self.is_main:
            self.log.write(rows)
            self.trackers.log(rows)
            self.progress.show(rows[-1])
            for event in events:
                warn(str(event))
                self.trackers.alert(event.title, redacted(str(event)))
            self.report.start()

    def _speed(self, steps: int, trained_s: float) -> dict[str, float]:
        images_per_second = steps * self.plan.global_batch_size / trained_s
        speed = {IMAGES_PER_SECOND: images_per_second, STEP_TIME: trained_s / steps}
        if self.peak_flops:
            peak = self.peak_flops * self.accelerator.num_processes
            speed[MFU] = self.flops_per_image * images_per_second / peak
        return speed

    def record_by_t(self, t: Tensor, losses: Tensor) -> None:
        self.steps.record_by_t(t, losses)

    def record_occasional(self, name: str, value: Tensor) -> None:
        self.steps.record_occasional(name, value)

    def amend(self, step: int, values: dict[str, float]) -> None:
        """Put values into the row of the newest step, which is written already; they are the same on all processes."""
        if self.is_main:
            self.log.amend(step, values)
            self.trackers.log([{"step": step, **values}])
            self.report.start()

    def log_samples(self, path: Path, step: int, caption: str, is_late: bool) -> None:
        if path.exists():
            self.trackers.log_image(SAMPLES, path, step, caption, is_late)

    def state(self) -> dict:
        """What a later run needs to go on with, on the main process."""
        return {"epochs": self.epochs.state(), "health": self.health.state()}

    def load_state(self, state: dict | None, step: int) -> None:
        """Take what `state` gave; None in checkpoints of before there was one, of `step` steps."""
        state = state or {"epochs": {"images_seen": step * self.plan.global_batch_size}, "health": None}
        self.epochs.load_state(state["epochs"])
        self.health.load_state(state["health"])


def peak_memory_gib(device: torch.device) -> float:
    """Of the device's allocator on a GPU, else the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
