"""Measure a model: `python -m jit_accel.evaluate --model runs/mine --reference photos`, or `accelerate launch -m`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from jit_accel.config.command_line import exit_code_of, importing_torch, parse_flags
from jit_accel.evaluate.flag_values import words
from jit_accel.evaluate.settings import EvaluateConfig, check

if TYPE_CHECKING:
    from jit_accel.data.formats.source import Source
    from jit_accel.model.pipeline import JiTPipeline


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0 done, 2 wrong settings or data, 128 + signal."""

    def run() -> int:
        config = parse_flags(EvaluateConfig, argv, "python -m jit_accel.evaluate")
        check(config)
        with importing_torch():
            from jit_accel.evaluate.run import evaluate

        return evaluate(config)

    return exit_code_of(run)


def measure(
    pipe: JiTPipeline,
    reference: str | PathLike | Source,
    *,
    num_images: int = 5000,
    features: str = "inception",
    feature_weights: str | None = None,
    metrics: str | Sequence[str] = (),
    img_size: int | tuple[int, int] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    method: str | None = None,
    time_shift: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    max_features: int = 10_000,
    show_progress: bool = False,
) -> dict[str, float]:
    """Measure how far a pipeline's images are from real ones, in this process alone, as `jit_accel.evaluate` does.

    Args:
        pipe: makes image n of class n % classes from noise that follows from `seed` and n; on any device. Where it was
            trained with numbers, or several labels, and the reference has such, they are those of its images.
        reference: the real images: whatever `--data_path` of training may be, a data set that `open_images` opened, or
            an `.npz` of statistics (of `--make_reference`, ADM's, JiT's).
        num_images: of the pipeline, 2 or more; distances of few images are too large.
        features: the network to compare by: inception, or efficientnet_lite0, which needs no download.
        feature_weights: file of the network's weights (None: torch hub's cache, or a package).
        metrics: such as fid or, with any features, fd, kd, precision, recall, density, coverage; (): all there are.
        img_size: in pixels, or height and width (None: the model's).
        num_inference_steps, guidance_scale, guidance_interval, method, time_shift: None for the pipeline's own.
        max_features: most images of each side to compare one by one, for kd and those after it.

    Returns:
        The values by the metrics' names: {"fid": 12.3, "fid_low": 12.0, "fid_high": 12.6, ...}; the latter are the ends
        of a 95 % interval, for the noise of drawing so many images (20 or more).

    Raises:
        UserError: data or features cannot be had, or do not allow a metric asked for; or the pipeline wants conditions.

    Example:
        >>> found = measure(jit_accel.load("runs/flowers"), "photos", features="efficientnet_lite0", metrics="fd")
        >>> found["fd_efficientnet_lite0"]
    """
    from jit_accel.evaluate.evaluator import pixels_of, refuse_conditions
    from jit_accel.evaluate.run import OneProcess, build_evaluator
    from jit_accel.model.generation import SamplerSettings, checked_size

    config = EvaluateConfig(
        model="",
        reference=str(reference) if isinstance(reference, PathLike) else reference,
        features=features,
        feature_weights=feature_weights,
        metrics=tuple(words([metrics] if isinstance(metrics, str) else metrics)),
        num_images=num_images,
        img_size=img_size,
        seed=seed,
        batch_size=batch_size,
        max_features=max_features,
    )
    check(config)
    refuse_conditions(pipe)
    evaluator = build_evaluator(config, OneProcess(), pipe.device, show_progress)
    size = checked_size(pipe, img_size)
    real = evaluator.load_reference(config.reference, size, pixels=pixels_of(pipe), shown_to=pipe)
    evaluator.keep_measurable(real, num_images, are_wanted=bool(config.metrics))
    settings = SamplerSettings(num_inference_steps, guidance_scale, guidance_interval, method, time_shift)
    return evaluator.measure_pipeline(pipe, real, num_images, settings, seed, size)
