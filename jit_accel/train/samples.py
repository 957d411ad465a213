"""Sheets of samples: a few classes, fixed noise, made by all processes together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from jit_accel.base.console import warn
from jit_accel.base.files import atomic_file
from jit_accel.base.sharding import reshard
from jit_accel.base.sheets import draw_rows
from jit_accel.config.settings import Config
from jit_accel.model.generation import SamplerSettings, generate_batches
from jit_accel.model.loading import build_pipeline
from jit_accel.model.pipeline import JiTPipeline

SAMPLES_PER_CLASS = 8
MAX_CLASSES = 10


class SampleSheets:
    """Draws what a run's averaged weights make of a few classes, always from the same noise.

    Args:
        network: the model without its wrapper; `ema` averages it.
        config: resolved settings.
        class_names: of the first classes; the others are numbered.
    """

    def __init__(self, network, ema, accelerator, config: Config, class_names):
        self.network, self.ema, self.accelerator, self.config = network, ema, accelerator, config
        num_classes = config.model.num_classes
        self.class_names = [*class_names, *map(str, range(len(class_names), num_classes))]
        count = min(num_classes, MAX_CLASSES)
        self.classes = [i * num_classes // count for i in range(count)]

    def pipeline(self) -> JiTPipeline:
        """The diffusers pipeline around the network as it is now."""
        return build_pipeline(self.network, self.config, self.class_names)

    def caption(self, step: int) -> str:
        """A sheet in words."""
        sample, decay = self.config.sample, self.config.optim.ema_decays[0]
        rows = ", ".join(self.class_names[label] for label in self.classes)
        return (
            f"step {step:,}, EMA {decay}, guidance {sample.guidance_scale:g}, "
            f"{sample.num_inference_steps} Heun steps; rows: {rows}"
        )

    def draw(self, path: Path) -> None:
        """Make a sheet, all processes together, and write it as a PNG on the main one."""
        with self.ema.applied(self.config.optim.ema_decays[0]):
            images = self._sample()
            reshard(self.network)  # the gathered weights are the average's
        if self.accelerator.is_main_process:
            save_sheet(images, [self.class_names[label] for label in self.classes], path)

    def _sample(self) -> Tensor:
        """Images uint8 (classes * 8, 3, H, W) on the CPU, class after class, on every process."""
        config, accelerator, seed = self.config, self.accelerator, self.config.run.seed
        labels = [label for label in self.classes for _ in range(SAMPLES_PER_CLASS)]
        share = -(-len(labels) // accelerator.num_processes)  # padded: every process makes equally many
        mine = [(accelerator.process_index * share + i) % len(labels) for i in range(share)]
        size = max(config.optim.batch_size, SAMPLES_PER_CLASS)
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        images = generate_batches(
            pipeline,
            mine,
            seed=seed,
            labels=[labels[i] for i in mine],
            settings=SamplerSettings(config.sample.num_inference_steps),
            batch_size=size,
        )
        pixels = torch.cat([part for _, part in images]).to(accelerator.device)
        return accelerator.gather(pixels)[: len(labels)].cpu()


def save_sheet(images: Tensor, row_names: list[str], path: Path) -> None:
    """Write images (rows * n, 3, H, W), uint8, as a PNG with a named row for each class; a full disk is warned of."""
    columns = len(images) // len(row_names)
    pixels = images.permute(0, 2, 3, 1).numpy()
    sheet = draw_rows([(name, pixels[i * columns : (i + 1) * columns]) for i, name in enumerate(row_names)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror or error}): make room.")
