"""`jit_accel.evaluate --pairs`: what a network makes of conditions, scored against the images that belong to these."""

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
from jit_accel.base.image_rows import as_pictures, draw_rows
from jit_accel.base.processes import gather_rows, on_all, on_main
from jit_accel.config.groups import ConditionConfig
from jit_accel.config.presets import in_pixels, sides_of
from jit_accel.evaluate import records
from jit_accel.evaluate.drawing import Setting
from jit_accel.evaluate.evaluator import open_candidate
from jit_accel.evaluate.features import MAIN, FeatureNetwork, load_features
from jit_accel.evaluate.moments import Moments
from jit_accel.evaluate.pair_scores import PairScores, untouched, with_intervals
from jit_accel.evaluate.pairs import Pairs, Part, open_pairs
from jit_accel.evaluate.settings import CONDITIONS, EvaluateConfig, chosen_scores, reading_of
from jit_accel.evaluate.statistics import frechet_distance
from jit_accel.evaluate.uncertainty import GROUPS, groups_of, jackknife
from jit_accel.model.checkpoints import find_checkpoint_in, read_run
from jit_accel.model.generation import SamplerSettings, generate_batches
from jit_accel.model.pipeline import JiTPipeline

UNTOUCHED, SAMPLE, TRUTH = "untouched", "sample", "truth"  # the condition itself, and one image made of it
SHEET_FILE, SHOWN = "pairs.png", 8


@dataclass(frozen=True)
class PairResult:
    """Scores with their intervals, by what was scored; and the first images, uint8 (n, C, H, W), by their row."""

    scores: dict[str, dict[str, float]]
    num_images: int
    first: dict[str, Tensor]


class ScoreTally:
    """The scores of one process's pairs by their rows, and the features of their pictures where there is a network."""

    def __init__(self, rows: list[str], scores: PairScores, network: FeatureNetwork | None, num_pairs: int):
        self.rows, self.scores, self.network = rows, scores, network
        self.numbers: list[int] = []
        self.scored = [torch.empty(0, len(rows), len(scores.names), dtype=torch.float64)]
        self.shown: list[tuple[int, dict[str, Tensor]]] = []
        sides = [*rows, TRUTH] if network else []
        self.groups = groups_of(num_pairs) if network else None
        groups = 1 if self.groups is None else GROUPS
        self.moments = {row: Moments(network.sizes[MAIN], network.device, groups) for row in sides}

    def add(self, numbers: list[int], pictures: dict[str, Tensor]) -> None:
        """Score images uint8 (B, n, C, H, W) by their row; of several the mean of their scores counts."""
        truths, of_rows = pictures[TRUTH], []
        for some in map(pictures.get, self.rows):
            pair = some.flatten(0, 1), truths.expand_as(some).flatten(0, 1)
            of_rows.append(self.scores(*pair).unflatten(0, some.shape[:2]).mean(1))
        self.scored.append(torch.stack(of_rows, 1))
        self.numbers.extend(numbers)
        groups = None if self.groups is None else self.groups[numbers]
        for row, moments in self.moments.items():
            moments.add(self.network(pictures[row][:, 0])[MAIN], groups)
        for i, number in enumerate(numbers[: SHOWN - len(self.shown)]):
            self.shown.append((number, {row: some[i, 0].cpu() for row, some in pictures.items()}))

    def result(self, accelerator, seed: int, distance: str | None) -> PairResult:
        """Return what all processes have found, the same on all; `distance` is the name of that of the features."""
        order = gather_rows(torch.tensor(self.numbers, dtype=torch.int64), accelerator).argsort()
        found = gather_rows(torch.cat(self.scored), accelerator)[order]
        least = 2 if self.moments else 1
        if len(found) < least:
            raise UserError(f"has {len(found)} images that can be read, and {least} are needed.", about="pairs")
        scores = {row: with_intervals(self.scores.names, found[:, i], seed) for i, row in enumerate(self.rows)}
        for row, distances in self._distances(accelerator, distance).items():
            scores[row] |= distances
        columns = [pictures for _, pictures in sorted(gather_object(self.shown), key=lambda one: one[0])[:SHOWN]]
        return PairResult(scores, len(found), {row: torch.stack([one[row] for one in columns]) for row in columns[0]})

    def _distances(self, accelerator, name: str | None) -> dict[str, dict[str, float]]:
        """Return the Fréchet distance of each row from the truths, with its interval: pairs are left out together."""
        gaussians = {row: moments.gaussian(accelerator) for row, moments in self.moments.items()}

        def distances() -> dict[str, dict[str, float]]:
            far, truth = {}, gaussians.pop(TRUTH)
            without_each: dict[str, list[float]] = {row: [] for row in gaussians}
            for row, gaussian in gaussians.items():
                far[row] = {name: frechet_distance(gaussian, truth)}
            if self.groups is not None:
                for left in zip(*(moments.without_each() for moments in self.moments.values())):
                    for row, gaussian in zip(gaussians, left):
                        without_each[row].append(frechet_distance(gaussian, left[-1]))
                for row, others in without_each.items():
                    far[row] |= jackknife(name, far[row][name], others, self.moments[row].counts, least=0)
            return far

        return on_main(accelerator, distances) if gaussians else {}


@dataclass(frozen=True)
class PairEvaluator:
    """Scores what a pipeline makes of conditions; all processes call it together, and each makes its share.

    network: its features tell the Fréchet distance from the truths, named `distance`. samples_each: images made of each
    condition. batch_size: images that a process makes at once. seed: of the noise.
    """

    pairs: Pairs
    scores: PairScores
    accelerator: Any
    samples_each: int = 1
    batch_size: int = 64
    seed: int = 0
    network: FeatureNetwork | None = None
    distance: str | None = None
    show_progress: bool = False

    @property
    def rows(self) -> list[str]:
        """The rows to score: the untouched condition, one sample (of several the mean score), the mean of several."""
        several = [f"mean of {self.samples_each}"] if self.samples_each > 1 else []
        return [*([UNTOUCHED] if self.pairs.are_pictures else []), SAMPLE, *several]

    def measure(self, pipeline: JiTPipeline, settings: SamplerSettings) -> PairResult:
        """Return the scores of all pairs. UserError on all processes where none can be read, or one fails."""
        accelerator, place = self.accelerator, (self.accelerator.process_index, self.accelerator.num_processes)
        tally, bad_images = ScoreTally(self.rows, self.scores, self.network, self.pairs.num_images), []
        pairs_at_once = max(1, self.batch_size // self.samples_each)

        def score() -> None:
            total = -(-self.pairs.num_images // place[1])
            silent = not (self.show_progress and accelerator.is_main_process)
            with accelerator.autocast(), tqdm(total=total, unit="image", leave=False, disable=silent) as progress:
                for part, bad in self.pairs.parts(pairs_at_once, *place):
                    bad_images.extend(bad)
                    if part is not None:
                        tally.add(part.numbers, self._pictures(part, pipeline, settings))
                        progress.update(len(part.numbers))

        with renamed_settings(data_path="pairs"):
            on_all(accelerator, score)
        num_bad = int(gather_rows(torch.tensor([len(bad_images)]), accelerator).sum())
        if num_bad and accelerator.is_main_process:
            first = f" ({bad_images[0]}, ...)" if bad_images else ""
            warn(f"{self.pairs.images.name}: {num_bad:,} images cannot be read and are left out{first}.")
        return tally.result(accelerator, self.seed, self.distance)

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
            vectors=part.vectors and [vector for vector in part.vectors for _ in range(count)],
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


def evaluate_pairs(config: EvaluateConfig, accelerator, file: Path | None) -> None:
    """Score what the model makes of conditions, keep the records, and draw a sheet of the first ones."""
    on_main(accelerator, lambda: records.read_records(file))
    names, distance = chosen_scores(config.metrics, config.features)
    features = config.features, accelerator.device, config.feature_weights
    network = on_all(accelerator, lambda: load_features(*features), in_turn=True) if distance else None
    candidate, img_size = open_candidate(config, accelerator)
    scores = on_all(accelerator, lambda: PairScores(names, side=min(sides_of(img_size))))
    channels = candidate.pipeline(candidate.emas[0]).transformer.config.in_channels
    if channels not in (1, 3) and (by_network := distance or next((name for name in names if name == "lpips"), None)):
        rule = f"is for grey or colour, and the model makes images of {channels} channels: leave it out."
        raise UserError(rule, about="metrics", value=by_network)
    pipeline = candidate.pipeline(candidate.emas[0])
    given = ConditionConfig(*(getattr(config, name) for name in CONDITIONS))
    conditions = (
        given if given != ConditionConfig() else on_main(accelerator, lambda: recorded_conditions(config.model))
    )
    opening = config.pairs, conditions, pipeline, img_size, config.num_images
    how = reading_of(config)
    pairs = on_all(accelerator, lambda: open_pairs(*opening, split=config.split, **how), in_turn=True)
    how = config.samples_each, config.batch_size, config.seed, network, distance
    evaluator = PairEvaluator(pairs, scores, accelerator, *how, show_progress=True)
    report = say if accelerator.is_main_process else lambda line: None
    made_from = conditions.condition_from if pairs.degradation else "the data's"
    report(
        f"Pairs:     {pairs.images.name}, {pairs.num_images:,} images, {in_pixels(img_size)} px; condition {made_from}"
    )
    about = {"model": config.model, "seed": config.seed, "mixed_precision": accelerator.mixed_precision}
    about |= {"guide": redacted(config.guide)} if config.guide else {}
    about |= {"pairs": redacted(pairs.images.name), "condition_from": made_from, "img_size": img_size}
    about |= {"samples_each": config.samples_each, "num_processes": accelerator.num_processes}
    if distance:
        about |= {"features": network.name, "feature_weights": network.weights_id, "reference": about["pairs"]}
        if pairs.num_images <= network.sizes[MAIN]:
            size, rule = network.sizes[MAIN], "compare distances only of as many images."
            report(f"Features:  {network.name}, {size:,} numbers, of fewer images: {rule}")
            about |= {} if config.few_on_card else {"on_card": False}
    found, first, nothing = [], None, dict.fromkeys(asdict(Setting()))
    for setting in sorted(candidate.settings(), key=lambda setting: setting.is_unguided):
        result = evaluator.measure(candidate.pipeline(setting.ema), SamplerSettings(**setting.sampling))
        first = first or result.first
        for row, values in result.scores.items():
            place = asdict(setting) if row != UNTOUCHED else nothing
            record = {"scored": row, **about, **place, "num_images": result.num_images, "metrics": values}
            found += [] if record in found else [record]
    on_main(accelerator, lambda: draw_first(first, (file.parent if file else Path()) / SHEET_FILE))
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
    pictures = [(names.get(row, row), as_pictures(some.permute(0, 2, 3, 1).numpy())) for row, some in first.items()]
    with disk_errors("output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            draw_rows(pictures).save(temporary, format="PNG")
    say(f"Sheet:     {path}")
