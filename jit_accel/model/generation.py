"""Images by number: the n-th of a seed is the same whatever the batch, the process or what else is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jit_accel.base import rng
from jit_accel.model.pipeline import JiTPipeline

# Matrix kernels of CPUs round the last rows of other batches differently. With torch 2.13 on AMD EPYC sizes of 4, 8, 12
# agree in every bit; others differ in the last one, which changes a few of 100,000 values of the pictures by 1.
CPU_BATCH_MULTIPLE = 4


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn; None is the pipeline's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    method: str | None = None


def number_of(label: int, index: int, num_classes: int) -> int:
    """The number of the `index`-th image of a class: numbers go round the classes, and label = number % classes."""
    return index * num_classes + label


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """One on the CPU for each image, which gives the same noise on every device."""
    return [torch.Generator().manual_seed(key >> 1) for key in rng.hash64(seed, "sample", numbers).tolist()]


def share_of(numbers: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """This process's numbers: every `world_size`-th, so that shares differ by one at most."""
    return numbers[rank::world_size]


def generate(
    pipeline: JiTPipeline,
    numbers: Sequence[int],
    *,
    seed: int = 0,
    labels: Sequence[int | None] | None = None,
    settings: SamplerSettings = SamplerSettings(),
    batch_size: int = 64,
    height: int | None = None,
    width: int | None = None,
    batch_multiple: int | None = None,
    on_step: Callable | None = None,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield (numbers, images uint8 (B, 3, H, W) on the pipeline's device) in batches.

    Args:
        labels: of each number; None: number % classes, and without classes none. A label of None is no class.
        batch_multiple: batches are filled up to a multiple of this, by images that are thrown away. None: 4 on a CPU,
            where images are then the same in every bit at any batch size, else 1.
        on_step: the pipeline's `callback_on_step_end`.
    """
    num_classes = pipeline.transformer.config.num_classes
    if labels is None:
        labels = [number % num_classes if num_classes else None for number in numbers]
    if batch_multiple is None:
        batch_multiple = CPU_BATCH_MULTIPLE if pipeline.transformer.device.type == "cpu" else 1
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        filled = [*range(start, start + len(part)), *[start] * (-len(part) % batch_multiple)]
        images = pipeline(
            [labels[i] for i in filled],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            method=settings.method,
            generator=generators(seed, [numbers[i] for i in filled]),
            height=height,
            width=width,
            output_type="pt",
            callback_on_step_end=on_step,
        ).images[: len(part)]
        yield part, (images * 255).round().to(torch.uint8)
