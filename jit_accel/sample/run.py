"""From settings to images: every process makes its share, in step with the others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers.utils import logging as diffusers_logging

from jit_accel.base.console import say, warn
from jit_accel.base.devices import DTYPES, chosen_precision, is_good_at_bf16
from jit_accel.base.errors import UserError
from jit_accel.base.files import disk_errors
from jit_accel.base.processes import Stopped, on_all, on_main, process_group
from jit_accel.base.signals import StopSignal
from jit_accel.model.generation import SamplerSettings, generate_batches, share_of
from jit_accel.model.loading import load_pipeline
from jit_accel.model.pipeline import STEPS, JiTPipeline
from jit_accel.sample import pictures
from jit_accel.sample.files import GO_ON, ImageFiles
from jit_accel.sample.folder import open_folder, record_of, write_record
from jit_accel.sample.npz import NpzFile
from jit_accel.sample.plan import Item, Plan, plan_images
from jit_accel.sample.progress import ImagesDone
from jit_accel.sample.settings import SampleConfig

GRID, STRIP, ANIMATION = "grid.png", "trajectory.png", "animation"


def sample(config: SampleConfig) -> int:
    """Make the images, or those that are missing. Returns the exit code.

    Raises:
        UserError: whatever the user can mend, on all processes.
    """
    precision = chosen_precision(config.mixed_precision)
    # The others wait while the main process puts an .npz together or draws pictures.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    folder = Path(config.output_dir).expanduser()
    with process_group(accelerator), StopSignal() as stop:
        try:
            sampling = on_all(accelerator, lambda: build(config, precision, accelerator, stop), stop=stop)
            return sampling.run()
        except Stopped as stopped:
            if accelerator.is_main_process:
                say(f"Stopped. What is finished is kept in {folder}: the same command with --resume goes on.")
            return 128 + stopped.number


def build(config: SampleConfig, precision: str, accelerator: Accelerator, stop: StopSignal) -> Sampling:
    """Load the pipeline and check the settings against it; writes nothing."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    pipeline = load_pipeline(config.model, config.ema)
    pipeline.set_progress_bar_config(disable=True)
    own, network = pipeline.config, pipeline.transformer.config
    plan = plan_images(config, network.num_classes, own.class_names)
    height, width = size_of(config, network)
    interval = own.guidance_interval if config.guidance_interval is None else config.guidance_interval
    scale = own.guidance_scale if config.guidance_scale is None else config.guidance_scale
    settings = SamplerSettings(
        num_inference_steps=config.num_inference_steps or own.num_inference_steps or STEPS,
        guidance_scale=float(scale),
        guidance_interval=tuple(map(float, interval)),
        method=config.method or own.method or pipeline.scheduler.config.solver,
    )
    model = {"path": config.model, "ema": config.ema, "fingerprint": fingerprint(pipeline)}
    pipeline.to(accelerator.device)
    if config.compile:
        pipeline.transformer.compile_repeated_blocks()
    return Sampling(config, pipeline, plan, settings, (height, width), precision, model, accelerator, stop)


def size_of(config: SampleConfig, network) -> tuple[int, int]:
    """Height and width in pixels."""
    patch, size = network.patch_size, []
    for flag in ("height", "width"):
        flag = flag if getattr(config, flag) is not None else "img_size"
        side = getattr(config, flag) or network.img_size
        if side % patch:
            lower = side // patch * patch
            choices = " or ".join(str(n) for n in (lower, lower + patch) if n)
            raise UserError(f"must be a multiple of the patch size, {patch}: use {choices}.", about=flag, value=side)
        size.append(side)
    return tuple(size)


def fingerprint(pipeline: JiTPipeline) -> str:
    """Tells networks apart, by their configuration and some values of each tensor; training changes all."""
    found = hashlib.sha256()
    for part in (pipeline.transformer, pipeline.scheduler):
        # diffusers' own entries, with an underscore, say where it lay and what wrote it
        settings = sorted((name, value) for name, value in part.config.items() if not name.startswith("_"))
        found.update(repr(settings).encode())
    for name, tensor in sorted(pipeline.transformer.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 1024)].float().cpu()
        found.update(name.encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


@dataclass
class Sampling:
    """What is made, of what, and where."""

    config: SampleConfig
    pipeline: JiTPipeline
    plan: Plan
    settings: SamplerSettings
    size: tuple[int, int]
    precision: str
    model: dict
    accelerator: Accelerator
    stop: StopSignal

    def __post_init__(self):
        self.folder = Path(self.config.output_dir).expanduser()
        device = self.accelerator.device.type
        self.batch_size = self.config.batch_size or (16 if device == "cpu" else 64)
        if self.config.format == "npz":
            self.store = NpzFile(self.folder, self.plan, self.size)
        else:
            self.store = ImageFiles(self.folder, self.plan, self.config.format, self.size)

    def run(self) -> int:
        """Make what is missing, and the pictures. Returns the exit code."""
        accelerator, stop = self.accelerator, self.stop
        with contextlib.closing(self.store):
            missing = on_main(accelerator, self._begin, stop)
            rate = self._make(missing)
            on_main(accelerator, lambda: self._finish(len(missing), rate), stop)
        return 0

    def recorded(self) -> dict:
        """What the images follow from, beside the model and their numbers, as JSON keeps it."""
        return {
            "seed": self.config.seed,
            **asdict(self.settings),
            "guidance_interval": list(self.settings.guidance_interval),
            "height": self.size[0],
            "width": self.size[1],
            "mixed_precision": self.precision,
            "format": self.config.format,
        }

    def _begin(self) -> list[Item]:
        """Open the folder; return what is missing in it."""
        record = record_of(self.recorded(), self.model, self.plan)
        open_folder(self.folder, record, self.config.resume)
        device = self.accelerator.device
        if self.precision == "bf16" and not is_good_at_bf16(device):
            warn("this device only emulates bf16, up to a hundred times slower: use --mixed_precision no.")
        with self._writing():
            self.store.prepare()
            missing = self.store.missing(self._stop_here)
            write_record(self.folder, record)  # last, so that a command that is refused changes nothing
        total = sum(self.plan.counts)
        there = f", {total - len(missing):,} of them there already" if len(missing) < total else ""
        height, width = self.size
        settings = self.settings
        guidance = f"guidance {settings.guidance_scale:g}"
        if settings.guidance_scale != 1:
            guidance += " at {:g} < t < {:g}".format(*settings.guidance_interval)
        say(
            f"Sampling {total:,} images of {height} x {width} px{there}: {settings.num_inference_steps} "
            f"{settings.method.capitalize()} steps, {guidance}, seed {self.config.seed}, on "
            f"{self.accelerator.num_processes} x {device.type}, precision {self.precision} → {self.folder}"
        )
        return missing

    def _make(self, missing: Sequence[Item]) -> float:
        """Make images in rounds of a batch for each process; return images/s."""
        accelerator = self.accelerator
        done = ImagesDone(sum(self.plan.counts), sum(self.plan.counts) - len(missing), accelerator.is_main_process)
        a_round = self.batch_size * accelerator.num_processes
        try:
            # Images of no class are not guided: in batches of their own all rows of a batch are, or none.
            for has_class in (True, False):
                items = [item for item in missing if (item.label < self.plan.num_classes) == has_class]
                mine = share_of(items, accelerator.process_index, accelerator.num_processes)
                for start in range(0, len(items), a_round):
                    first = start // accelerator.num_processes
                    batch = mine[first : first + self.batch_size]
                    on_all(accelerator, lambda batch=batch: self._make_batch(batch), stop=self.stop)
                    done.add(len(items[start : start + a_round]))
            on_all(accelerator, self._flush, stop=self.stop)
            return done.rate
        finally:
            done.close()

    def _make_batch(self, batch: Sequence[Item]) -> None:
        if batch:
            with self._writing():
                self.store.write(batch, self._draw(batch, self._stop_here))

    def _flush(self) -> None:
        with self._writing():
            self.store.flush()

    def _draw(self, items: Sequence[Item], on_step):
        """Images uint8 (B, H, W, 3)."""
        device = self.accelerator.device.type
        dtype = DTYPES.get(self.precision)
        no_class = self.plan.num_classes
        try:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                ((_, images),) = generate_batches(
                    self.pipeline,
                    [item.number for item in items],
                    seed=self.config.seed,
                    labels=[None if item.label == no_class else item.label for item in items],
                    settings=self.settings,
                    batch_size=len(items),
                    height=self.size[0],
                    width=self.size[1],
                    # Compiled code is for one size of batches.
                    batch_multiple=self.batch_size if self.config.compile else None,
                    on_step=on_step,
                )
        except torch.OutOfMemoryError:
            raise UserError(
                "does not fit into the memory of the device: use a smaller one.",
                about="batch_size",
                value=self.batch_size,
            ) from None
        return images.permute(0, 2, 3, 1).cpu().numpy()

    def _stop_here(self, *_) -> dict:
        if self.stop.number:
            raise Stopped(self.stop.number)
        return {}

    def _writing(self):
        return disk_errors("output_dir", self.folder, GO_ON)

    def _finish(self, num_made: int, rate: float) -> None:
        with self._writing():
            where = self.store.finish()
            total, classes = sum(self.plan.counts), len(self.plan.labels)
            made = f", {num_made:,} of them now, {rate:.3g} images/s" if num_made else ", all of them before"
            say(f"Images:     {total:,} of {classes:,} class{'es' * (classes > 1)}{made} → {where}")
            self._draw_pictures()

    def _draw_pictures(self) -> None:
        if self.config.grid:
            pictures.draw_grid(self.plan, self.store.read, self.folder / GRID)
            say(f"Grid:       {self.folder / GRID}")
        if self.config.trajectory:
            items = pictures.strip_items(self.plan, self.batch_size)
            strip = pictures.Strip([self.plan.name(item.label) for item in items])
            self._follow(items, pictures.spread(self.settings.num_inference_steps, pictures.STRIP_COLUMNS), strip.show)
            strip.write(self.folder / STRIP)
            say(f"Trajectory: {self.folder / STRIP}")
        if self.config.animation:
            path = self.folder / f"{ANIMATION}.{self.config.animation}"
            rows = pictures.animation_rows(self.plan, self.batch_size)
            animation = pictures.Animation([(self.plan.name(label), len(items)) for label, items in rows])
            items = [item for _, row in rows for item in row]
            self._follow(items, animation.steps(self.settings.num_inference_steps), animation.show)
            animation.write(path)
            say(f"Animation:  {path}")

    def _follow(self, items: list[Item], steps: list[int], show) -> None:
        """Make images once more, and `show` how they come about."""
        numbers = [item.number for item in items]
        noise = pictures.start_noise(self.pipeline, self.config.seed, numbers, *self.size)
        t_eps = self.pipeline.scheduler.config.t_eps
        denoising = pictures.Denoising(noise, self.settings.num_inference_steps, steps, show, t_eps)

        def on_step(*arguments) -> dict:
            denoising.step_done(*arguments)
            return self._stop_here()

        self._draw(items, on_step)
