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

from jit_accel.base.console import redacted, say, warn
from jit_accel.base.devices import chosen_precision
from jit_accel.base.errors import UserError, shown
from jit_accel.base.files import disk_errors
from jit_accel.base.host import keep_heap
from jit_accel.base.processes import on_all, on_main, process_group
from jit_accel.config.presets import Size, in_pixels
from jit_accel.data.formats.columns import COLOUR
from jit_accel.evaluate import records
from jit_accel.evaluate.drawing import Setting
from jit_accel.evaluate.evaluator import Candidate, Evaluator, open_candidate, pixels_of
from jit_accel.evaluate.features import MAIN, load_features
from jit_accel.evaluate.image_sets import ImageSet, open_image_set, save_reference
from jit_accel.evaluate.memorization import SHEET_FILE, MemorizationCheck
from jit_accel.evaluate.pair_evaluator import evaluate_pairs
from jit_accel.evaluate.settings import EvaluateConfig, chosen_metrics, metric_names, reading_of
from jit_accel.evaluate.statistics import ImageStatistics
from jit_accel.evaluate.sweep import Measured, Outcome, SweepLog, sweep
from jit_accel.model.card import EVALUATION_FILE
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.vector_arguments import note_of_none

UNBALANCED = 0.1  # the share of a reference's images that would have to be of other classes
GO_ON = "give the same command again"
OF_CONTEXT = ("features", "feature_weights", "img_size", "mixed_precision", "seed")


class OneProcess:
    """An accelerator's part for the process that calls `measure`, whatever else is launched."""

    num_processes, process_index, is_main_process = 1, 0, True
    distributed_type = DistributedType.NO
    autocast = local_main_process_first = staticmethod(nullcontext)


def evaluate(config: EvaluateConfig) -> int:
    """Measure as the settings say; return the exit code. UserError on all processes, whatever is wrong."""
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger("jit_accel").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    keep_heap()
    # Formulas take minutes on the main process while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    accelerator = Accelerator(
        mixed_precision=chosen_precision(config.mixed_precision) or "no", kwargs_handlers=[patience]
    )
    with process_group(accelerator):
        file = record_file(config)
        if config.pairs is not None:
            evaluate_pairs(config, accelerator, file)
            return 0
        evaluator = build_evaluator(config, accelerator, accelerator.device, show_progress=True)
        on_main(accelerator, lambda: records.read_records(file))  # a file that nothing can be added to is found at once
        candidate, images, num_images, img_size = None, None, None, config.img_size
        if config.model is not None:
            (candidate, img_size), num_images = open_candidate(config, accelerator), config.num_images
        elif config.images is not None:
            images = on_all(accelerator, lambda: open_image_set(config.images, "images", config.img_size), in_turn=True)
            num_images, img_size = images.num_images, images.img_size
        pipeline = candidate.pipeline(candidate.emas[0]) if candidate else None
        given = config.split, pixels_of(pipeline) if pipeline else COLOUR, pipeline
        reference = evaluator.load_reference(config.reference, img_size, *given, **reading_of(config))
        del pipeline  # a sweep loads others in its place
        evaluation = Evaluation(config, evaluator, reference, img_size, candidate, file)
        if accelerator.is_main_process:
            evaluation.introduce(num_images)
        if config.make_reference:
            on_main(accelerator, lambda: save_reference(Path(config.make_reference).expanduser(), reference))
        if num_images is not None:
            evaluator.keep_measurable(reference, num_images, are_wanted=bool(config.metrics))
            if candidate and candidate.is_sweep:
                evaluation.run_sweep()
            else:
                check = evaluation.memorization_check() if config.held_out else None
                found = evaluation.measure_all(images, check)
                if check:
                    check.complete(found, (file.parent if file else Path()) / SHEET_FILE)
                weights = candidate.weights if candidate and not config.output else None
                on_main(accelerator, lambda: records.keep(found, file, weights))
        return 0


def build_evaluator(config: EvaluateConfig, accelerator, device, show_progress: bool) -> Evaluator:
    """Return an evaluator with the feature network, loaded on all processes; one of a machine gets the weights."""
    weights = config.feature_weights
    network = on_all(accelerator, lambda: load_features(config.features, device, weights), in_turn=True)
    metrics = chosen_metrics(config.features, config.metrics)
    how = config.batch_size, config.max_features, show_progress
    return Evaluator(network, accelerator, metrics, *how, has_intervals=True)


def record_file(config: EvaluateConfig) -> Path | None:
    """Return where the results go: `--output`, or the folder of the model, or of its run, if there is one."""
    if config.output:
        return Path(config.output).expanduser()
    folder = records.run_folder_of(Path(config.model).expanduser()) if config.model else None
    return folder / EVALUATION_FILE if folder is not None and folder.is_dir() and os.access(folder, os.W_OK) else None


def imbalance(label_counts: tuple[int, ...]) -> float:
    """Return the share of images that would have to change their class for all to have as many; 0 if not known."""
    total, classes = sum(label_counts), len(label_counts)
    return sum(max(0, count / total - 1 / classes) for count in label_counts) if total else 0.0


def reference_fingerprint(reference: ImageStatistics) -> str:
    """Return a hash of a file of statistics; of images their place, count, size and their data set's fingerprint."""
    path = Path(reference.name).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    size = f"({reference.num_images}, {in_pixels(reference.img_size)} px)"
    return f"{redacted(reference.name)} {size} {reference.fingerprint}".rstrip()


@dataclass(frozen=True)
class Evaluation:
    """A model or images, the features they are measured by, the reference, and the file that the results go to."""

    config: EvaluateConfig
    evaluator: Evaluator
    reference: ImageStatistics
    img_size: Size | None
    candidate: Candidate | None
    file: Path | None

    def introduce(self, num_images: int | None) -> None:
        """Say what is compared, and what of it is doubtful."""
        network, reference, img_size = self.evaluator.network, self.reference, self.img_size
        features, is_model = network.sizes[MAIN], self.candidate is not None
        real = "?" if reference.num_images is None else f"{reference.num_images:,}"
        size = f", {in_pixels(reference.img_size)} px" if reference.img_size else ""
        say(f"Reference: {reference.name}, {real} images{size}; features {network.name}, {features} numbers")
        sides = (("reference", reference.num_images), ("num_images" if is_model else "images", num_images))
        for flag, number in sides:
            if number is not None and number <= features:
                problem = f"{number:,} images do not determine a covariance of {features:,} features, and a Fréchet "
                remedy = "compare only with others of as many images."
                warn(f"--{flag}: {problem}distance of few images is too large: {remedy}")
        if reference.img_size and img_size and reference.img_size != img_size:
            sizes = in_pixels(reference.img_size), in_pixels(img_size)
            problem = "of images of {} px, but those measured have {} px: make a reference of that size".format(*sizes)
            warn(f"--reference {reference.name}: {problem} (--img_size {shown(img_size)}).")
        columns = self.candidate.pipeline(self.candidate.emas[0]).config.vectors if is_model else None
        facts = reference.facts
        if columns and not (facts and facts.vectors):
            warn(note_of_none(columns, "name images with such columns as --reference"))
        elif facts:
            given = " and ".join(name for name in ("labels", "vectors") if getattr(facts, name))
            say(f"Images:    have the {given.replace('vectors', 'numbers')} of the reference's images, each in turn")
        if is_model and not (facts and facts.labels) and (share := imbalance(reference.label_counts)) > UNBALANCED:
            problem = "its classes differ in size, the model's images do not; for equal classes"
            remedy = "of its images would have to be others, and that is part of the distance."
            warn(f"--reference {reference.name}: {problem} {share:.0%} {remedy}")

    @property
    def about(self) -> dict:
        """The part of a record that is the same for all settings."""
        config, accelerator = self.config, self.evaluator.accelerator
        precision = {"mixed_precision": accelerator.mixed_precision}
        of_model = {"model": config.model, "seed": config.seed, **precision} if self.candidate else {}
        of_model |= {"guide": redacted(config.guide)} if self.candidate and config.guide else {}
        return {
            **of_model,
            "features": config.features,
            "feature_weights": self.evaluator.network.weights_id,
            "reference": redacted(self.reference.name),
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
        record = {**self.about, **measured.place(), "metrics": measured.values}
        is_few = measured.num_images <= self.evaluator.network.sizes[MAIN] and not self.config.few_on_card
        return record | ({"on_card": False} if is_few else {})

    def memorization_check(self) -> MemorizationCheck:
        """Return what compares the images that are measured with those of the training and held-out ones."""
        config, candidate = self.config, self.candidate
        pixels = pixels_of(candidate.pipeline(candidate.emas[0])) if candidate else COLOUR

        def open_both() -> list[ImageSet]:
            how = {"pixels": pixels, **reading_of(config), "label_column": None, "label_separator": None}
            places = {"reference": config.split, "held_out": config.held_out_split}
            found = []
            for of, split in places.items():
                found.append(opened := open_image_set(getattr(config, of), of, self.img_size, split, **how))
                if opened.pixels.channels != pixels.channels:
                    rule = f"has {opened.pixels.channels} channels, and the images compared with it {pixels.channels}: "
                    raise UserError(rule + "give a folder or data set instead.", about=of, value=opened.name)
            return found

        return MemorizationCheck(self.evaluator, *on_all(self.evaluator.accelerator, open_both, in_turn=True))

    def measure_all(self, images: ImageSet | None, check: MemorizationCheck | None = None) -> list[dict]:
        """Measure images that are there, or the model with guidance and without, and return a record of each.

        check: sees these images.
        """
        if images is not None:
            if check:
                check.watch(images.num_images)
            statistics = self.evaluator.statistics_of_images(images)
            of_images = {"images": redacted(self.config.images), "num_images": statistics.num_images}
            return [{**of_images, **self.about, "metrics": self.evaluator.compare(statistics, self.reference)}]
        settings = sorted(self.candidate.settings(), key=lambda setting: setting.is_unguided)
        found = []
        for setting in settings:
            if check:
                check.watch(self.config.num_images)
            found.append(self.record_of(self.measure(setting, self.config.num_images)))
        return found

    def run_sweep(self) -> None:
        """Measure the grid, write its files and records beside the file, and the winner into the pipeline folder."""
        config, evaluator, candidate = self.config, self.evaluator, self.candidate
        accelerator, every_metric = evaluator.accelerator, evaluator.metrics
        (select, *_) = chosen_metrics(config.features, (config.select,) if config.select else config.metrics)
        settings = candidate.settings()
        if select not in every_metric:
            rule = f"cannot be measured here; choose from {', '.join(every_metric)}."
            raise UserError(rule, about="select", value=select)
        folder = (self.file.parent if self.file else Path()) / "sweep"
        context = {
            **{key: self.about[key] for key in OF_CONTEXT},
            "metrics": list(every_metric),
            "max_features": config.max_features,
            "reference": reference_fingerprint(self.reference),
            "model": candidate.fingerprint(),
        }

        def on_writer(work: Callable):
            return on_main(accelerator, disk_errors("output", folder, GO_ON)(work))

        log = SweepLog(folder / "sweep.jsonl", context, on_writer)
        report = say if accelerator.is_main_process else lambda line: None
        known = f"; {len(log.done)} measurements are there already" if log.done else ""
        report(f"Sweep:     {len(settings)} settings by {select} → {folder}{known}")

        def measure(setting: Setting, count: int) -> Measured:
            # Comparing images one by one takes time, and so do intervals: of few images the metric that decides.
            evaluator.has_intervals = count == config.num_images
            evaluator.metrics = every_metric if evaluator.has_intervals else (select,)
            return log.measured(setting, count, evaluator.metrics, self.measure)

        few = config.sweep_images or max(2, config.num_images // 10)
        sizes = {"sweep_images": few, "num_images": config.num_images, "top": config.sweep_top}
        is_higher = metric_names(config.features)[select].is_better_higher
        outcome = sweep(settings, measure, **sizes, select=select, higher_is_better=is_higher, say=report)
        candidate.close()
        on_main(accelerator, lambda: self.write_outcome(outcome, folder))

    def write_outcome(self, outcome: Outcome, folder: Path) -> None:
        """Write and say what a sweep found; on the main process."""
        with disk_errors("output", folder, GO_ON):
            paths = records.write_sweep_files(outcome, folder, self.about)
        say(records.as_markdown(outcome))
        say(records.verdict(outcome))
        say("Sweep:     " + ", ".join(map(str, paths)))
        records.add_records(map(self.record_of, outcome.full), self.file, only_new=True)
        if not self.config.write_best:
            return
        if self.config.guide:
            say("Pipeline:  its defaults stay as they are, since it keeps no --guide, which these settings are for.")
            return
        model, checkpoint = self.config.model, self.candidate.checkpoint
        pipeline_folder = records.pipeline_folder_of(model, checkpoint)
        if pipeline_folder is None:
            what = "has no pipeline folder here" if checkpoint is None else "is not the newest checkpoint of its run"
            say(f"Pipeline:  {model} {what}, so nothing is written: the defaults and weights stay as they are.")
            return
        with disk_errors("output", pipeline_folder, GO_ON):
            say(records.write_winner(checkpoint, pipeline_folder, outcome))
        best = [one for one in outcome.full if one in (outcome.best, outcome.best_unguided)]
        records.publish(map(self.record_of, best), pipeline_folder, self.file, only_new=True)
