"""Sheets of samples: a few classes, fixed noise, made by all processes together."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from jit_accel.base.console import warn
from jit_accel.base.files import atomic_file
from jit_accel.base.image_rows import draw_rows
from jit_accel.base.sharding import reshard
from jit_accel.model.generation import generate
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.train.averages import Ema

SAMPLES_PER_CLASS = 8
MAX_CLASSES = 10


@dataclass
class SampleSheets:
    """Draws what a run's averaged weights make of a few classes, always from the same noise."""

    pipeline: JiTPipeline  # around the network without its wrapper
    averages: Ema  # of its weights
    accelerator: Accelerator
    _: KW_ONLY
    seed: int  # of the noise
    num_inference_steps: int
    batch_size: int  # images that a process makes at once, at least one class

    def __post_init__(self):
        num_classes = self.pipeline.transformer.config.num_classes
        count = min(num_classes, MAX_CLASSES)
        self.classes = [i * num_classes // count for i in range(count)]
        self.row_names = [self.pipeline.config.class_names[label] for label in self.classes]

    def caption(self, step: int) -> str:
        """Return a sheet in words."""
        return (
            f"step {step:,}, EMA {self.averages.name}, guidance {self.pipeline.config.guidance_scale:g}, "
            f"{self.num_inference_steps} Heun steps; rows: {', '.join(self.row_names)}"
        )

    def draw(self, path: Path) -> None:
        """Make a sheet, all processes together, and write it as a PNG on the main one; a full disk is warned of."""
        with self.averages.applied():
            images = self._sample()
            reshard(self.pipeline.transformer)  # the gathered weights are the average's
        if not self.accelerator.is_main_process:
            return
        pixels = images.permute(0, 2, 3, 1).unflatten(0, (-1, SAMPLES_PER_CLASS)).numpy()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, durable=False) as temporary:
                draw_rows(list(zip(self.row_names, pixels))).save(temporary, format="PNG")
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror or error}): make room.")

    def _sample(self) -> Tensor:
        """Return images uint8 (classes * 8, 3, H, W) on the CPU, class after class, on every process."""
        accelerator = self.accelerator
        labels = [label for label in self.classes for _ in range(SAMPLES_PER_CLASS)]
        share = -(-len(labels) // accelerator.num_processes)  # padded: every process makes equally many
        mine = [(accelerator.process_index * share + i) % len(labels) for i in range(share)]
        images = generate(
            self.pipeline,
            mine,
            seed=self.seed,
            labels=[labels[i] for i in mine],
            num_inference_steps=self.num_inference_steps,
            batch_size=max(self.batch_size, SAMPLES_PER_CLASS),
        )
        return accelerator.gather(images.to(accelerator.device))[: len(labels)].cpu()
