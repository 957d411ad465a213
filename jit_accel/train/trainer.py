"""The training loop. `Trainer.run` is the loop, `Trainer.train_step` the algorithm of the paper."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace
from pathlib import Path

import torch

from jit_accel.base import rng
from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_main
from jit_accel.base.sharding import reshard
from jit_accel.base.signals import StopSignal
from jit_accel.config.completion import Plan
from jit_accel.config.settings import Config, write_config
from jit_accel.data.batches.batch import Batch
from jit_accel.data.batches.holdout import HeldOut
from jit_accel.data.formats.sources import Source
from jit_accel.model.checkpoints import Checkpointer
from jit_accel.model.loading import build_network
from jit_accel.model.objective import diffusion_loss, draw_noise, draw_times, drop_labels
from jit_accel.monitor.log import FAILED_FILE, INTERRUPTED_FILE
from jit_accel.monitor.metric_table import EMA_VAL_LOSS, EVAL, VAL_LOSS, part_of
from jit_accel.monitor.monitor import Monitor
from jit_accel.train.averages import Ema
from jit_accel.train.feed import Feed
from jit_accel.train.guards import has_too_many_bad_images, stop_if_not_finite
from jit_accel.train.initial_weights import Initial, tune
from jit_accel.train.optimizers import build_optimizers, lr_at, set_lr
from jit_accel.train.record import record_run, write_record
from jit_accel.train.results import leave_results
from jit_accel.train.sample_quality import SampleQuality, Unmeasured
from jit_accel.train.samples import SampleSheets
from jit_accel.train.state import resume_state, save_state
from jit_accel.train.validation import Validation


class Trainer:
    """One training run.

    Args:
        config: fully resolved settings (`resolve.resolve`).
        plan: its lengths in optimizer steps.
        source: the data, opened.
        accelerator: `accelerate.Accelerator`, with the same accumulation and precision as `config`.
        held_out: images for `val/loss`.
        initial: the weights to start from.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        source: Source,
        accelerator,
        held_out: HeldOut | None = None,
        initial: Initial | None = None,
    ):
        self.config, self.plan, self.source, self.accelerator = config, plan, source, accelerator
        self.output_dir = Path(config.run.output_dir)
        self.checkpointer = Checkpointer(accelerator, self.output_dir, config.run.keep_checkpoints)
        self.step = 0
        self.stop = StopSignal()
        self.saved_step: int | None = None  # by this start
        self.is_other_training = False  # than the one it goes on from
        self.is_stopping = False  # unlike the signal itself, known to all processes alike

        torch.manual_seed(config.run.seed)  # the same initial weights on every process
        model = build_network(config)
        self.tuning = tune(model, config, source, initial, self.say)
        if config.performance.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.performance.compile:
            model.compile_repeated_blocks()
        optim = config.optim
        optimizers = build_optimizers(
            model, optimizer=optim.optimizer, weight_decay=optim.weight_decay, adam_betas=optim.adam_betas
        )
        # Nothing else is prepared: see "Accelerate" in docs/architecture.md.
        self.model, *self.optimizers = accelerator.prepare(model, *optimizers)
        self.network = accelerator.unwrap_model(self.model)
        self.ema = Ema(self.network, optim.ema_decays)
        self.samples = SampleSheets(self.network, self.ema, accelerator, config, self.tuning.class_names)
        self.feed = Feed(config, source, accelerator)
        self.monitor = Monitor(
            accelerator,
            self.feed,
            self.network,
            self.ema,
            plan=plan,
            output_dir=self.output_dir,
            tracking=config.tracking,
            health=config.health,
            log_every_steps=config.run.log_every_steps,
            precision=config.performance.mixed_precision,
            is_untrained=config.tune.init_from is None,
        )
        self.validation = Validation(held_out, accelerator, optim.batch_size) if held_out else None
        measures_samples = config.evaluation.eval_every_steps > 0
        self.quality = SampleQuality(self.network, self.ema, accelerator, config, source) if measures_samples else None

    def run(self) -> int:
        """Train to the end, or until a signal. Returns the exit code."""
        config, plan = self.config, self.plan
        self.output_dir.mkdir(parents=True, exist_ok=True)
        lacks_evaluation = self._lacks_evaluation()
        if self.quality and (self.step < plan.total_steps or lacks_evaluation):
            self.quality.prepare()
        with self.stop, self.monitor:
            self._open_logs()
            if self._lacks_samples():
                self.sample(is_late=True)
            if lacks_evaluation:
                self.evaluate()
            while self.step < plan.total_steps:
                self.train_step()
                at_end = self.step == plan.total_steps
                if self.validation and (at_end or is_due(self.step, config.run.val_every_steps)):
                    self.validate()
                if is_due(self.step, config.run.log_every_steps) or self._is_told_to_stop_alone():
                    self.flush()
                if self.is_stopping:
                    return self._leave()
                if at_end or is_due(self.step, config.run.save_every_steps):
                    self.save()
                # Only after the checkpoint, so that whatever happens to them costs no step.
                for is_now, action in ((self._samples_now(), self.sample), (self._evaluates_now(), self.evaluate)):
                    if is_now:
                        self.flush()
                        if self.is_stopping:
                            return self._leave()
                        action()
            return self._finish()

    def train_step(self) -> None:
        """One optimizer step: predict the clean image of a noised one, over all processes and micro-steps."""
        accelerator, optim = self.accelerator, self.config.optim
        self.model.train()
        step_loss = torch.zeros((), device=accelerator.device)
        for micro_step in range(optim.gradient_accumulation_steps):
            is_last = micro_step == optim.gradient_accumulation_steps - 1
            # Gradients travel between processes once a step, with the last micro-step.
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.model):
                loss = self.loss(self.feed.next()).mean()
                accelerator.backward(loss)  # divides by the number of micro-steps
            step_loss += loss.detach() / optim.gradient_accumulation_steps

        grad_norm = self._clip_gradients(optim.max_grad_norm)
        learning_rate = self.learning_rate
        set_lr(self.optimizers, learning_rate)
        self.step += 1
        with self.monitor.watched_step(self.step):
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.ema.update(self.step)
            self.monitor.record(self.step, learning_rate, step_loss, grad_norm)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Losses (B,) of a batch, all randomness following from their positions in the run."""
        config, seed, positions = self.config, self.config.run.seed, batch.positions
        if config.model.proj_dropout or config.model.attn_dropout or config.tune.lora_dropout:
            torch.manual_seed(int(rng.hash64(seed, "dropout", positions[0])) >> 1)
        drop_prob = config.objective.label_drop_prob
        labels = drop_labels(seed, positions, self.tuning.labels_of(batch), config.model.num_classes, drop_prob)
        losses, t = self._denoising_loss(replace(batch, labels=labels), seed)
        self.monitor.record_by_t(t, losses)
        return losses

    def validate(self) -> None:
        """Measure the holdout's loss with the weights of this step and with their average, all processes together."""
        self.model.eval()
        averaged = self.ema.applied(self.config.optim.ema_decays[0])
        for name, weights in ((VAL_LOSS, contextlib.nullcontext()), (EMA_VAL_LOSS, averaged)):
            with self.monitor.pause(), weights:
                loss = self.validation.loss(self._validation_loss)
                reshard(self.network)
            self.monitor.record_occasional(name, loss)

    def _validation_loss(self, batch: Batch) -> torch.Tensor:
        batch = replace(batch, labels=self.tuning.labels_of(batch))
        return self._denoising_loss(batch, self.validation.seed)[0]

    def evaluate(self) -> None:
        """Measure generated images of this step's average against real ones, all processes together.

        The values go into the row of this step, which is written already; a failure costs them alone.
        """
        self.model.eval()
        try:
            with self.monitor.pause():
                found = self.quality.measure()
        except Unmeasured as problem:  # met by all processes
            if self.accelerator.is_main_process:
                warn(f"step {self.step:,} is not evaluated, and training goes on: {problem}")
            return
        self.monitor.amend(self.step, found)
        values = ", ".join(f"{part_of(name, EVAL)} {value:.4g}" for name, value in found.items())
        self.say(f"Step {self.step:,}: {values} of {self.config.evaluation.eval_images:,} images")

    def _samples_now(self) -> bool:
        at_end = self.step == self.plan.total_steps  # where there is a sheet in any case
        return not at_end and is_due(self.step, self.config.sample.sample_every_steps)

    def _lacks_samples(self) -> bool:
        """Whether an earlier start saved this step, but was stopped before its sheet was drawn."""
        if self.step == 0 or not self._samples_now():
            return False
        return on_main(self.accelerator, lambda: not self.sheet_path.exists())

    def _evaluates_now(self) -> bool:
        at_end = self.step == self.plan.total_steps
        return bool(self.quality) and (at_end or is_due(self.step, self.config.evaluation.eval_every_steps))

    def _lacks_evaluation(self) -> bool:
        """Whether an earlier start saved this step, but was stopped before it was evaluated."""
        return self.step > 0 and self._evaluates_now() and self.quality.is_lacking(self.step)

    def _denoising_loss(self, batch: Batch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B,) of a batch, and the times (B,) they were noised to."""
        objective, positions, x = self.config.objective, batch.positions, batch.images
        t = draw_times(seed, positions, objective.P_mean, objective.P_std).to(x.device, non_blocking=True)
        e = draw_noise(seed, positions, like=x, noise_scale=objective.noise_scale)
        losses = diffusion_loss(
            self.model,
            x,
            t,
            e,
            batch.labels,
            prediction=objective.prediction,
            loss_space=objective.loss_space,
            t_eps=objective.t_eps,
        )
        return losses, t

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        optim = self.config.optim
        return lr_at(
            self.step,
            learning_rate=optim.learning_rate,
            warmup_steps=self.plan.warmup_steps,
            total_steps=self.plan.total_steps,
            schedule=optim.lr_schedule,
            min_learning_rate=optim.min_learning_rate,
        )

    def _clip_gradients(self, max_norm: float) -> torch.Tensor:
        """L2 norm over all parameters before clipping, on the device."""
        if max_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        else:
            self.accelerator.unscale_gradients()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def flush(self) -> None:
        """Read the kept metrics: the only place where the host waits for the device.

        Raises:
            UserError: loss or gradient norm not finite; too many broken images.
        """
        interval = self.monitor.read(self.stop.number > 0)
        self.is_stopping = interval.stop_asked
        stop_if_not_finite(interval.not_finite, self.output_dir)
        self._stop_if_data_is_bad(interval.bad_images, interval.images_seen)

    def _stop_if_data_is_bad(self, bad_images: int, images_seen: int) -> None:
        share = self.config.data.max_bad_images
        if has_too_many_bad_images(bad_images, share, images_seen, self.plan.num_images):
            self._write_checkpoint()
            raise UserError(
                f"{bad_images} images cannot be decoded, more than that share; the first: "
                f"{'; '.join(self.feed.all_bad_images()[:3])}. Mend or remove them, or raise the share; the run is "
                "saved and goes on with --resume auto.",
                about="max_bad_images",
                value=f"{share:g}",
            )

    def save(self) -> None:
        """Write a checkpoint of this step, after making sure that it is worth keeping; once."""
        self.flush()
        if self.saved_step != self.step:
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        with self.monitor.pause():
            path = save_state(self)
        self.saved_step = self.step
        self.say(f"Saved {path}")

    def resume(self, path: Path) -> None:
        """Continue exactly where the checkpoint was written.

        Raises:
            UserError: it belongs to another model, size, data set or seed.
        """
        resume_state(self, path)

    def sample(self, is_late: bool = False) -> Path:
        """Make this step's sheet of samples, all processes together, and report it. Returns its path.

        Args:
            is_late: the trackers may have this step already.
        """
        self.model.eval()
        with self.monitor.pause():
            self.samples.draw(self.sheet_path)
        self.monitor.log_samples(self.sheet_path, self.step, self.samples.caption(self.step), is_late)
        return self.sheet_path

    @property
    def sheet_path(self) -> Path:
        return self.output_dir / "samples" / f"step_{self.step:08d}.png"

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            say(message)

    def _open_logs(self) -> None:
        self.record = record_run(self) if self.accelerator.is_main_process else {}
        if self.accelerator.is_main_process:
            for marker in (INTERRUPTED_FILE, FAILED_FILE):
                (self.output_dir / marker).unlink(missing_ok=True)
            for later in self.checkpointer.set_aside_after(self.step):
                self.say(f"Set aside {later.name}, which lies behind step {self.step:,}, as abandoned_{later.name}")
            if self.step < self.plan.total_steps:
                with contextlib.suppress(OSError):
                    write_config(self.config, self.output_dir / "config.yaml")
                write_record(self.record, self.output_dir)
        self.monitor.open(self.step, self.record, self.is_other_training)

    def _is_told_to_stop_alone(self) -> bool:
        # Several processes agree at the next flush; one need not wait for it.
        return self.stop.number > 0 and self.accelerator.num_processes == 1

    def _leave(self) -> int:
        self.save()
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                note = f"stopped at step {self.step}; go on with --resume auto\n"
                (self.output_dir / INTERRUPTED_FILE).write_text(note)
        self.say(f"Stopped by a signal at step {self.step:,}. Go on with --resume auto.")
        code = 128 + (self.stop.number or signal.SIGTERM)  # this process may not have been told
        self._close(code)
        return code

    def _finish(self) -> int:
        leave_results(self)
        self._close(0)
        return 0

    def _close(self, exit_code: int) -> None:
        self.monitor.close(exit_code)
        self.accelerator.wait_for_everyone()


def is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
