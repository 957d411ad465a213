"""Facts of a run, which complete its settings, the weights it starts from, and its lengths."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Start:
    """Trained weights to start from, as `--init_from` names them, and what they were trained with."""

    path: str
    network: Mapping[str, Any]  # its settings by name: `SIZES`, patch_size, img_size, num_classes
    noise_scale: float
    prediction: str
    guidance_scale: float | None = None  # of their samples


@dataclass(frozen=True)
class Facts:
    """Facts of a run that no setting states."""

    num_images: int
    num_classes: int | None = None  # None: only reading the data would show them
    is_labelled: bool = True  # else guidance towards the images' one class means nothing
    condition_channels: int = 0  # of what the data shows beside each image
    has_scores: bool = True  # the package that scores pairs is there
    has_vectors: bool = False  # the data has numbers beside each image
    value_range: tuple[float, float] | None = None  # of data that is not of 8 bits
    is_encoded: bool = True  # the images must be decoded
    processes: int = 1  # of the run, on all machines
    accumulation: int = 1  # and precision: what the accelerator was built with
    precision: str = "no"
    has_bf16: bool = False  # the device has units for products in bf16
    is_good_at_bf16: bool = False  # they are known to be faster there than those in float32
    lanes: int | None = None  # for a new run, where its data is a stream
    cores: int = 1  # of this process
    threads: int | None = None  # to which torch is limited on a CPU, if it is
    saved: Mapping[str, Any] = field(default_factory=dict)  # settings of the checkpoint that the run goes on from
    start: Start | None = None  # the weights to start from, where they are read


@dataclass(frozen=True)
class Plan:
    """The lengths of a run, in optimizer steps."""

    total_steps: int
    warmup_steps: int
    global_batch_size: int  # images of a step, over all processes and micro-steps
    num_images: int  # of one epoch
    refused_warmup_steps: int = 0  # a warm-up that was asked for and is longer than the run

    def epoch_of(self, step: int) -> float:
        """Return the passes over the data after `step` optimizer steps."""
        return step * self.global_batch_size / self.num_images
