"""The training loop. `Trainer.run` is the loop, `Trainer.train_step` the algorithm of the paper."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from jit_accel.base import rng
from jit_accel.base.console import say
from jit_accel.base.errors import Stopped, StopRequest
from jit_accel.base.files import check_guard, disk_errors
from jit_accel.base.processes import SharedStop, on_main
from jit_accel.base.spans import span
from jit_accel.base.watchdog import Watchdog
from jit_accel.config.facts import Plan
from jit_accel.config.groups import OptimConfig
from jit_accel.config.run_groups import RunConfig
from jit_accel.data.batches.batch import Batch, arguments_of
from jit_accel.model.aux_losses import AuxLosses
from jit_accel.model.checkpointer import Checkpointer
from jit_accel.model.checkpoints import load_parts, read_run
from jit_accel.model.loading import PIPELINE_FOLDER
from jit_accel.model.lora import refuse_other_base
from jit_accel.model.manifest import read_manifest
from jit_accel.model.objective import Objective
from jit_accel.monitor.log import is_measured, leave_interruption, remove_notes
from jit_accel.monitor.metric_table import EMA_VAL_LOSS, EVAL, STEP_TIME, VAL_LOSS, part_of
from jit_accel.monitor.monitor import Monitor, peak_memory_gib
from jit_accel.train import forecast
from jit_accel.train.average_snapshots import AverageSnapshots
from jit_accel.train.averages import Ema
from jit_accel.train.feed import Feed, Validation
from jit_accel.train.forecast import Grace, StepCost
from jit_accel.train.initial_weights import Tuning
from jit_accel.train.occasions import Occasion, due
from jit_accel.train.optimizers import lr_at, set_lr, take_step
from jit_accel.train.profile import StepProfile
from jit_accel.train.results import is_exported, places_of, read_record, record_run, write_record, write_results
from jit_accel.train.samples import SampleMeasure, SampleSheets
from jit_accel.train.state import NamedTensors, OptimizerState, RunFacts


@dataclass(eq=False, kw_only=True)
class Trainer:
    """One training run, of parts that `build.assemble` has put together."""

    accelerator: Accelerator
    plan: Plan
    settings: RunConfig
    optim: OptimConfig
    facts: RunFacts
    model: torch.nn.Module  # and its optimizers, as `accelerator.prepare` returned them
    optimizers: Sequence
    averages: Ema
    objective: Objective
    aux: AuxLosses
    tuning: Tuning
    feed: Feed
    monitor: Monitor
    stop: StopRequest
    stops: SharedStop
    watch: Watchdog
    sheets: SampleSheets
    validation: Validation | None  # None where nothing is held out, or nothing to be measured
    measures: dict[str, SampleMeasure]  # by the names of their occasions

    def __post_init__(self):
        run, averages = self.settings, self.averages
        self.seed, self.output_dir = run.seed, Path(run.output_dir)
        self.network = self.accelerator.unwrap_model(self.model)
        self.checkpointer = Checkpointer(self.accelerator, self.output_dir, run.keep_checkpoints, self.watch.go_on)
        self.snapshots = AverageSnapshots(self.accelerator, self.output_dir, averages.widths, self.monitor.pause)
        self.profile = StepProfile(run.profile_steps, self.output_dir, self.accelerator.process_index)
        self.step = self.first_step = 0  # of this start
        self.saved_step: int | None = None  # by this start
        self.grace = Grace(self.accelerator.is_main_process)
        self.parts = {
            "model": NamedTensors(averages.params),
            **{f"ema_{name}": NamedTensors(average) for name, average in averages.all.items()},
            "optimizer": OptimizerState(self.network, self.optimizers),
            "feed": self.feed,
            "monitor": self.monitor,
            "scaler": self.accelerator.scaler,
            "run": self.facts,
        }
        store, is_stored = (lambda: self.snapshots.begin(self.step)), (lambda: self.snapshots.has(self.step))
        has_sheet = partial(on_main, self.accelerator, lambda: self.sheet_path.exists())
        self.occasions = [
            Occasion("log", run.log_every_steps, self.flush, at_end=False, reads_first=False),
            Occasion("save", run.save_every_steps, self.save),
            Occasion("snapshot", self.optim.average_snapshots, store, is_stored, at_end=False),
            # After the checkpoint is begun, so that whatever happens to them costs no step.
            Occasion("sample", self.sheets.settings.sample_every_steps, self.sample, has_sheet, at_end=False),
        ]
        if self.validation:  # before the metrics of the step are read, since it adds to them
            every = run.val_every_steps
            self.occasions.insert(0, Occasion("validate", every, self.validate, self._has_validated, reads_first=False))
        for name, measure in self.measures.items():
            act, is_done = partial(self.evaluate, measure), lambda m=measure: m.has_measured(self.step)
            self.occasions.append(Occasion(name, measure.every, act, is_done))

    def run(self) -> int:
        """Train to the end, or until a signal. Returns the exit code."""
        with disk_errors("output_dir", self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        last_step = max(self.plan.total_steps, self.step)
        for measure in self.measures.values():
            if self.step < last_step or not measure.has_measured(last_step):
                self.watch.at("looks at the real images", may_last=True)
                measure.prepare()
        with self.stop, self.monitor, self.checkpointer, self.profile, self.watch:
            self.watch.at("opens its logs", may_last=True)  # a tracker may get many rows that it lacks
            self._open_logs()
            if self.step == last_step:
                self.say(forecast.nothing_is_left(self.output_dir, self.step, self.plan, self.optim))
            with contextlib.suppress(Stopped):
                while not self.stops.look():
                    for occasion in due(self.occasions, self.step, last_step, is_new=self.step > self.first_step):
                        if occasion.reads_first:
                            self.flush()
                        if number := self.stops.look_now():
                            raise Stopped(number)
                        self.watch.at(f"has to {occasion.name} at step {self.step:,}")
                        self.checkpointer.wait_for_copies()  # weights and averages may be exchanged
                        occasion.act()
                    if self.step == last_step:
                        return self._finish()
                    with self.profile.around(self.step + 1, self.monitor.pause):
                        self.train_step()
            return self._leave()

    def train_step(self) -> None:
        """One optimizer step: predict the clean images of noised ones, over all processes and micro-steps."""
        accelerator, micro_steps = self.accelerator, self.accelerator.gradient_accumulation_steps
        self.model.train()
        step_loss = torch.zeros((), device=accelerator.device)
        for _ in range(micro_steps):
            with accelerator.accumulate(self.model):  # gradients travel between processes with the last one
                self.watch.at("waits for its data", may_last=True)  # servers may be down for long
                batch = self.feed.next()
                self.watch.at(f"trains step {self.step + 1:,}")
                self.monitor.show_real(batch.images)
                loss = self.loss(batch).mean()
                total = self.aux.added_to(loss, batch.images, self.monitor.record_aux, batch.labels, batch.positions)
                with span("backward"):
                    accelerator.backward(total)  # divides by the number of micro-steps
            step_loss += loss.detach() / micro_steps

        grad_norm = self._clip_gradients()
        learning_rate = lr_at(self.step, self.optim, self.plan)
        set_lr(self.optimizers, learning_rate)
        self.checkpointer.wait_for_copies()
        self.step += 1
        with self.monitor.watched_step(self.step):
            take_step(self.optimizers)
            self.averages.update(self.step)
            self.monitor.record(self.step, learning_rate, step_loss, grad_norm)

    def dry_run(self) -> int:
        """Do two steps, of which nothing is written, and say what the run will take. Returns the exit code."""
        expected = self.expected_cost()
        if expected.missing_gib > 0:  # said now, since the system may kill what asks for it
            self.look_ahead(expected)
        loss, _ = self.monitor.try_step(self.train_step)  # which starts workers, compiles, and makes the state
        _, seconds = self.monitor.try_step(self.train_step)
        self.step -= 2
        self.say(f"Dry run: loss {loss:.4f} in the first of two steps. Everything is in place.")
        copies_gib = forecast.copies_gib(self.network, self.optim, self.accelerator)
        peak_gib = peak_memory_gib(self.accelerator.device) + copies_gib
        self.look_ahead(forecast.highest(StepCost(seconds, expected.forward_s, peak_gib)))
        return 0

    def expected_cost(self) -> StepCost:
        is_guided = self.objective.model_guidance != 1
        return forecast.expected_cost(self.network, self.optimizers, self.optim, self.accelerator, is_guided)

    def look_ahead(self, cost: StepCost | None = None) -> None:
        """Say what time and memory the steps ahead take, by this `cost`, or that of a block; all processes together."""
        parts = {"sample": self.sheets, "validate": self.validation, **self.measures}
        counts = {o.name: forecast.times_due(o.every, self.step, self.plan.total_steps) for o in self.occasions}
        forwards = sum(counts[name] * part.passes for name, part in parts.items() if part)
        model, steps = self.facts.facts["settings"]["model"], self.plan.total_steps - self.step
        if steps > 0:
            cost = cost or self.expected_cost()
            forecast.say_outlook(cost, self.accelerator, steps, forwards, model)
            self.grace.look(cost.seconds, self.checkpointer.save_s)

    @span("forward")
    def loss(self, batch: Batch) -> Tensor:
        """Return the losses (B,) of a batch, all randomness following from its images' positions in the run."""
        torch.manual_seed(int(rng.hash64(self.seed, "dropout", batch.positions[0])) >> 1)
        labels, num_classes = self.tuning.labels_of(batch), self.network.config.num_classes
        labels = self.objective.dropped(self.seed, batch.positions, labels, num_classes)
        conditions = self.objective.left_out(self.seed, batch.positions, arguments_of(batch))
        model = self.aux.watched(self.model, self.step + 1)
        losses, t = self.objective.drawn_losses(model, batch.images, labels, self.seed, batch.positions, conditions)
        self.monitor.record_by_t(t, losses)
        return losses

    @span("clip")
    def _clip_gradients(self) -> Tensor:
        """Return the L2 norm over all parameters before clipping, on the device."""
        if self.optim.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.optim.max_grad_norm)
        else:
            self.accelerator.unscale_gradients()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def validate(self) -> None:
        """Measure the holdout's loss with the weights of this step and with their average, all processes together."""

        def losses_of(batch: Batch) -> Tensor:
            self.watch.go_on()
            labels = self.tuning.labels_of(batch)
            drawn = (labels, self.validation.seed, batch.positions, arguments_of(batch))
            return self.objective.unguided().drawn_losses(self.model, batch.images, *drawn)[0]

        self.model.eval()
        found = {}
        for name, weights in ((VAL_LOSS, contextlib.nullcontext()), (EMA_VAL_LOSS, self.averages.applied())):
            with self.monitor.pause(), weights:
                found[name] = self.validation.loss(losses_of)
        if self.step == self.first_step:  # a stop prevented it; the row is written already
            return self.monitor.amend(self.step, {name: loss.item() for name, loss in found.items()})
        for name, loss in found.items():
            self.monitor.record_occasional(name, loss)

    def _has_validated(self) -> bool:
        return on_main(self.accelerator, lambda: is_measured(self.output_dir, self.step, {VAL_LOSS, EMA_VAL_LOSS}))

    def flush(self) -> None:
        """Read the kept metrics: here alone the host waits. `UserError`: not finite, or too many broken images."""
        on_main(self.accelerator, partial(check_guard, self.output_dir))  # whose error would be one process's alone
        interval = self.monitor.read()
        self.checkpointer.finish_if_written()
        if found := interval.not_finite:
            self.checkpointer.distrust(self.first_step)
            raise self.checkpointer.diverged(f"{found.key} is {found.value} at step {found.step}")
        self.checkpointer.prove(self.step)
        if interval.rows:
            self.grace.look(interval.rows[-1][STEP_TIME], self.checkpointer.save_s)
        if error := self.feed.too_many_bad(interval.bad_images, max(interval.images_seen, self.plan.num_images)):
            self.save()
            self.checkpointer.finish()
            raise error

    def save(self) -> None:
        """Begin a checkpoint of this step, once; the metrics have been read, and are finite."""
        if self.saved_step != self.step:
            with self.monitor.pause():
                self.snapshots.finish()  # a start that goes on from this step has all of those before it
                self.checkpointer.begin(self.step, self.parts)
            self.saved_step = self.step

    def resume(self, path: Path) -> None:
        """Continue exactly where a checkpoint was written; `UserError` if it is of another model, data set or seed."""
        run = read_run(path)
        self.facts.refuse_other(path, run)
        if adapter := self.tuning.adapter:
            refuse_other_base(path, run, self.tuning.path, adapter.base_identity)
        self.step = self.first_step = self.checkpointer.unproven = load_parts(path, self.parts)
        self.checkpointer.save_s = read_manifest(path).get("seconds")  # none in older ones
        changes = f" with {self.facts.changes}" if self.facts.changes else ""
        self.say(f"Resumed from {path} at step {self.step:,}{changes}")

    @property
    def sheet_path(self) -> Path:
        return self.output_dir / "samples" / f"step_{self.step:08d}.png"

    def sample(self) -> None:
        """Draw this step's sheet of samples, all processes together, and report it."""
        self.model.eval()
        with self.monitor.pause():
            images = self.sheets.draw(self.sheet_path)
        if images and self.step < self.plan.total_steps:  # at the end all results are listed together
            self.say(f"Drew {self.sheet_path}")
        caption, is_late = self.sheets.caption(self.step), self.step == self.first_step  # which trackers may have
        self.monitor.log_samples(self.sheet_path, self.step, caption, images, is_late)
        self.monitor.examine_samples(self.step, self.sheets.generated)

    def evaluate(self, measure: SampleMeasure) -> None:
        """Measure generated images of this step's average, all processes together.

        The values go into the row of this step, which is written already; a failure costs them alone.
        """
        self.model.eval()
        with self.monitor.pause():
            self.checkpointer.finish()  # before anything can happen
            found = measure.measure(self.step)
        if found:
            self.monitor.amend(self.step, found)
            values = ", ".join(f"{part_of(name, EVAL) or name} {value:.4g}" for name, value in found.items())
            self.say(f"Step {self.step:,}: {values} of {measure.num_images:,} images")

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            say(message)

    def _open_logs(self) -> None:
        self.record = {}
        if self.accelerator.is_main_process:
            self.record = record_run(self.facts.facts, self.plan, self.network, self.accelerator)
            remove_notes(self.output_dir)
            for later in self.checkpointer.set_aside_after(self.step):
                self.say(f"Set aside {later.name}, which lies behind step {self.step:,}, as abandoned_{later.name}")
            self.snapshots.remove_after(self.step)
            if self.step < self.plan.total_steps:
                write_record(self.record, self.facts.facts["settings"], self.output_dir)
            else:  # what it was trained with stays its record, whatever this start says
                self.record |= read_record(self.output_dir)
        self.monitor.open(self.step, self.record, self.facts.is_other_training)

    def _leave(self) -> int:
        self.flush()
        self.save()
        self.checkpointer.finish()
        self.snapshots.finish()
        if self.accelerator.is_main_process:
            leave_interruption(self.output_dir, self.step)
        self.say(f"Stopped by a signal at step {self.step:,}. Go on with --resume auto.")
        return self._close(128 + self.stops.number)

    def _finish(self) -> int:
        self.checkpointer.finish()
        self.snapshots.finish()
        self.watch.at("writes the results", may_last=True)
        # The main process decides: the others may see another state of a shared file system.
        output_dir, sheet = self.output_dir, self.sheet_path
        if not on_main(self.accelerator, partial(is_exported, output_dir, sheet)):
            self.sample()
            results = (self.sheets.pipeline, self.averages, self.tuning, self.record)
            write_results(output_dir, sheet, *results, self.accelerator)
        self.monitor.log_model(output_dir / PIPELINE_FOLDER, self.step)
        self.say(places_of(output_dir, sheet, has_report=self.monitor.report.is_wanted))
        if skipped := self.feed.all_bad_images():
            self.say("\n  ".join([f"Skipped {len(skipped)} images that cannot be decoded:", *skipped]))
        return self._close(0)

    def _close(self, exit_code: int) -> int:
        self.watch.at("ends", may_last=True)
        self.monitor.close(exit_code)
        self.stops.close()
        self.accelerator.wait_for_everyone()
        return exit_code
