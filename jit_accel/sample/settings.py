"""The settings of `jit_accel.sample`; imports no torch, so that `--help` answers at once."""

import math
from dataclasses import dataclass
from typing import Literal

from jit_accel.base.errors import UserError, check_ranges, within
from jit_accel.config.groups import MOST_IMAGES, MOST_PIXELS, MOST_STEPS
from jit_accel.config.run_groups import Method

DEFAULT_NUM_IMAGES = 64


@dataclass(frozen=True)
class SampleConfig:
    """Generate images with a trained model: the n-th image follows from the seed and n alone."""

    model: str | None = None
    """A pipeline folder, the output folder of a run, a checkpoint, or owner/name of the Hub (required)."""
    ema: str | None = None
    """Averaged weights of a checkpoint, by their decay; "model": the weights themselves; or width_0.05, one of this
    relative width, made of what --average_snapshots of the training stored (default: the first)."""
    guide: str | None = None
    """A worse model of the same data, smaller or from earlier in a training, as --model: guidance leads away from it
    (default: none, guidance leads away from images of no class)."""
    output_dir: str = "samples"
    """New folder for the images."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes, or none for images of no class (default: all classes); cat+wet for images with
    several, of a model that was trained with such."""
    vectors: tuple[str, ...] = ()
    """Numbers to give to a model that was trained with some, in the units of its data: age=34 pose=0.2,-0.1, or a .csv,
    .tsv or .jsonl file with a row for each image, which come round again (default: none)."""
    condition_path: str | None = None
    """Pictures to show to a model that was trained with conditions, as data_path of a training: a folder, ... (default:
    none). One image is made of each, of no class unless classes are named; of larger counts they come round again."""
    images_per_class: int | None = None
    """Images of each class (default: those of num_images)."""
    num_images: int | None = None
    """Or images in total, evenly spread over the classes (default: 64)."""
    seed: int = 0
    """Seed of the noise that the images start from."""
    batch_size: int | None = None
    """Images at once in each process (default: 64; on a CPU 16)."""
    num_inference_steps: int | None = None
    """Steps of the ODE (default: the pipeline's, 50). Heun calls the network 2n - 1 times, the others n times."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance; 1: none, at half the cost (default: the pipeline's)."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance acts at times LO < t < HI (default: the pipeline's, 0.1 1)."""
    method: Method | None = None
    """Solver of the ODE (default: the pipeline's, heun)."""
    time_shift: float | None = None
    """1: steps of equal length; above it they are shorter near the noise, where large images are decided (default: the
    pipeline's, 1)."""
    img_size: int | tuple[int, int] | None = None
    """Side of the images in pixels, or their height and width (default: as trained)."""
    height: int | None = None
    """Instead of img_size, for images that are not square (default: img_size)."""
    width: int | None = None
    """Instead of img_size, for images that are not square (default: img_size)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the network; the ODE is float32 always (default: accelerate's, else what is faster here)."""
    compile: bool = False
    """Compile the network's blocks: faster after a slower start."""
    format: Literal["png", "webp", "npz", "npy"] | None = None
    """png, webp (lossless): a file for each image, in class folders that --data_path reads. npz: one file
    samples.npz with arr_0, uint8 (N, H, W, 3), and arr_1, the labels, as ADM's evaluator reads it. npy: arrays
    (H, W, C), in the units of the data (default: png; npy where the images are neither grey nor colour)."""
    resume: bool = False
    """Go on in output_dir: make what is missing or broken there; with larger counts more images, but for a finished
    .npz."""
    grid: bool = False
    """Also draw grid.png: a named row for each class."""
    trajectory: bool = False
    """Also draw trajectory.png: a few images from noise to image, the state z and the image x it heads for."""
    animation: Literal["gif", "webp"] | None = None
    """Also make an animation of the denoising of a grid (default: none)."""


RANGES = [
    *within(1, MOST_IMAGES, "images_per_class", "num_images", "batch_size"),
    *within(1, MOST_PIXELS, "img_size", "height", "width"),
    *within(1, MOST_STEPS, "num_inference_steps"),
    ("seed", lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1"),
    ("guidance_scale", lambda v: 0 <= v < math.inf, "at least 0; 1 is no guidance"),
    ("time_shift", lambda v: 0 < v < math.inf, "a positive number, such as 1.5"),
    ("guidance_interval", lambda v: 0 <= v[0] <= v[1] <= 1, "LO HI with 0 <= LO <= HI <= 1, such as 0.1 1"),
]
EITHER = [("images_per_class", "num_images"), ("img_size", "height"), ("img_size", "width")]


def check(config: SampleConfig) -> None:
    """Raise `UserError` for settings that are missing, out of range, or contradict each other."""
    if not config.model:
        raise UserError("not given; name a pipeline folder, the output folder of a run, or a Hub id.", about="model")
    if not config.output_dir:
        raise UserError("is empty; name a folder.", about="output_dir")
    given = vars(config)
    check_ranges(given, RANGES)
    for flag, other in EITHER:
        if given[flag] is not None and given[other] is not None:
            raise UserError(f"contradicts --{other} {given[other]}: give one.", about=flag, value=given[flag])
