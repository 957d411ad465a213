"""From settings to images: every process makes its share, in step with the others."""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from jit_accel.base.console import ImageProgress, redacted, say, warn
from jit_accel.base.devices import DTYPES, chosen_precision, has_bf16
from jit_accel.base.errors import Stopped, StopRequest, UserError, renamed_settings
from jit_accel.base.files import disk_errors, write_json
from jit_accel.base.host import keep_heap
from jit_accel.base.processes import on_all, on_main, process_group
from jit_accel.config.presets import sides_of
from jit_accel.data.formats.scan import SAMPLES_RECORD
from jit_accel.model.generation import SamplerSettings, checked_size, generate_batches, share_of
from jit_accel.model.loading import load_quietly
from jit_accel.model.pipeline import COMPONENTS, JiTPipeline
from jit_accel.model.precision import BlockWork, settle
from jit_accel.model.saved_weights import weights_fingerprint
from jit_accel.model.scheduler import time_grid
from jit_accel.model.solvers import SOLVERS
from jit_accel.model.vector_arguments import note_of_none
from jit_accel.sample import image_files
from jit_accel.sample.array_files import ArrayFiles
from jit_accel.sample.conditions import open_conditions
from jit_accel.sample.given_numbers import open_numbers
from jit_accel.sample.image_plan import (
    VERSION,
    ImageId,
    SamplePlan,
    begun_precision,
    classes_of,
    open_folder,
    plan_images,
)
from jit_accel.sample.settings import SampleConfig


def sample(config: SampleConfig) -> int:
    """Make the images, or those that are missing; return the exit code. Raises `UserError`: on all processes."""
    keep_heap()
    chosen_precision(config.mixed_precision)  # one that cannot be is found out before all else
    # The others wait while the main process puts an .npz together or draws pictures.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    with process_group(accelerator), StopRequest() as stop:
        try:
            sampling = on_all(accelerator, lambda: Sampling(config, accelerator, stop), stop=stop)
            sampling.run()
        except Stopped as stopped:
            if accelerator.is_main_process:
                folder = Path(config.output_dir).expanduser()
                say(f"Stopped. What is finished is kept in {folder}: the same command with --resume goes on.")
            return 128 + stopped.number
    return 0


# The settings of networks and schedulers when the first samples were made; later ones count where they are no defaults.
FIRST_SETTINGS = (
    *("img_size", "patch_size", "hidden_size", "depth", "num_heads", "bottleneck_dim", "in_context_len"),
    *("in_context_start", "num_classes", "mlp_ratio", "attn_dropout", "proj_dropout", "in_channels"),
    *("prediction_type", "t_eps", "noise_scale", "solver"),
)


def fingerprint(pipeline: JiTPipeline) -> str:
    """Return 16 hex digits of a network's configuration and some values of each tensor; training changes all."""
    found = hashlib.sha256()
    for part in (pipeline.transformer, pipeline.scheduler):
        # diffusers' own entries, with an underscore, say where it lay and what wrote it
        settings = {name: value for name, value in part.config.items() if not name.startswith("_")}
        defaults = {
            name: setting.default for name, setting in inspect.signature(type(part).__init__).parameters.items()
        }
        later = set(settings) & set(defaults) - set(FIRST_SETTINGS) if type(part) in COMPONENTS.values() else ()
        for name in later:
            if settings[name] == defaults[name] or (settings[name], defaults[name]) == ([], ()):  # as JSON has it
                del settings[name]
        found.update(repr(sorted(settings.items())).encode())
    for name, tensor in sorted(pipeline.transformer.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 1024)].float().cpu()
        found.update(name.encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


class Sampling:
    """The images to make, the pipeline that makes them, and their place; UserError if settings do not fit it."""

    def __init__(self, config: SampleConfig, accelerator: Accelerator, stop: StopRequest):
        self.config, self.accelerator, self.stop = config, accelerator, stop
        how = accelerator.device, config.compile, config.guide
        with renamed_settings(ema_width="ema"):
            self.pipeline = pipeline = load_quietly(config.model, config.ema, *how)
        channels, self.value_range = pipeline.transformer.config.in_channels, pipeline.config.get("value_range")
        self.format = config.format or ("png" if channels in (1, 3) else "npy")
        if channels not in (1, 3) and self.format != "npy":
            rule = f"the model makes images of {channels} channels, which are no pictures: use npy, the default here."
            raise UserError(rule, about="format", value=self.format)
        sides = [flag if getattr(config, flag) else "img_size" for flag in ("height", "width")]
        trained = sides_of(config.img_size or pipeline.transformer.config.img_size)
        asked = (getattr(config, flag) or side for flag, side in zip(("height", "width"), trained))
        self.size = tuple(checked_size(pipeline, side, flag) for side, flag in zip(asked, sides))
        self.conditions = shown = open_conditions(config.condition_path, pipeline, self.size, config.model)
        self.columns = pipeline.config.get("vectors")
        self.numbers = open_numbers(config.vectors, self.columns, config.model)
        self.plan = self._planned(len(shown) if shown else 0, shown.names if shown else ())
        settings = {field.name: getattr(config, field.name) for field in fields(SamplerSettings)}
        self.settings = SamplerSettings(**settings).completed(pipeline)
        for name in ("trajectory", "animation") if self.settings.method not in SOLVERS else ():
            if getattr(config, name):
                raise UserError("shows equal steps, not those of the model's scheduler: leave it out.", about=name)
        self.folder = Path(config.output_dir).expanduser()
        self.batch_size = config.batch_size or (16 if accelerator.device.type == "cpu" else 64)
        place = self.folder, self.plan, self.size
        self.store = {
            "npz": lambda: image_files.NpzFile(*place),
            "npy": lambda: ArrayFiles(*place, channels, self.value_range),
        }.get(self.format, lambda: image_files.ImageFiles(*place, self.format))()
        self.writing = partial(disk_errors, "output_dir", self.folder, "run the same command again with --resume")

    def _planned(self, num_pictures: int, stems: Sequence[str]) -> SamplePlan:
        """Return the images to make. Raises `UserError`."""
        config, sizes = self.config, self.pipeline.transformer.config
        num_given = max(num_pictures, len(self.numbers) if self.numbers and self.numbers.is_file else 0) or None
        several = sizes.get("has_several_labels", False)  # carried code may know none
        plan = plan_images(config, sizes.num_classes, self.pipeline.config.class_names, num_given, stems, several)
        if self.format == "npz" and max(plan.labels) > plan.num_classes:
            rule = "holds one class an image: use another format for images with several."
            raise UserError(rule, about="format", value="npz")
        return plan

    def run(self) -> None:
        """Make what is missing, and the pictures."""
        accelerator, stop, config = self.accelerator, self.stop, self.config
        sizes = self.pipeline.transformer.config
        work = BlockWork.of(sizes, sizes.patch_size, *self.size, self.batch_size, trains=False)
        begun = begun_precision(self.folder) if config.resume else None
        self.precision, self.times = settle(accelerator, config.mixed_precision, work, begun)
        with self.store.pool:
            missing = on_main(accelerator, self._begin, stop)
            rate = self._make(missing)
            on_main(accelerator, lambda: self._finish(len(missing), rate), stop)

    def _begin(self) -> list[ImageId]:
        """Open the folder; return what is missing in it."""
        config, (height, width) = self.config, self.size
        how = {"height": height, "width": width, "mixed_precision": self.precision, "format": self.format}
        sampler = {name: value for name, value in asdict(self.settings).items() if (name, value) != ("time_shift", 1.0)}
        record = {  # of samples.json: what the images follow from, and which they are
            "version": VERSION,
            "settings": {"seed": config.seed, **sampler, **how, **self._shown()},
            "model": {"path": config.model, "ema": config.ema, "fingerprint": fingerprint(self.pipeline)},
            "num_images": self.plan.num_images,
            "classes": self.plan.classes(),
        }
        with self.writing():
            open_folder(self.folder, record, config.resume)
            if self.precision == "bf16" and not has_bf16(self.accelerator.device):
                warn("this device only emulates bf16, up to a hundred times slower: use --mixed_precision no.")
            if not self.numbers and (note := note_of_none(self.columns, "--vectors gives them")):
                warn(note)
            self.store.prepare()
            missing = self.store.missing(self._stop_here)
            write_json(self.folder / SAMPLES_RECORD, record)  # last: a command that is refused changes nothing
        settings, total = self.settings, self.plan.num_images
        why = f" ({self.times.in_words()})" if self.times else ""
        there = f", {total - len(missing):,} of them there already" if len(missing) < total else ""
        guidance = f"guidance {settings.guidance_scale:g}"
        if settings.guidance_scale != 1:
            guidance += " at {:g} < t < {:g}".format(*settings.guidance_interval)
        shift = f", time shift {settings.time_shift:g}" if settings.time_shift != 1 else ""
        say(
            f"Sampling {total:,} images of {self.size[0]} x {self.size[1]} px{there}: {settings.num_inference_steps} "
            f"{settings.method[:1].upper()}{settings.method[1:]} steps{shift}, {guidance}, seed {config.seed}, on "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}, precision {self.precision}{why} → "
            f"{self.folder}"
        )
        return missing

    def _shown(self) -> dict[str, str]:
        """Return what the network is shown, as it stands in samples.json."""
        found = {"vectors": self.numbers and self.numbers.record} if self.columns else {}
        if self.pipeline.guide is not None:
            found["guide"] = f"{self.config.guide} ({weights_fingerprint(self.pipeline.guide.state_dict())})"
        if self.conditions:
            source = self.conditions.source
            found["condition_path"] = f"{redacted(source.name)} ({source.num_images} images, {source.fingerprint})"
        return found

    def _make(self, missing: Sequence[ImageId]) -> float:
        """Make images in rounds of a batch for each process; return images/s."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        total = self.plan.num_images
        with ImageProgress("sample", total, total - len(missing), self.accelerator.is_main_process) as progress:
            # Images of no class are not guided: in batches of their own all rows of a batch are, or none.
            for has_class in (True, False):
                ids = [image for image in missing if (image.label != self.plan.num_classes) == has_class]
                mine = share_of(ids, rank, world_size)
                for start in range(0, len(ids), self.batch_size * world_size):
                    first = start // world_size
                    batch = mine[first : first + self.batch_size]
                    on_all(self.accelerator, partial(self._make_batch, batch), stop=self.stop)
                    progress.add(len(ids[start : start + self.batch_size * world_size]))
            on_all(self.accelerator, partial(self._make_batch, []), stop=self.stop)  # waits until all are written
            return progress.rate

    def _make_batch(self, batch: Sequence[ImageId]) -> None:
        """Make images and begin to write them, when those before are written."""
        with self.writing():
            self.store.write(batch, self._draw(batch, self._stop_here) if batch else ())

    def _draw(self, ids: Sequence[ImageId], on_step) -> np.ndarray:
        """Return images (B, H, W, C), uint8, or as the data has them where they are to be arrays in a range."""
        dtype, in_units = DTYPES.get(self.precision), self.format == "npy" and self.value_range is not None
        places = [self.plan.index_of(image) for image in ids]
        try:
            with torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None):
                ((_, images),) = generate_batches(
                    self.pipeline,
                    [image.number for image in ids],
                    seed=self.config.seed,
                    labels=[self._label_of(image) for image in ids],
                    settings=self.settings,
                    batch_size=len(ids),
                    height=self.size[0],
                    width=self.size[1],
                    # Compiled code is for one size of batches.
                    batch_multiple=self.batch_size if self.config.compile else None,
                    on_step=on_step,
                    conditions=self.conditions and self.conditions.read(places),
                    vectors=self.numbers and self.numbers.read(places),
                    as_bytes=not in_units,
                )
        except torch.OutOfMemoryError:
            rule = "does not fit into the memory of the device: use a smaller one."
            raise UserError(rule, about="batch_size", value=self.batch_size) from None
        if in_units:
            low, high = self.value_range
            images = images * (high - low) + low
        return images.permute(0, 2, 3, 1).cpu().numpy()

    def _label_of(self, image: ImageId) -> int | list[int] | None:
        """Return the label of an image as a call of the pipeline takes it."""
        classes = classes_of(image.label, self.plan.num_classes)
        return classes if len(classes) > 1 else classes[0] if classes else None

    def _stop_here(self, *_) -> dict:
        self.stop.raise_if_asked()
        return {}

    def _finish(self, num_made: int, rate: float) -> None:
        with self.writing():
            where = self.store.finish()
            total, classes = self.plan.num_images, len(self.plan.labels)
            made = f", {num_made:,} of them now, {rate:.3g} images/s" if num_made else ", all of them before"
            say(f"Images:     {total:,} of {classes:,} class{'es' * (classes > 1)}{made} → {where}")
            config, follow = self.config, (self._follow, self.settings.num_inference_steps, self.batch_size)
            for title, name, is_asked, draw, how in (
                ("Grid:      ", "grid.png", config.grid, image_files.draw_grid, (self.store.read,)),
                ("Trajectory:", "trajectory.png", config.trajectory, image_files.draw_strip, follow),
                ("Animation: ", f"animation.{config.animation}", config.animation, image_files.draw_animation, follow),
            ):
                if is_asked:
                    draw(self.plan, *how, self.folder / name)
                    say(f"{title} {self.folder / name}")

    def _follow(self, ids: list[ImageId], steps: list[int], show: image_files.Show) -> None:
        """Make images once more, and `show` how they come about."""
        noise = image_files.start_noise(self.pipeline, self.config.seed, [image.number for image in ids], *self.size)
        t_eps = self.pipeline.config.objective["t_eps"]
        times = time_grid(self.settings.num_inference_steps, self.settings.time_shift)
        step_done = image_files.denoising(noise, times, steps, show, t_eps)
        self._draw(ids, lambda *step: step_done(*step) or self._stop_here())
