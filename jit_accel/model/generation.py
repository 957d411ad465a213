"""Images by number: the n-th of a seed is the same whatever the batch, the process or what else is made."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from jit_accel.base import rng
from jit_accel.base.errors import UserError, shown
from jit_accel.config.presets import Size, plain_size, sizes_near
from jit_accel.model.pipeline import STEPS, JiTPipeline
from jit_accel.model.scheduler import is_own
from jit_accel.model.solvers import SOLVERS

# Matrix kernels of CPUs round the last rows of other batches differently. With torch 2.13 on AMD EPYC sizes of 4, 8, 12
# agree in every bit; others differ in the last one, which changes a few of 100,000 values of the pictures by 1.
CPU_BATCH_MULTIPLE = 4


@dataclass(frozen=True)
class SamplerSettings:
    """The settings with which images are drawn; None is the pipeline's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    method: str | None = None
    time_shift: float | None = None

    def completed(self, pipeline: JiTPipeline) -> "SamplerSettings":
        """Return them with the pipeline's own in place of None. UserError for a method that its scheduler has not."""
        method = pipeline.solver_name(self.method)
        if (method in SOLVERS) != is_own(pipeline.scheduler):
            rule = f"the model's scheduler is {pipeline.solver_name()}: leave it out."
            raise UserError(rule, about="method", value=method)
        if self.time_shift not in (None, 1) and not is_own(pipeline.scheduler):
            rule = f"the steps are those of the model's scheduler, {pipeline.solver_name()}: leave it out."
            raise UserError(rule, about="time_shift", value=f"{self.time_shift:g}")
        found = {name: pipeline.config.get(name) if value is None else value for name, value in asdict(self).items()}
        return SamplerSettings(
            found["num_inference_steps"] or STEPS,
            float(found["guidance_scale"]),
            tuple(map(float, found["guidance_interval"])),
            method,
            float(found["time_shift"] or 1),  # older code of a folder knows none
        )

    def asked(self) -> dict:
        """Return them as arguments of a pipeline's call; equal steps are not named, which older code knows alone."""
        return {name: value for name, value in asdict(self).items() if name != "time_shift" or value not in (None, 1)}


def checked_size(pipeline: JiTPipeline, size: Size | None, about: str = "img_size") -> int | tuple[int, int]:
    """Return the size in pixels of images to make, None being as trained; UserError if it has no whole patches."""
    patch, size = pipeline.transformer.config.patch_size, plain_size(size or pipeline.transformer.config.img_size)
    if near := sizes_near(size, patch):
        raise UserError(f"must be a multiple of the patch size, {patch}: use {near}.", about=about, value=shown(size))
    return size


def number_of(label: int, index: int, num_classes: int) -> int:
    """Return the number of the `index`-th image of a class: numbers go round the classes, label = number % classes."""
    return index * num_classes + label


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Return a generator for each image, on the CPU, which gives the same noise on every device."""
    return [torch.Generator().manual_seed(key >> 1) for key in rng.hash64(seed, "sample", numbers).tolist()]


def share_of(numbers: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """Return this process's numbers: every `world_size`-th, so that shares differ by one at most."""
    return numbers[rank::world_size]


def generate(
    pipeline: JiTPipeline,
    numbers: Sequence[int],
    *,
    seed: int = 0,
    labels: Sequence[int | str | None] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    method: str | None = None,
    time_shift: float | None = None,
    batch_size: int = 64,
    on_step: Callable | None = None,
    conditions: Tensor | None = None,
    vectors: Sequence | None = None,
) -> Tensor:
    """Return images by number, uint8 (len(numbers), 3, H, W) on the pipeline's device.

    The n-th image of a seed is the same alone and among others, and the one that `python -m jit_accel.sample` makes.

    Args:
        pipeline: what `jit_accel.load` returns; move it to a GPU with `.to("cuda")`.
        numbers: which images. Number n shows class n % num_classes, or no class where the network knows none.
        seed: of the noise that the images start from.
        labels: the class of each image by number or name instead; None among them is "no class".
        num_inference_steps, guidance_scale, guidance_interval, method, time_shift: as in a call of the pipeline; None:
            its own.
        batch_size: images at once; it changes memory and speed, not the images.
        on_step: the pipeline's `callback_on_step_end`.
        conditions: that of each image, (len(numbers), C, H, W) in [0, 1], where the network was trained with such.
        vectors: the numbers of each image, as in a call of the pipeline; left out, no image has any.

    Raises `ValueError`: no numbers, a label that the network does not know, or a setting that makes no sense.

    Example:
        >>> images = generate(pipe, range(100), seed=0, guidance_scale=2.5)
    """
    if len(numbers) == 0:
        raise ValueError("numbers is empty: give the numbers of the images to make, such as range(8)")
    settings = SamplerSettings(num_inference_steps, guidance_scale, guidance_interval, method, time_shift)
    how = {"labels": labels, "settings": settings, "batch_size": batch_size, "on_step": on_step}
    how |= {"conditions": conditions, "vectors": vectors}
    parts = generate_batches(pipeline, numbers, seed=seed, **how)
    return torch.cat([images for _, images in parts])


def generate_batches(
    pipeline: JiTPipeline,
    numbers: Sequence[int],
    *,
    seed: int = 0,
    labels: Sequence[int | str | None] | None = None,
    settings: SamplerSettings = SamplerSettings(),
    batch_size: int = 64,
    height: int | None = None,
    width: int | None = None,
    batch_multiple: int | None = None,
    on_step: Callable | None = None,
    conditions: Tensor | None = None,
    vectors: Sequence | None = None,
    as_bytes: bool = True,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield (numbers, images uint8 (B, 3, H, W) on the pipeline's device), `batch_size` of them at a time.

    Args:
        batch_multiple: batches are filled up to a multiple of this, by images that are thrown away. None: 4 on a CPU,
            where images are then the same in every bit at any batch size, else 1.
        on_step: the pipeline's `callback_on_step_end`.
        conditions: that of each image, (len(numbers), C, H, W) in [0, 1].
        vectors: the numbers of each image, in the units of the data; left out, no image has any.
        as_bytes: False for images of float32 in [0, 1].
    """
    num_classes = pipeline.transformer.config.num_classes
    if labels is None:
        labels = [number % num_classes if num_classes else None for number in numbers]
    if vectors is None and pipeline.config.get("vectors"):  # carried code may know none
        vectors = [None] * len(numbers)
    if batch_multiple is None:
        batch_multiple = CPU_BATCH_MULTIPLE if pipeline.transformer.device.type == "cpu" else 1
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        filled = [*range(start, start + len(part)), *[start] * (-len(part) % batch_multiple)]
        images = pipeline(
            [labels[i] for i in filled],
            **settings.asked(),
            generator=generators(seed, [numbers[i] for i in filled]),
            height=height,
            width=width,
            output_type="pt",
            callback_on_step_end=on_step,
            **({} if conditions is None else {"condition_image": conditions[filled]}),  # carried code may know none
            **({} if vectors is None else {"vectors": [vectors[i] for i in filled]}),
        ).images[: len(part)]
        yield part, (images * 255).round().to(torch.uint8) if as_bytes else images
