"""`jit_accel.evaluate --pairs`: what a network makes of conditions, scored against the images that belong to these."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from jit_accel.base.console import redacted, say, warn
from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.base.files import atomic_file, disk_errors
from jit_accel.base.image_rows import draw_rows
from jit_accel.base.processes import gather_rows, on_all, on_main
from jit_accel.config.groups import ConditionConfig
from jit_accel.data.batches.batch import PixelBatch, ready
from jit_accel.data.batches.degradations import Degradation, check_size, degradation_of
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.evaluate import records
from jit_accel.evaluate.evaluator import open_candidate
from jit_accel.evaluate.image_sets import ImageSet, open_image_set
from jit_accel.evaluate.pair_scores import PairScores, untouched, with_intervals
from jit_accel.evaluate.settings import CONDITIONS, EvaluateConfig, Setting, chosen_scores
from jit_accel.model.checkpoints import find_checkpoint_in, read_run
from jit_accel.model.generation import SamplerSettings, generate_batches
from jit_accel.model.pipeline import JiTPipeline

UNTOUCHED, SAMPLE, TRUTH = "untouched", "sample", "truth"  # the condition itself, and one image made of it
SHEET_FILE, SHOWN = "pairs.png", 8


@dataclass(frozen=True)
class Part:
    """A batch of pairs."""

    numbers: list[int]  # of the images in their data set
    keys: np.ndarray  # int64 (B,): one an image, from its content, from which all that is random about it follows
    labels: list[int | None]  # as the network knows them
    truths: Tensor  # uint8 (B, C, H, W)
    conditions: Tensor  # (B, C, H, W) in [0, 1]


@dataclass(frozen=True)
class Pairs:
    """Images and their conditions, opened but not read."""

    images: ImageSet
    num_images: int  # to be scored: the first ones
    label_of: Callable[[int], int | None]  # as the network knows it
    degradation: Degradation | None  # what makes conditions of the images
    are_pictures: bool  # the conditions have the images' channels, or are grey

    def parts(self, batch_size: int, rank: int, world_size: int) -> Iterator[tuple[Part | None, list[str]]]:
        """Yield the pairs of one process, each once, and the names of those that cannot be read."""
        for share in self.images.shares(batch_size, rank, world_size):
            chosen = share.numbers < self.num_images
            if len(chosen) and not chosen.any():  # numbers grow
                return
            labels = share.labels if share.labels is None else share.labels[chosen]
            part = self._part(share.numbers[chosen], share.images[chosen], labels) if chosen.any() else None
            yield part, share.bad_images

    def _part(self, numbers: Tensor, pixels: Tensor, labels: Tensor | None) -> Part:
        digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in pixels.numpy()]
        keys = np.array([int.from_bytes(digest, "little") >> 1 for digest in digests], np.int64)
        batch = ready(PixelBatch(pixels, torch.zeros(len(keys), dtype=torch.int64), keys), "cpu", self.degradation)
        known = [None] * len(keys) if labels is None else [self.label_of(label) for label in labels.tolist()]
        truths = ((batch.images + 1) * 127.5).round().to(torch.uint8)
        return Part(numbers.tolist(), keys, known, truths, (batch.condition + 1) / 2)


def open_pairs(
    path: str, split: str | None, conditions: ConditionConfig, pipeline: JiTPipeline, img_size: int, most: int
) -> Pairs:
    """Open images of any kind that training reads, with the conditions that the network wants.

    Those of the data come before `conditions.condition_from`. Raises `UserError`: there are none, or others than it was
    trained with.
    """
    made_from, degradation, wanted = conditions.condition_from, None, pipeline.transformer.config
    how = {name: getattr(conditions, name) for name in ("condition_path", "condition_column")}
    with renamed_settings(data_path="pairs"):
        source = open_images(path, split=split, **how)
    images, channels = open_image_set(source, "pairs", img_size, has_pairs=True), source.condition_channels
    if not channels:
        if made_from is None:
            rule = "has no condition, and the model's folder does not say how its training made them: add "
            raise UserError(
                f"{rule}--condition_path, --condition_column or --condition_from.", about="pairs", value=path
            )
        degradation = degradation_of(made_from)
        check_size(degradation, (img_size, img_size))
        channels = degradation.channels(wanted.in_channels)
    if channels != wanted.condition_channels:
        rule = f"the conditions have {channels} channels, and the model was trained with {wanted.condition_channels}: "
        about, value = ("condition_from", made_from) if degradation else ("pairs", path)
        raise UserError(f"{rule}give such as it was trained with.", about=about, value=value)
    are_pictures = channels in (1, wanted.in_channels)
    label_of = label_function(source, pipeline)
    return Pairs(images, min(most, images.num_images), label_of, degradation, are_pictures)


def label_function(source: Source, pipeline: JiTPipeline) -> Callable[[int], int | None]:
    """Return what gives a label of the data as the network knows it: by its name, else by its number.

    Raises `UserError` for data with more classes than the network, by other names.
    """
    count = pipeline.transformer.config.num_classes
    if count <= 1 or not source.is_labelled:
        return lambda label: 0 if count == 1 else None
    try:
        ids = pipeline.label_ids(list(source.class_names)) if source.class_names else range(count)
    except ValueError:  # other names
        ids = range(count)
    if (source.num_classes or 0) > len(ids):
        rule = f"has {source.num_classes} classes, and the model knows {count}, by other names: give other data."
        raise UserError(rule, about="pairs", value=source.name)
    return lambda label: ids[label] if label < len(ids) else None


@dataclass(frozen=True)
class PairResult:
    """Scores with their intervals, by what was scored; and the first images, uint8 (n, C, H, W), by their row."""

    scores: dict[str, dict[str, float]]
    num_images: int
    first: dict[str, Tensor]


@dataclass(frozen=True)
class PairEvaluator:
    """Scores what a pipeline makes of conditions; all processes call it together, and each makes its share.

    samples_each: images made of each condition. batch_size: images that a process makes at once. seed: of the noise.
    """

    pairs: Pairs
    scores: PairScores
    accelerator: Any
    samples_each: int = 1
    batch_size: int = 64
    seed: int = 0
    show_progress: bool = False

    @property
    def rows(self) -> list[str]:
        """The rows to score: the untouched condition, one sample (of several the mean score), the mean of several."""
        several = [f"mean of {self.samples_each}"] if self.samples_each > 1 else []
        return [*([UNTOUCHED] if self.pairs.are_pictures else []), SAMPLE, *several]

    def measure(self, pipeline: JiTPipeline, settings: SamplerSettings) -> PairResult:
        """Return the scores of all pairs. UserError on all processes where none can be read, or one fails."""
        accelerator, place = self.accelerator, (self.accelerator.process_index, self.accelerator.num_processes)
        scored = [torch.empty(0, len(self.rows), len(self.scores.names), dtype=torch.float64)]
        numbers: list[int] = []
        shown: list[tuple[int, dict[str, Tensor]]] = []
        bad_images: list[str] = []

        def score() -> None:
            total = -(-self.pairs.num_images // place[1])
            silent = not (self.show_progress and accelerator.is_main_process)
            with accelerator.autocast(), tqdm(total=total, unit="image", leave=False, disable=silent) as progress:
                for part, bad in self.pairs.parts(self.batch_size, *place):
                    bad_images.extend(bad)
                    if part is None:
                        continue
                    pictures = self._pictures(part, pipeline, settings)
                    scored.append(self._scored(pictures))
                    numbers.extend(part.numbers)
                    for i, number in enumerate(part.numbers[: SHOWN - len(shown)]):
                        shown.append((number, {row: some[i, 0].cpu() for row, some in pictures.items()}))
                    progress.update(len(part.numbers))

        with renamed_settings(data_path="pairs"):
            on_all(accelerator, score)
        order = gather_rows(torch.tensor(numbers, dtype=torch.int64), accelerator).argsort()
        found = gather_rows(torch.cat(scored), accelerator)[order]
        num_bad = int(gather_rows(torch.tensor([len(bad_images)]), accelerator).sum())
        if num_bad and accelerator.is_main_process:
            first = f" ({bad_images[0]}, ...)" if bad_images else ""
            warn(f"{self.pairs.images.name}: {num_bad:,} images cannot be read and are left out{first}.")
        if not len(found):
            raise UserError("has no image that can be read.", about="pairs", value=self.pairs.images.name)
        names = self.scores.names
        scores = {row: with_intervals(names, found[:, i], self.seed) for i, row in enumerate(self.rows)}
        columns = [pictures for _, pictures in sorted(gather_object(shown), key=lambda one: one[0])[:SHOWN]]
        return PairResult(scores, len(found), {row: torch.stack([one[row] for one in columns]) for row in columns[0]})

    def _pictures(self, part: Part, pipeline: JiTPipeline, settings: SamplerSettings) -> dict[str, Tensor]:
        """Return images uint8 (B, n, C, H, W) by their row, on the pipeline's device, the truths last."""
        count, (height, width) = self.samples_each, part.truths.shape[-2:]
        numbers = (part.keys[:, None] + np.arange(count)).ravel().tolist()  # a neighbour is as different as any other
        parts = generate_batches(
            pipeline,
            numbers,
            seed=self.seed,
            labels=[label for label in part.labels for _ in range(count)],
            conditions=part.conditions.repeat_interleave(count, 0),
            settings=settings,
            batch_size=self.batch_size,
            height=height,
            width=width,
        )
        samples = torch.cat([images for _, images in parts]).unflatten(0, (-1, count))
        found = {UNTOUCHED: untouched(part.conditions, part.truths)} if self.pairs.are_pictures else {}
        found = {row: some[:, None].to(samples.device) for row, some in found.items()} | {SAMPLE: samples}
        if count > 1:
            found[self.rows[-1]] = samples.float().mean(1, keepdim=True).round().to(torch.uint8)
        return found | {TRUTH: part.truths[:, None].to(samples.device)}

    def _scored(self, pictures: dict[str, Tensor]) -> Tensor:
        """Return float64 (B, rows, scores), of several samples the mean of their scores."""
        truths = pictures[TRUTH]
        of_rows = []
        for some in map(pictures.get, self.rows):
            pair = some.flatten(0, 1), truths.expand_as(some).flatten(0, 1)
            of_rows.append(self.scores(*pair).unflatten(0, some.shape[:2]).mean(1))
        return torch.stack(of_rows, 1)


def evaluate_pairs(config: EvaluateConfig, accelerator, file: Path | None) -> None:
    """Score what the model makes of conditions, keep the records, and draw a sheet of the first ones."""
    on_main(accelerator, lambda: records.read_records(file))
    scores = on_all(accelerator, lambda: PairScores(chosen_scores(config.metrics)))
    candidate, img_size = open_candidate(config, accelerator)
    pipeline = candidate.pipeline(candidate.emas[0])
    given = ConditionConfig(*(getattr(config, name) for name in CONDITIONS))
    conditions = (
        given if given != ConditionConfig() else on_main(accelerator, lambda: recorded_conditions(config.model))
    )
    opening = config.pairs, config.split, conditions, pipeline, img_size, config.num_images
    pairs = on_all(accelerator, lambda: open_pairs(*opening), in_turn=True)
    evaluator = PairEvaluator(pairs, scores, accelerator, config.samples_each, config.batch_size, config.seed, True)
    report = say if accelerator.is_main_process else lambda line: None
    made_from = conditions.condition_from if pairs.degradation else "the data's"
    report(f"Pairs:     {pairs.images.name}, {pairs.num_images:,} images, {img_size} px; condition {made_from}")
    about = {"model": config.model, "seed": config.seed, "mixed_precision": accelerator.mixed_precision}
    about |= {"pairs": redacted(pairs.images.name), "condition_from": made_from, "img_size": img_size}
    about |= {"samples_each": config.samples_each, "num_processes": accelerator.num_processes}
    found, nothing = [], dict.fromkeys(asdict(Setting()))
    for setting in sorted(candidate.settings(), key=lambda setting: setting.is_unguided):
        result = evaluator.measure(candidate.pipeline(setting.ema), SamplerSettings(**setting.sampling))
        for row, values in result.scores.items():
            place = asdict(setting) if row != UNTOUCHED else nothing
            record = {"scored": row, **about, **place, "num_images": result.num_images, "metrics": values}
            found += [] if record in found else [record]
    on_main(accelerator, lambda: draw_first(result.first, (file.parent if file else Path()) / SHEET_FILE))
    on_main(accelerator, lambda: records.keep(found, file, None if config.output else candidate.weights))


def recorded_conditions(model: str) -> ConditionConfig:
    """Return how the training of a model came to its conditions, where a checkpoint of its run is there and says so.

    A folder of them is none of other images.
    """
    folder = records.run_folder_of(Path(model).expanduser())
    checkpoint = find_checkpoint_in(folder) or find_checkpoint_in(folder.parent)  # of a run's pipeline folder
    settings = read_run(checkpoint)["settings"] if checkpoint else {}
    return ConditionConfig(**{name: settings.get(name) for name in ("condition_from", "condition_column")})


def draw_first(first: dict[str, Tensor], path: Path) -> None:
    """Write the first pairs as a sheet: condition, output, truth."""
    names = {UNTOUCHED: "condition", SAMPLE: "output"}
    rows = [(names.get(row, row), some.permute(0, 2, 3, 1)) for row, some in first.items()]
    pictures = [
        (name, (some if some.shape[-1] == 3 else some[..., :1].expand(-1, -1, -1, 3)).numpy()) for name, some in rows
    ]
    with disk_errors("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            draw_rows(pictures).save(temporary, format="PNG")
    say(f"Sheet:     {path}")
