"""`JiTPipeline`: class labels or names in, images out."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import snapshot_download
from torch import Tensor

from jit_accel.config.presets import Size, sides_of
from jit_accel.model.call_arguments import (
    DEFAULTS,
    Label,
    callback_tensors,
    checked_count,
    checked_default,
    checked_generators,
    checked_names,
    label_ids,
    labels_tensor,
    skipped_steps,
)
from jit_accel.model.carried_code import INDEX_FILE, KeptCardMixin, carry_code
from jit_accel.model.guidance import GuidanceMixin, GuidedField
from jit_accel.model.lora_loading import LoraMixin
from jit_accel.model.picture_arguments import (
    Picture,
    bridge_start,
    checked_output,
    condition_pictures,
    conditions_of,
    output_of,
    repaint_mask,
    start_images,
)
from jit_accel.model.scheduler import FlowMatchDriver, JiTScheduler, is_own, objective_of
from jit_accel.model.transformer import JiTTransformer2DModel, evaluating
from jit_accel.model.vector_arguments import Row, checked_columns, spread, standardised_vectors, vectors_asked

Generators = torch.Generator | list[torch.Generator] | None
COMPONENTS = {"transformer": JiTTransformer2DModel, "scheduler": JiTScheduler}
SETTINGS = ("class_names", "vectors", "objective", *DEFAULTS)
STEPS = 50  # where neither the call nor the pipeline says
DOWNLOAD_SETTINGS = ("revision", "cache_dir", "token", "force_download", "local_files_only")


class JiTPipeline(KeptCardMixin, GuidanceMixin, DiffusionPipeline, LoraMixin):
    """Generate images of given classes, or from given pictures, with a JiT.

    Args:
        transformer, scheduler: the network and its ODE; also a flow-matching scheduler of diffusers.
        class_names: the name of each class, so that calls may use names.
        guidance_scale, guidance_interval, guidance_on, num_inference_steps, method, time_shift: what a call uses that
            does not say otherwise. They are kept in `model_index.json` with the class names.
        objective: what the network was trained with, where the scheduler is no `JiTScheduler`, which knows it:
            {"prediction_type": "x", "t_eps": 0.05, "noise_scale": 1.0}; of a bridge also {"path": "bridge"}.
        vectors: the columns of numbers that the network takes: {"names", "sizes", "mean", "std"}, lists.
        value_range: the values of the data that were -1 and 1 to the network; arrays are in these units, in and out.

    What is left out is as in the pipeline that the network was in last, so `JiTPipeline(**pipe.components)` is like it.

    Example:
        >>> from jit_accel import JiTPipeline
        >>> pipe = JiTPipeline.from_pretrained("output/pipeline")  # or "owner/name" of the Hub
        >>> pipe(["bag", "coat"], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
        >>> pipe("bag", image=Image.open("coat.png"), strength=0.7).images[0].save("bag.png")
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' own class attribute)

    def __init__(
        self,
        transformer: JiTTransformer2DModel | ModelMixin,  # the latter is one whose code came with a folder
        scheduler: JiTScheduler | SchedulerMixin,
        class_names: list[str] | dict[str, str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: list[float] | tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        method: str | None = None,
        objective: dict | None = None,
        guidance_on: str | None = None,
        vectors: dict | None = None,
        value_range: list[float] | tuple[float, float] | None = None,
        time_shift: float | None = None,
    ):
        super().__init__()
        own = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "method": method}
        own |= {"guidance_on": guidance_on, "vectors": vectors, "value_range": value_range, "time_shift": time_shift}
        own |= {"num_inference_steps": num_inference_steps, "class_names": class_names, "objective": objective}
        before = getattr(transformer, "pipeline_settings", {})
        own = {name: before.get(name) if value is None else value for name, value in own.items()}
        names = checked_names(own.pop("class_names"), transformer.config.num_classes)
        vectors = checked_columns(own.pop("vectors"), transformer.config.get("vector_sizes") or ())
        objective = JiTScheduler(**(own.pop("objective") or {})).config
        own = {name: checked_default(name, value) for name, value in own.items()}
        self.register_to_config(objective=objective_of(objective), class_names=names, vectors=vectors, **own)
        self.register_modules(transformer=transformer, scheduler=scheduler)
        _ = self.components  # so that the network knows them
        self._interrupt, self._num_timesteps, self._guidance_scale = False, 0, own["guidance_scale"]

    def __setattr__(self, name: str, value) -> None:
        if name == "scheduler" and is_own(value):  # others do not know what the network predicts
            self.register_to_config(objective=objective_of(value.config))
        super().__setattr__(name, value)

    @property
    def components(self) -> dict:
        """Network and scheduler: the network takes the pipeline's settings along."""
        self.transformer.pipeline_settings = {name: self.config[name] for name in SETTINGS}
        return super().components

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Return the content of `model_index.json`, with this package's classes in place of the code of the folder."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        if "objective" not in config and args:  # an older folder, perhaps for another scheduler than its own
            file = Path(args[0]) / "scheduler" / "scheduler_config.json"
            stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            config["objective"] = objective_of(stated)
        for name, own in COMPONENTS.items():
            if config.get(name, (None, None))[1] == own.__name__:
                config[name] = [own.__module__, own.__name__]
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Bring a pipeline from the Hub into the cache, without the code it carries, and return its folder."""
        settings = {name: kwargs[name] for name in DOWNLOAD_SETTINGS if kwargs.get(name) is not None}
        patterns = [INDEX_FILE, *(f"{name}/*.{kind}" for name in COMPONENTS for kind in ("json", "safetensors"))]
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, **settings)

    def save_config(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Write `model_index.json`, last of all in `save_pretrained`, and the code with which diffusers reads it."""
        super().save_config(save_directory, *args, **kwargs)
        carry_code(Path(save_directory), type(self))

    @property
    def interrupt(self) -> bool:
        """True where the call in progress ends after the current step: a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """The ODE steps of the current or last call; a callback sees each under its number, from 0 on."""
        return self._num_timesteps

    def solver_name(self, method: str | None = None) -> str:
        """Return the method of a call: the one it asks for, else the pipeline's; another scheduler is its own."""
        if not is_own(self.scheduler):
            return method or type(self.scheduler).__name__
        return method or self.config.method or self.scheduler.config.solver

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: "Callable[[JiTPipeline, int, Tensor, dict], dict | None] | None" = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        condition_image: Picture | Sequence[Picture | None] | None = None,
        guidance_on: str | None = None,
        tile: Size | None = None,
        overlap: Size | None = None,
        vectors: Sequence[Row] | Row | Tensor = None,
        time_shift: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Return images of classes, or of conditions, made from noise or from images.

        Args:
            class_labels: a class number, its name (case does not matter), or None for "no class"; or a list, for some
                networks also of lists. Left out, "no class"; but of a network with one class that one.
            num_inference_steps, method, time_shift: n ODE steps (50), by "heun", which calls the network 2n - 1 times,
                or "euler", "ab2" or "etd2", n times; equal (1), or finer near the noise. None: the pipeline's own.
            guidance_scale, guidance_interval: weight of guidance where lo < t < hi, or t < hi if lo is 0; 1 is none.
            generator: one generator draws the images' noise one after the other, so the n-th image is the same at any
                batch size; or a list with one for each image. A CPU generator gives the same noise on every device.
            latents: (B, C, H, W), what the ODE starts from: noise, already scaled, instead of `generator`.
            output_type: "pil"; "pt" (B, C, H, W) in [0, 1]; "np" (B, H, W, C) so or in `value_range`; "latent", raw.
            callback_on_step_end: called as `(pipe, step, t, {"latents": z})` after each ODE step, with the t that the
                step began at; may return `{"latents": z}` to replace the state, or set `pipe._interrupt = True`.
            height, width: pixels, multiples of the patch size; None: those of `latents`, else the training size.
            num_images_per_label: images of each label, side by side.
            image: where to start from: PIL, array or tensor, uint8 or in [0, 1]; one, or one each; cut and resampled.
            strength: how much of the way from `image` is made anew, in (0, 1]: that share of the steps is run, from
                the image noised to t = 1 - strength. 1 ignores the image. None: 0.6.
            mask_image: white is repainted, black stays as in `image`.
            condition_image: what the network sees beside the noise, and a bridge starts from: as `image`, one for each
                label, or several for one label; None in a list is "no condition".
            guidance_on: what guidance leaves out to compare with: "label", "condition" or "both". None: the pipeline's.
            tile, overlap: pixels, or (height, width), of windows through which the network sees a large picture.
            vectors: an image's numbers in the units of the data, a list or {name: number or list}; or a list of these.

        Raises `ValueError` for what does not fit; the message says what would.
        """
        checked_output(output_type, self.transformer.config.in_channels)
        steps = self.config.num_inference_steps or STEPS if num_inference_steps is None else num_inference_steps
        steps = checked_count("num_inference_steps", steps)
        skipped = skipped_steps(steps, image, strength, mask_image)
        asked = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        shown = self._asked(class_labels, condition_image, vectors, num_images_per_label)
        self.guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        z = self.prepare_latents(len(shown[0]), generator, latents, height, width)
        given, z = self._given(*shown, z, latents is not None, image)
        field = self._field(given, guidance_interval, guidance_on, tile, overlap)
        scheduler = self._driver(generator, steps, time_shift, z.device, self.solver_name(method), skipped)
        z, keep_known = self._start(scheduler, z, image, mask_image)
        z = self._solve(scheduler, z, field, keep_known, callback_on_step_end, asked)
        images = output_of(z, output_type, self.config.value_range)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _asked(self, class_labels, condition_image, vectors, copies: int) -> tuple[list[int], list, list]:
        """Return the label of each image, its condition and its numbers ([] where the network knows none)."""
        ids, copies = self.label_ids(class_labels), checked_count("num_images_per_label", copies)
        channels = self.transformer.config.condition_channels
        pictures = condition_pictures(condition_image, channels, len(ids), self.config.value_range)
        rows = vectors_asked(vectors, self.config.vectors, max(len(ids), len(pictures)))
        return spread((ids, pictures, rows), copies)

    def _given(self, ids: list, pictures: list, rows: list, z: Tensor, is_start: bool, image) -> tuple[dict, Tensor]:
        """Return the network's arguments, of images like z, and where their paths start: at z, or of a bridge at the
        conditions, unless z `is_start`.
        """
        device, condition = self._execution_device, conditions_of(pictures, tuple(z.shape[-2:]))
        if self.config.objective.get("path") == "bridge":
            start = bridge_start(condition, self.transformer.config.in_channels, image)
            z = z if is_start else start
        given = {"class_labels": labels_tensor(ids, self.transformer.config.num_classes), **condition}
        given |= standardised_vectors(rows, self.config.vectors)
        return {name: tensor.to(device) for name, tensor in given.items()}, z.to(device)

    def _driver(self, generator: Generators, steps: int, time_shift: float | None, device, method: str, skipped: int):
        """Return what leads along the path in these steps."""
        scheduler = self.scheduler
        scheduler = scheduler if is_own(scheduler) else FlowMatchDriver(scheduler, self.config.objective, generator)
        time_shift = self.config.time_shift if time_shift is None else time_shift
        shifted = {} if time_shift == 1 else {"time_shift": time_shift}  # which older code of a folder does not know
        scheduler.set_timesteps(steps, device=device, method=method, skip_steps=skipped, **shifted)
        return scheduler

    def _solve(self, scheduler, z: Tensor, field: GuidedField, keep_known: Callable, callback, asked) -> Tensor:
        """Run the steps that the scheduler is set to, from z at their first t, along the network's output `field`."""
        self._interrupt, self._num_timesteps = False, scheduler.num_steps
        steps_done, start_t = 0, None
        forget_history = getattr(scheduler, "forget_history", lambda: None)  # older code of a folder has none
        with evaluating(self.transformer), self.progress_bar(total=scheduler.num_steps) as progress:
            for t_host, t in zip(scheduler.call_times, scheduler.timesteps):
                start_t = start_t if scheduler.mid_step else t
                if field.jumps_at(t_host):
                    forget_history()
                z = scheduler.step(field(z, t, t_host), t, z).prev_sample
                # also between the calls of a Heun step: the network never sees what is known off its path
                z = keep_known(z, scheduler.next_time)
                if scheduler.mid_step:
                    continue
                if callback is not None:
                    given = {"latents": z} if "latents" in asked else {}
                    state = (callback(self, steps_done, start_t, given) or {}).get("latents", z)
                    if state is not z:
                        forget_history()
                    z = state.float()
                steps_done += 1
                progress.update()
                if self._interrupt:
                    break
        return z

    def label_ids(self, class_labels: Label | Sequence[Label] | Tensor) -> list[int | list[int]]:
        """Return class numbers, names or None (or a list of them) as the network's labels."""
        config = self.transformer.config
        several = config.get("has_several_labels", False)
        return label_ids(class_labels, config.num_classes, self.config.class_names, several)

    def prepare_latents(
        self, batch: int, generator: Generators, latents: Tensor | None, height: int | None, width: int | None
    ) -> Tensor:
        """Return the start of the ODE (batch, C, H, W), float32: `latents`, or noise at the scheduler's scale."""
        config = self.transformer.config
        if latents is not None and not (isinstance(latents, Tensor) and latents.ndim == 4):
            kind = f"shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents of {kind}: give a tensor (B, {config.in_channels}, H, W)")
        natural = sides_of(config.img_size) if latents is None else latents.shape[-2:]
        given = zip(("height", "width"), (height, width), natural)
        size = tuple(own if side is None else checked_count(name, side) for name, side, own in given)
        shape = (config.in_channels, *size)
        if any(side < 1 or side % config.patch_size for side in size):
            raise ValueError(f"{size[0]} x {size[1]} pixels: both must be multiples of the patch, {config.patch_size}")
        if latents is not None:
            if latents.shape != (batch, *shape):
                raise ValueError(f"latents are {tuple(latents.shape)}, but these labels need {(batch, *shape)}")
            return latents.float()
        generators = checked_generators(generator, batch)
        device = self._execution_device
        draws = [torch.randn(shape, generator=g, device=g.device if g is not None else device) for g in generators]
        return torch.stack([draw.to(device) for draw in draws]) * self.config.objective["noise_scale"]

    def _start(self, scheduler, noise: Tensor, image, mask_image) -> tuple[Tensor, Callable[[Tensor, float], Tensor]]:
        """Return the state at the scheduler's first t, and a function that puts back what a mask keeps at any t."""
        if image is None:
            return noise, lambda z, t: z
        batch, size = len(noise), tuple(noise.shape[-2:])
        original = start_images(image, size, batch, noise.shape[1], self.config.value_range).to(noise.device)
        z = scheduler.add_noise(original, noise, torch.tensor([scheduler.next_time]))
        if mask_image is None:
            return z, lambda z, t: z
        repaint = repaint_mask(mask_image, size, batch).to(noise.device)
        return z, lambda z, t: torch.where(repaint, z, t * original + (1 - t) * noise)
