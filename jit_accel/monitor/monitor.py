"""The monitor of a run: its steps are measured, judged, logged and shown here."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.console import redacted, say, warn
from jit_accel.base.devices import device_name, peak_flops
from jit_accel.base.errors import message_of
from jit_accel.base.image_rows import as_pictures
from jit_accel.base.spans import span
from jit_accel.config.facts import Plan
from jit_accel.config.presets import forward_macs, sides_of
from jit_accel.config.run_groups import HealthConfig, TrackingConfig
from jit_accel.monitor import metric_table as table
from jit_accel.monitor.health import Event, Health
from jit_accel.monitor.log import MetricsLog, Progress, ReportProcess, leave_failure
from jit_accel.monitor.metrics import (
    EpochMetrics,
    StepClock,
    StepMetrics,
    WeightWatch,
    histograms_of,
    of_each_process,
)
from jit_accel.monitor.trackers import log_picture, log_row, start_trackers

TRAIN_FLOPS_PER_FORWARD_MAC = 6  # a multiply and an add, forward and twice backward
REAL_IMAGES = 32  # that samples are judged by
LORA_FLOPS_PER_FORWARD_MAC = 4  # frozen weights need no gradient of their own; the adapter's part is not counted


@dataclass(frozen=True)
class NotFinite:
    """The first metric of an interval that is infinite or not a number."""

    key: str
    value: float
    step: int


@dataclass(frozen=True)
class Interval:
    """The steps since the last reading, the same on all processes."""

    rows: tuple[dict, ...]  # one a step
    bad_images: int  # that could not be decoded since the start of the run
    images_seen: int
    not_finite: NotFinite | None


class Monitor:
    """All that watches a run. Every process calls it together; only the main one writes.

    Inside `with monitor.pause():` is no training, whose time is left out of its speed; `record_by_t` and
    `record_occasional` are those of `StepMetrics`. The `feed` knows how long it was waited for, `precision` decides the
    peak of a GPU, and the loss of a run that `is_untrained` must fall.
    """

    def __init__(
        self,
        accelerator,
        feed,
        network,
        ema,
        *,
        plan: Plan,
        output_dir: Path,
        tracking: TrackingConfig,
        health: HealthConfig,
        log_every_steps: int,
        precision: str,
        is_untrained: bool,
    ):
        self.accelerator, self.feed, self.ema, self.plan, self.tracking = accelerator, feed, ema, plan, tracking
        self.output_dir, self.log_every_steps = output_dir, log_every_steps
        self.is_main, self.is_open = accelerator.is_main_process, False
        self.steps, self.clock = StepMetrics(accelerator.device), StepClock(accelerator.device)
        self.record_by_t, self.record_occasional = self.steps.record_by_t, self.steps.record_occasional
        self.pause, self.histograms = self.clock.pause, {}
        self.weights = WeightWatch(ema.params, ema.averages, network.config.depth)
        self.epochs = EpochMetrics(plan.num_images)
        self.health = Health(health, must_fall=is_untrained, has_scaler=accelerator.scaler is not None)
        self.patch_size = network.config.patch_size
        self.real: Tensor | None = None
        sizes, is_adapted = network.config, any(not p.requires_grad for p in network.parameters())
        flops_per_mac = LORA_FLOPS_PER_FORWARD_MAC if is_adapted else TRAIN_FLOPS_PER_FORWARD_MAC
        self.flops_per_image = flops_per_mac * forward_macs(sizes, sizes.patch_size, *sides_of(sizes.img_size))
        self.peak_flops = peak_flops(device_name(accelerator.device), precision)

    def open(self, step: int, record: dict, is_other_training: bool = False) -> None:
        """Start, or go on from `step`, maybe with other settings; `record` is the run in settings and facts."""
        self.is_open = True
        newest = start_trackers(self.accelerator, self.tracking, record, self.output_dir, step)
        if is_other_training and newest > step:
            warn(
                f"the trackers have steps {step + 1:,} to {newest:,} as they were trained with other settings, and "
                "keep them; metrics.jsonl and report.html have the new ones. For a curve of its own give another "
                "--output_dir and the checkpoint as --resume."
            )
        self.log = MetricsLog(self.output_dir, step) if self.is_main else None
        self.report = ReportProcess(self.output_dir, self.is_main and self.tracking.html_report)
        self.progress = Progress(self.plan.total_steps, step, self.is_main)
        self.clock.start()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            if self.is_main:
                leave_failure(self.output_dir, message_of(error))
            self.close(exit_code=1)

    def close(self, exit_code: int) -> None:
        """Build the last report; the trackers end later, with `accelerator.end_training`.

        `exit_code` is 0, or 128 and the number of the signal that stopped the run, or else of a failure.
        """
        if not self.is_open:
            return
        self.is_open = False
        for tracker in self.accelerator.trackers:
            tracker.exit_code = exit_code
        self.progress.close()
        self.report.build_last(5.0 if exit_code > 128 else 120.0)  # whoever stops a run soon kills it

    @contextmanager
    def watched_step(self, step: int) -> Iterator[None]:
        """Surround the optimizer's part of a step, in which the weights change and `record` is called."""
        before = self.weights.copy() if step % self.log_every_steps == 0 else None
        if self.is_main and self.tracking.wandb_watch and (step == 1 or step % (10 * self.log_every_steps) == 0):
            self.histograms[step] = histograms_of(self.ema.params, self.tracking.wandb_watch)
        yield
        if before is not None:
            self.weights.record(self.steps, before)

    @span("metrics")
    def record(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Keep one step's values, on the device."""
        self.steps.record(step, learning_rate, loss, grad_norm)
        self.clock.tick()
        self.progress.step_done()

    def record_aux(self, name: str, value: Tensor) -> None:
        """Keep the value of a further loss in one micro-step."""
        self.steps.record_part(table.AUX_LOSS.format(name=name), value)

    def try_step(self, step: Callable[[], None]) -> tuple[float, float]:
        """Return the loss of a `step` that nothing is written of, and its seconds; all processes together."""
        self.progress = Progress(self.plan.total_steps, 0, False)
        self.clock.start()
        step()
        (row,), _ = self.steps.flush(lambda values: self.accelerator.reduce(values, "mean"), [])
        return row[table.TRAIN_LOSS], self.clock.end_interval()[1]

    def read(self) -> Interval:
        """Read the kept metrics: the only place where the host waits for the device."""
        accelerator, num_processes = self.accelerator, self.accelerator.num_processes
        memory = of_each_process(peak_memory_gib(accelerator.device), accelerator.process_index, num_processes)
        counters = [*memory, *self.feed.counters()]
        rows, means = self.steps.flush(lambda values: accelerator.reduce(values, "mean"), counters)
        durations_s, trained_s = self.clock.end_interval()
        bad_images, measured = self.feed.read_counters(means[num_processes:], len(rows))
        if rows:
            last = rows[-1]
            last |= {table.BAD_IMAGES: bad_images, **measured, table.PEAK_MEMORY: max(means[:num_processes])}
            images_per_second = len(rows) * self.plan.global_batch_size / trained_s
            last |= {table.IMAGES_PER_SECOND: images_per_second, table.STEP_TIME: trained_s / len(rows)}
            if self.peak_flops:
                last[table.MFU] = self.flops_per_image * images_per_second / (self.peak_flops * num_processes)
            last |= self.ema.measured_at(last["step"])
            now = time.time() - sum(durations_s)
            for row, seconds in zip(rows, durations_s):
                now += seconds
                row[table.TIME] = round(now, 3)
                self.epochs.add(row, seconds, self.plan.global_batch_size)
                if not math.isfinite(row[table.GRAD_NORM]):  # a step that a gradient scaler skips
                    row.pop(table.UPDATE_RATIO, None)
            if self.epochs.elapsed_s is not None:
                last[table.ELAPSED] = round(self.epochs.elapsed_s, 3)
            self._write(rows, self.health.examine(rows, *self.feed.lost_lately()))
        # A gradient scaler meets infinite gradients as a matter of course, and skips those steps.
        keys = (table.TRAIN_LOSS,) if accelerator.scaler else (table.TRAIN_LOSS, table.GRAD_NORM)
        bad = (NotFinite(key, row[key], row["step"]) for row in rows for key in keys if not math.isfinite(row[key]))
        return Interval(tuple(rows), bad_images, self.epochs.images_seen, next(bad, None))

    def _write(self, rows: list[dict], events: list[Event]) -> None:
        if not self.is_main:
            return
        self.log.write(rows)
        for row in rows:
            log_row(self.accelerator, row)
            if found := self.histograms.pop(row["step"], None):
                counts = torch.stack(list(found.values())).tolist()
                self._offer("log_histograms", dict(zip(found, counts)), row["step"])
            if table.VAL_LOSS in row:
                losses = [f"{key} {row[key]:.4g}" for key in (table.VAL_LOSS, table.EMA_VAL_LOSS) if key in row]
                say(f"Step {row['step']:,}: {', '.join(losses)}")
        self.progress.show(rows[-1])
        self._tell(events)
        self.report.build()

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            warn(str(event))
            self._offer("alert", event.title, redacted(str(event)))

    def _offer(self, method: str, *values) -> None:
        for tracker in self.accelerator.trackers:
            tracker.offer(method, *values)

    def log_samples(self, path: Path, step: int, caption: str, images: dict[str, np.ndarray], is_late: bool) -> None:
        """Show a sheet, if it is there, in all trackers that can, with its images, uint8 (n, H, W, 3), by class."""
        log_picture(self.accelerator, path, step, caption, is_late)
        if images and self.tracking.wandb_class_images:
            self._offer("log_class_images", images, step)

    def show_real(self, images: Tensor) -> None:
        """Keep a few training images (B, C, H, W) in [-1, 1], the first of a start, to judge samples by."""
        if self.is_main and self.real is None:
            self.real = images[:REAL_IMAGES].clone()  # which leave the device with the first sheet

    def examine_samples(self, step: int, images: np.ndarray | None) -> None:
        """Judge generated images, uint8 (n, H, W, 3), of the newest step; None on all processes but the main one."""
        if self.is_main and images is not None:
            if self.health.real is None and self.real is not None:
                pixels = ((self.real.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                self.health.real = as_pictures(pixels.permute(0, 2, 3, 1).cpu().numpy())
            done = step / self.plan.total_steps
            signs, events = self.health.examine_samples(step, images, self.patch_size, done)
            if signs:
                self.amend(step, signs)
            self._tell(events)

    def log_model(self, folder: Path, step: int) -> None:
        """Send the finished pipeline folder, where that is asked for."""
        if self.tracking.wandb_log_model:
            self._offer("log_model", folder, step, ["latest", f"step_{step}", *self.tracking.wandb_aliases])

    def amend(self, step: int, values: dict[str, float]) -> None:
        """Put values into the row of the newest step, which is written already."""
        if self.is_main:
            self.log.amend(step, values)
            log_row(self.accelerator, {"step": step, **values})
            self.report.build()

    def state_dict(self) -> dict:
        """Return what a later run needs to go on with, on the main process."""
        return {"epochs": self.epochs.state_dict(), "health": self.health.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take what `state_dict` gave; `health` is None in checkpoints that have none."""
        self.epochs.load_state_dict(state["epochs"])
        self.health.load_state_dict(state["health"])


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of the device's allocator on a GPU, elsewhere of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
