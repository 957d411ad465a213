"""`jit_accel.evaluate`: from settings to a table, and a record in a JSON file."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers.utils import logging as diffusers_logging

from jit_accel.base.console import say, warn
from jit_accel.base.devices import chosen_precision
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_all, on_main, process_group
from jit_accel.evaluate.evaluator import Evaluator, side_of, unmeasurable
from jit_accel.evaluate.features import MAIN, load_features
from jit_accel.evaluate.images import ImageSet, open_image_set
from jit_accel.evaluate.names import chosen_metrics
from jit_accel.evaluate.place import weights_of
from jit_accel.evaluate.records import FILE, add_records, read_records, record_file, table_of
from jit_accel.evaluate.reference import Reference, save_reference
from jit_accel.evaluate.settings import EvaluateConfig, axes_of
from jit_accel.evaluate.sweep import Measured
from jit_accel.evaluate.sweep_run import Opened, emas_of, record_of, run_sweep, sampler, settings_of
from jit_accel.evaluate.winner import show_on_card
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.loading import load_pipeline
from jit_accel.model.pipeline import JiTPipeline

UNBALANCED = 0.1  # of a reference: which share of its images would have to be of other classes


@dataclass(frozen=True)
class Subject:
    """What is measured: a pipeline, or images; neither where only a reference is made."""

    pipeline: JiTPipeline | None = None
    images: ImageSet | None = None
    img_size: int | None = None


def evaluate(config: EvaluateConfig) -> int:
    """Measure as the settings say. Returns the exit code.

    Raises:
        UserError: on all processes, whatever is wrong with settings, model, data or installation.
    """
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("jit_accel").setLevel(logging.ERROR)
    accelerator = build_accelerator(config)
    with process_group(accelerator):
        evaluator = build_evaluator(config, accelerator)
        file = record_file(config)
        on_main(accelerator, lambda: read_records(file))  # a file that nothing can be added to is found at once
        axes, weights, emas = axes_of(config), "", [None]
        if config.model:
            weights = on_main(accelerator, lambda: weights_of(config.model, wants_average=bool(axes.emas)))
            emas = on_all(accelerator, lambda: emas_of(config.model, weights, axes))
        opened = partial(open_model, replace(config, model=weights), accelerator)
        subject = on_all(accelerator, lambda: open_subject(config, opened, emas[0]), in_turn=True)
        reference = evaluator.load_reference(config.reference, subject.img_size or config.img_size)
        if accelerator.is_main_process:
            introduce(config, evaluator, subject, reference)
        if config.make_reference:
            path = Path(config.make_reference).expanduser()
            on_main(accelerator, lambda: save_reference(path, reference, evaluator.network.weights_id))
        if subject.pipeline is None and subject.images is None:
            return 0
        evaluator.metrics = measurable(config, evaluator, subject, reference)
        if axes.is_sweep:
            about = about_model(config, evaluator, subject, reference)
            del subject
            run_sweep(config, weights, evaluator, opened, reference, about, file)
            return 0
        records = measure(config, evaluator, subject, reference, emas)
        if accelerator.is_main_process:
            say(table_of(records))
        on_main(accelerator, lambda: keep(config, weights, records, file))
        return 0


def build_accelerator(config: EvaluateConfig) -> Accelerator:
    """The processes of this evaluation; formulas take minutes on the main one while the others wait."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    return Accelerator(mixed_precision=chosen_precision(config.mixed_precision), kwargs_handlers=[patience])


def build_evaluator(config: EvaluateConfig, accelerator: Accelerator) -> Evaluator:
    """The feature network, loaded on all processes; of one machine one looks for the weights first."""

    def load():
        return load_features(config.features, accelerator.device, config.feature_weights)

    return Evaluator(
        on_all(accelerator, load, in_turn=True),
        accelerator,
        chosen_metrics(config.features, config.metrics),
        batch_size=config.batch_size,
        max_features=config.max_features,
        show_progress=True,
    )


def open_subject(config: EvaluateConfig, open_pipeline: Opened, ema: str | None) -> Subject:
    """The model, with these averaged weights, or the images to measure."""
    if config.model is not None:
        pipeline = open_pipeline(ema)
        network = pipeline.transformer.config
        side = config.img_size or network.img_size
        if side % network.patch_size:
            raise UserError(
                f"must be a multiple of the model's patch size {network.patch_size}.", about="img_size", value=side
            )
        return Subject(pipeline, None, side)
    if config.images is not None:
        images = open_image_set(config.images, "images")
        return Subject(None, images, side_of(images, config.img_size, "images"))
    return Subject()


def open_model(config: EvaluateConfig, accelerator: Accelerator, ema: str | None) -> JiTPipeline:
    """The pipeline with these averaged weights (None: its own), on the device."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    pipeline = load_pipeline(config.model, ema).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    if config.compile:
        pipeline.transformer.compile_repeated_blocks()
    return pipeline


def introduce(config: EvaluateConfig, evaluator: Evaluator, subject: Subject, reference: Reference) -> None:
    """Say what is compared, and what of it is doubtful."""
    network, count = evaluator.network, config.num_images
    if subject.images is not None:
        count = subject.images.num_images
    real = "?" if reference.num_images is None else f"{reference.num_images:,}"
    size = f", {reference.img_size} px" if reference.img_size else ""
    say(f"Reference: {reference.name}, {real} images{size}; features {network.name}, {network.sizes[MAIN]} numbers")
    counts = [("--reference", reference.num_images)]
    counts += [("--num_images" if subject.pipeline else "--images", count)] * (subject != Subject())
    for flag, number in counts:
        if number is not None and number <= network.sizes[MAIN]:
            warn(
                f"{flag}: {number:,} images do not determine a covariance of {network.sizes[MAIN]:,} features, and a "
                "Fréchet distance of few images is too large: compare only with others of as many images."
            )
    if reference.img_size and subject.img_size and reference.img_size != subject.img_size:
        warn(
            f"--reference {reference.name}: of images of {reference.img_size} px, but those measured have "
            f"{subject.img_size} px: make a reference of that size (--img_size {subject.img_size})."
        )
    if subject.pipeline is not None and (share := imbalance(reference.label_counts)) > UNBALANCED:
        warn(
            f"--reference {reference.name}: its classes differ in size, the model's images do not; for equal classes "
            f"{share:.0%} of its images would have to be others, and that is part of the distance."
        )


def imbalance(label_counts: tuple[int, ...]) -> float:
    """The share of images that would have to change their class for all classes to have as many; 0 if not known."""
    total, classes = sum(label_counts), len(label_counts)
    if not total:
        return 0.0
    return sum(max(0, count / total - 1 / classes) for count in label_counts)


def measurable(config: EvaluateConfig, evaluator: Evaluator, subject: Subject, reference: Reference) -> tuple[str, ...]:
    """The metrics to measure: those asked for, or all that can be.

    Raises:
        UserError: one was asked for that cannot.
    """
    num_images = subject.images.num_images if subject.images else config.num_images
    missing = unmeasurable(evaluator.metrics, reference, num_images)
    if missing and config.metrics:
        name, reason = next(iter(missing.items()))
        raise UserError(f"{reason}.", about="metrics", value=name)
    for reason in dict.fromkeys(missing.values()) if evaluator.accelerator.is_main_process else ():
        warn(f"without {', '.join(name for name in missing if missing[name] == reason)}: {reason}.")
    return tuple(name for name in evaluator.metrics if name not in missing)


def measure(
    config: EvaluateConfig, evaluator: Evaluator, subject: Subject, reference: Reference, emas: list[str | None]
) -> list[dict]:
    """One record of a model with guidance, one without, or one of images."""
    if subject.images is not None:
        statistics = evaluator.statistics_of_images(subject.images, subject.img_size)
        found = evaluator.compare(statistics, reference)
        of_images = {"images": config.images, "num_images": statistics.num_images}
        return [{**of_images, **about_all(config, evaluator, subject, reference), "metrics": found}]
    about, records = about_model(config, evaluator, subject, reference), []
    settings = settings_of(config, axes_of(config), emas, subject.pipeline)
    for setting in sorted(settings, key=lambda setting: setting.is_unguided):  # as asked for, then without guidance
        found = evaluator.measure_pipeline(
            subject.pipeline, reference, config.num_images, sampler(setting), config.seed, subject.img_size
        )
        records.append(record_of(Measured(setting, config.num_images, found), about))
    return records


def keep(config: EvaluateConfig, weights: str, records: list[dict], file: Path | None) -> None:
    """Add the records to `file`, and to the model card where they are of a pipeline folder's own weights."""
    add_records(records, file)
    folder = Path(weights).expanduser()
    if weights and not config.output and (folder / INDEX_FILE).is_file() and os.access(folder, os.W_OK):
        if file is None or file.resolve() != (folder / FILE).resolve():
            add_records(records, folder / FILE)
        show_on_card(folder)


def about_all(config: EvaluateConfig, evaluator: Evaluator, subject: Subject, reference: Reference) -> dict:
    """What every record says of how it was measured."""
    return {
        "features": config.features,
        "feature_weights": evaluator.network.weights_id,
        "reference": reference.name,
        "reference_images": reference.num_images,
        "img_size": subject.img_size,
        "num_processes": evaluator.accelerator.num_processes,
    }


def about_model(config: EvaluateConfig, evaluator: Evaluator, subject: Subject, reference: Reference) -> dict:
    """What every record of a model says."""
    return {
        "model": config.model,
        "seed": config.seed,
        "mixed_precision": evaluator.accelerator.mixed_precision,
        **about_all(config, evaluator, subject, reference),
    }
