"""`JiTPipeline`: class labels or names in, images out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from jit_accel.errors import nearest
from jit_accel.model import JiTTransformer2DModel
from jit_accel.scheduler import JiTScheduler

Label = int | str | None
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


class JiTPipeline(DiffusionPipeline):
    """Generate images of given classes with a JiT.

    Args:
        transformer, scheduler: the network and its ODE.
        class_names: the name of each class, so that calls may use names.
        guidance_scale, guidance_interval: what a call uses that does not say otherwise. They are kept in
            `model_index.json` with the class names.

    Example:
        pipe = JiTPipeline.from_pretrained("output/pipeline")
        pipe(["bag", "coat"], guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' own class attribute)

    def __init__(
        self,
        transformer: JiTTransformer2DModel,
        scheduler: JiTScheduler,
        class_names: list[str] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: list[float] | tuple[float, float] = (0.1, 1.0),
    ):
        super().__init__()
        num_classes = transformer.config.num_classes
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names, but the network has {num_classes} classes: "
                "give one name for each, in the order of the labels"
            )
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(
            class_names=None if class_names is None else [str(name) for name in class_names],
            guidance_scale=float(guidance_scale),
            guidance_interval=[float(end) for end in guidance_interval],
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        method: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[JiTPipeline, int, Tensor, dict], dict | None] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each label.

        Args:
            class_labels: a class number, its name (case does not matter), or None for "no class"; or a list.
            num_inference_steps: ODE steps. Heun calls the network 2n - 1 times, Euler n times.
            guidance_scale: classifier-free guidance weight inside the interval; 1 is no guidance and costs half.
                None: the pipeline's own.
            guidance_interval: guidance acts where lo < t < hi, or t < hi if lo is 0. None: the pipeline's own.
            method: "heun" or "euler"; None: the scheduler's, which is "heun" unless configured otherwise.
            generator: one generator draws the images' noise one after the other, so the n-th image is the same
                at any batch size, and two calls of 4 continue each other like one of 8. A list has one
                generator an image. A CPU generator gives the same noise on every device.
            latents: (B, 3, H, W), the start of the ODE, already scaled, instead of `generator`.
            output_type: "pil"; "pt" (B, 3, H, W) or "np" (B, H, W, 3) in [0, 1];
                "latent", the state at t = 1, unclamped.
            callback_on_step_end: called as `(pipe, step, t, {"latents": z})` after each ODE step; may return
                `{"latents": z}` to replace the state.
            height, width: pixels, multiples of the patch size; None: the training size.

        Raises:
            ValueError: a label, size, generator or setting that does not fit; the message says what would.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}: choose from {', '.join(OUTPUT_TYPES)}")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        device = self._execution_device
        labels = torch.tensor(self.label_ids(class_labels), dtype=torch.long, device=device)
        z = self.prepare_latents(len(labels), generator, latents, height, width).to(device)

        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device, method=method)
        steps_done = 0
        with evaluating(self.transformer), self.progress_bar(total=num_inference_steps) as progress:
            for t_host, t in zip(scheduler.call_times, scheduler.timesteps):
                weight = guidance_weight(t_host, scale, interval)
                z = scheduler.step(self.predict(z, t, labels, weight), t, z).prev_sample
                if scheduler.mid_step:
                    continue
                if callback_on_step_end is not None:
                    z = (callback_on_step_end(self, steps_done, t, {"latents": z}) or {}).get("latents", z)
                steps_done += 1
                progress.update()

        self.maybe_free_model_hooks()
        images = self.to_output(z, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def predict(self, z: Tensor, t: Tensor, labels: Tensor, weight: float) -> Tensor:
        """The network's output under guidance, float32; one call, of the double batch where the weight is not 1."""
        if weight == 1:
            return self.transformer(z, t, labels, return_dict=False)[0].float()
        no_class = torch.full_like(labels, self.transformer.config.num_classes)
        both = self.transformer(torch.cat([z, z]), t, torch.cat([labels, no_class]), return_dict=False)[0]
        conditional, unconditional = both.float().chunk(2)
        # v is affine in the prediction of x, e or v at a given z and t, so mixing outputs is mixing velocities.
        return torch.lerp(unconditional, conditional, weight)

    def label_ids(self, class_labels: Label | Sequence[Label] | Tensor) -> list[int]:
        """Class numbers, names or None (or a list of them) as the network's labels."""
        if isinstance(class_labels, Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if class_labels is None or isinstance(class_labels, int | str | np.integer):
            class_labels = [class_labels]
        if len(class_labels) == 0:
            raise ValueError("class_labels is empty: give a class for each image, such as [0, 1]")
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: Label) -> int:
        num_classes = self.transformer.config.num_classes
        if label is None:
            return num_classes
        if isinstance(label, str):
            names = self.config.class_names
            if names is None:
                raise ValueError(f"class {label!r}: this pipeline has no class names; use 0 to {num_classes - 1}")
            by_name = {name.lower(): i for i, name in reversed(list(enumerate(names)))}
            if label.lower() not in by_name:
                shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
                raise ValueError(f"class {label!r} is not among {shown}.{nearest(label, names)}")
            return by_name[label.lower()]
        if not 0 <= label < num_classes:
            raise ValueError(
                f"class {label}: the network knows {num_classes} classes; use 0 to {num_classes - 1}, "
                "or None for an image of no class"
            )
        return int(label)

    def prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        height: int | None,
        width: int | None,
    ) -> Tensor:
        """The start of the ODE (batch, 3, H, W), float32: `latents`, or noise at the scheduler's scale."""
        config = self.transformer.config
        if latents is not None:
            size = (height or latents.shape[-2], width or latents.shape[-1])
        else:
            size = (height or config.img_size, width or config.img_size)
        shape = (config.in_channels, *size)
        if any(side % config.patch_size for side in size):
            raise ValueError(f"{size[0]} x {size[1]} pixels: both must be multiples of the patch, {config.patch_size}")
        if latents is not None:
            if latents.shape != (batch, *shape):
                raise ValueError(f"latents are {tuple(latents.shape)}, but these labels need {(batch, *shape)}")
            return latents.float()
        if isinstance(generator, int):
            raise ValueError(f"generator {generator}: give torch.Generator().manual_seed({generator})")
        generators = generator if isinstance(generator, list | tuple) else [generator] * batch
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} images: give one, or one for each image")
        device = self._execution_device
        draws = [torch.randn(shape, generator=g, device=g.device if g is not None else device) for g in generators]
        return torch.stack([draw.to(device) for draw in draws]) * self.scheduler.init_noise_sigma

    def to_output(self, z: Tensor, output_type: str):
        if output_type == "latent":
            return z
        images = (z / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)


def guidance_weight(t: float, guidance_scale: float, interval: Sequence[float]) -> float:
    """`guidance_scale` where lo < t < hi (or lo = 0 and t < hi), else 1 (SPEC section 5).

    Raises:
        ValueError: lo is above hi.
    """
    # t is on a float32 grid: 0.1 there is above 0.1 in float64.
    low, high = (float(np.float32(end)) for end in interval)
    if low > high:
        raise ValueError(
            f"guidance_interval {tuple(interval)} must be (low, high) with low <= high, such as (0.1, 1.0)"
        )
    return guidance_scale if t < high and (low == 0 or t > low) else 1.0


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off, and back to what it was: a trainer samples from the network that it trains."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
