"""`jit_accel.evaluate`: from settings to a table, records in a JSON file, and the winner of a sweep."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from jit_accel.base.console import say, warn
from jit_accel.base.devices import chosen_precision
from jit_accel.base.errors import UserError
from jit_accel.base.files import disk_errors
from jit_accel.base.processes import on_all, on_main, process_group
from jit_accel.evaluate.candidate import Candidate
from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.features import MAIN, load_features
from jit_accel.evaluate.grid import Setting, is_sweep
from jit_accel.evaluate.image_sets import ImageSet, open_image_set
from jit_accel.evaluate.records import (
    add_records,
    pipeline_folder_of,
    publish,
    read_records,
    record_file,
    table_of,
    write_winner,
)
from jit_accel.evaluate.settings import EvaluateConfig, chosen_metrics, metric_names
from jit_accel.evaluate.statistics import ImageStatistics, save_reference
from jit_accel.evaluate.sweep import Measured, Outcome, SweepLog, as_markdown, sweep, verdict, write_sweep_files
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.pipeline import JiTPipeline

UNBALANCED = 0.1  # the share of a reference's images that would have to be of other classes
GO_ON = "give the same command again"
OF_CONTEXT = ("features", "feature_weights", "img_size", "mixed_precision", "seed")


class OneProcess:
    """An accelerator's part for the process that calls `measure`, whatever else is launched."""

    num_processes, process_index, is_main_process = 1, 0, True
    distributed_type = DistributedType.NO
    autocast = local_main_process_first = staticmethod(nullcontext)


def evaluate(config: EvaluateConfig) -> int:
    """Measure as the settings say. Returns the exit code.

    Raises `UserError`: on all processes, whatever is wrong with settings, model, data or installation.
    """
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("jit_accel").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Formulas take minutes on the main process while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    accelerator = Accelerator(mixed_precision=chosen_precision(config.mixed_precision), kwargs_handlers=[patience])
    with process_group(accelerator):
        evaluator = build_evaluator(config, accelerator, accelerator.device, show_progress=True)
        file = record_file(config)
        on_main(accelerator, lambda: read_records(file))  # a file that nothing can be added to is found at once
        candidate, images, num_images, img_size = None, None, None, config.img_size
        if config.model is not None:
            candidate, num_images = Candidate(config, accelerator), config.num_images
            img_size = checked_side(candidate.pipeline(candidate.emas[0]), img_size)
        elif config.images is not None:
            images = on_all(accelerator, lambda: open_image_set(config.images, "images"), in_turn=True)
            num_images, img_size = images.num_images, images.side(img_size, "images")
        reference = evaluator.load_reference(config.reference, img_size)
        evaluation = Evaluation(config, evaluator, reference, img_size, candidate)
        if accelerator.is_main_process:
            introduce(evaluation, num_images)
        if config.make_reference:
            on_main(accelerator, lambda: save_reference(Path(config.make_reference).expanduser(), reference))
        if num_images is None:
            return 0
        evaluator.keep_measurable(reference, num_images, are_wanted=bool(config.metrics))
        if candidate and is_sweep(candidate.axes):
            run_sweep(evaluation, file)
            return 0
        records = evaluation.records(images)
        on_main(accelerator, lambda: keep(evaluation, records, file))
        return 0


def build_evaluator(config: EvaluateConfig, accelerator, device, show_progress: bool) -> Evaluator:
    """Return an evaluator with the feature network, loaded on all processes; one of a machine gets the weights."""
    weights = config.feature_weights
    network = on_all(accelerator, lambda: load_features(config.features, device, weights), in_turn=True)
    metrics = chosen_metrics(config.features, config.metrics)
    return Evaluator(network, accelerator, metrics, config.batch_size, config.max_features, show_progress)


def checked_side(pipeline: JiTPipeline, img_size: int | None) -> int:
    """Return the side of the images to make, None being the pipeline's own, or raise `UserError`."""
    network = pipeline.transformer.config
    side = img_size or network.img_size
    if side % network.patch_size:
        rule = f"must be a multiple of the model's patch size {network.patch_size}."
        raise UserError(rule, about="img_size", value=side)
    return side


def introduce(evaluation: "Evaluation", num_images: int | None) -> None:
    """Say what is compared, and what of it is doubtful."""
    network, reference, img_size = evaluation.evaluator.network, evaluation.reference, evaluation.img_size
    features, is_model = network.sizes[MAIN], evaluation.candidate is not None
    real = "?" if reference.num_images is None else f"{reference.num_images:,}"
    size = f", {reference.img_size} px" if reference.img_size else ""
    say(f"Reference: {reference.name}, {real} images{size}; features {network.name}, {features} numbers")
    for flag, number in (("reference", reference.num_images), ("num_images" if is_model else "images", num_images)):
        if number is not None and number <= features:
            problem = f"{number:,} images do not determine a covariance of {features:,} features, and a Fréchet"
            warn(
                f"--{flag}: {problem} distance of few images is too large: compare only with others of as many images."
            )
    if reference.img_size and img_size and reference.img_size != img_size:
        problem = f"of images of {reference.img_size} px, but those measured have {img_size} px"
        warn(f"--reference {reference.name}: {problem}: make a reference of that size (--img_size {img_size}).")
    if is_model and (share := imbalance(reference.label_counts)) > UNBALANCED:
        warn(
            f"--reference {reference.name}: its classes differ in size, the model's images do not; for equal classes "
            f"{share:.0%} of its images would have to be others, and that is part of the distance."
        )


def imbalance(label_counts: tuple[int, ...]) -> float:
    """Return the share of images that would have to change their class for all to have as many; 0 if not known."""
    total, classes = sum(label_counts), len(label_counts)
    return sum(max(0, count / total - 1 / classes) for count in label_counts) if total else 0.0


@dataclass(frozen=True)
class Evaluation:
    """A model or images, the features they are measured by, and the reference they are measured against."""

    config: EvaluateConfig
    evaluator: Evaluator
    reference: ImageStatistics
    img_size: int | None
    candidate: Candidate | None

    @property
    def about(self) -> dict:
        """The part of a record that is the same for all settings."""
        config, accelerator = self.config, self.evaluator.accelerator
        precision = {"mixed_precision": accelerator.mixed_precision}
        of_model = {"model": config.model, "seed": config.seed, **precision} if self.candidate else {}
        return {
            **of_model,
            "features": config.features,
            "feature_weights": self.evaluator.network.weights_id,
            "reference": self.reference.name,
            "reference_images": self.reference.num_images,
            "img_size": self.img_size,
            "num_processes": accelerator.num_processes,
        }

    def measure(self, setting: Setting, num_images: int) -> Measured:
        """Measure the model with one setting; all processes together."""
        pipeline, sampling = self.candidate.pipeline(setting.ema), SamplerSettings(**setting.sampling)
        how = (num_images, sampling, self.config.seed, self.img_size)
        return Measured(setting, num_images, self.evaluator.measure_pipeline(pipeline, self.reference, *how))

    def record_of(self, measured: Measured) -> dict:
        """Return the record of the model with one setting."""
        return {**self.about, **measured.place(), "metrics": measured.values}

    def records(self, images: ImageSet | None) -> list[dict]:
        """Measure images that are there, or the model with guidance and without, and return a record of each."""
        if images is not None:
            statistics = self.evaluator.statistics_of_images(images, self.img_size)
            of_images = {"images": self.config.images, "num_images": statistics.num_images}
            return [{**of_images, **self.about, "metrics": self.evaluator.compare(statistics, self.reference)}]
        settings = sorted(self.candidate.settings(), key=lambda setting: setting.is_unguided)
        return [self.record_of(self.measure(setting, self.config.num_images)) for setting in settings]


def keep(evaluation: Evaluation, records: list[dict], file: Path | None) -> None:
    """Say the records and add them to `file`, and to the model card where they are of a pipeline folder's weights."""
    say(table_of(records))
    add_records(records, file)
    if evaluation.candidate is None or evaluation.config.output:
        return
    folder = Path(evaluation.candidate.weights).expanduser()
    if (folder / INDEX_FILE).is_file() and os.access(folder, os.W_OK):
        publish(records, folder, file)


def run_sweep(evaluation: Evaluation, file: Path | None) -> None:
    """Measure the grid, write its files and records beside `file`, and the winner into the pipeline folder."""
    config, evaluator, candidate = evaluation.config, evaluation.evaluator, evaluation.candidate
    accelerator, every_metric = evaluator.accelerator, evaluator.metrics
    (select, *_) = chosen_metrics(config.features, (config.select,) if config.select else config.metrics)
    settings = candidate.settings()
    if select not in every_metric:
        rule = f"cannot be measured here; choose from {', '.join(every_metric)}."
        raise UserError(rule, about="select", value=select)
    folder = (file.parent if file else Path()) / "sweep"
    context = {
        **{key: evaluation.about[key] for key in OF_CONTEXT},
        "metrics": list(every_metric),
        "max_features": config.max_features,
        "reference": reference_fingerprint(evaluation.reference),
        "model": candidate.fingerprint(),
    }

    def on_writer(work: Callable):
        return on_main(accelerator, disk_errors("output", folder, GO_ON)(work))

    log = SweepLog(folder / "sweep.jsonl", context, on_writer)
    report = say if accelerator.is_main_process else lambda line: None
    known = f"; {len(log.done)} measurements are there already" if log.done else ""
    report(f"Sweep:     {len(settings)} settings by {select} → {folder}{known}")

    def measure(setting: Setting, count: int) -> Measured:
        # Metrics that compare images one by one take their time: of few images only the one that decides.
        evaluator.metrics = every_metric if count == config.num_images else (select,)
        return log.measured(setting, count, evaluator.metrics, evaluation.measure)

    few = config.sweep_images or max(2, config.num_images // 10)
    sizes = {"sweep_images": few, "num_images": config.num_images, "top": config.sweep_top}
    is_higher = metric_names(config.features)[select].is_better_higher
    outcome = sweep(settings, measure, **sizes, select=select, higher_is_better=is_higher, say=report)
    candidate.close()
    on_main(accelerator, lambda: write_outcome(evaluation, outcome, folder, file))


def write_outcome(evaluation: Evaluation, outcome: Outcome, folder: Path, file: Path | None) -> None:
    """Write and say what was found; on the main process."""
    with disk_errors("output", folder, GO_ON):
        paths = write_sweep_files(outcome, folder, evaluation.about)
    say(as_markdown(outcome))
    say(verdict(outcome))
    say("Sweep:     " + ", ".join(map(str, paths)))
    add_records(map(evaluation.record_of, outcome.full), file, only_new=True)
    if not evaluation.config.write_best:
        return
    model, checkpoint = evaluation.config.model, evaluation.candidate.checkpoint
    pipeline_folder = pipeline_folder_of(model, checkpoint)
    if pipeline_folder is None:
        what = "has no pipeline folder here" if checkpoint is None else "is not the newest checkpoint of its run"
        say(f"Pipeline:  {model} {what}, so nothing is written: the defaults and weights stay as they are.")
        return
    with disk_errors("output", pipeline_folder, GO_ON):
        say(write_winner(checkpoint, pipeline_folder, outcome))
    best = [one for one in outcome.full if one in (outcome.best, outcome.best_unguided)]
    publish(map(evaluation.record_of, best), pipeline_folder, file, only_new=True)


def reference_fingerprint(reference: ImageStatistics) -> str:
    """Return a hash of a file of statistics; of images their place, count, size and their data set's fingerprint."""
    path = Path(reference.name).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return f"{reference.name} ({reference.num_images}, {reference.img_size} px) {reference.fingerprint}".rstrip()
