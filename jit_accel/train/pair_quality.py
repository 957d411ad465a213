"""Scores of what a network makes of held-out conditions, measured on the way of a run."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from jit_accel.base.processes import gather_rows, on_all
from jit_accel.data.batches.batch import Batch, PixelBatch, listed, ready
from jit_accel.data.batches.degradations import Degradation
from jit_accel.data.batches.holdout import HeldOut
from jit_accel.data.formats.numbers import Vectors
from jit_accel.evaluate.pair_scores import PairScores, means, untouched
from jit_accel.model.generation import SamplerSettings, generate_batches
from jit_accel.monitor.metric_table import PAIR_SCORE, UNTOUCHED
from jit_accel.train.samples import SampleMeasure


@dataclass
class PairQuality(SampleMeasure):
    """Compares images made of held-out conditions with the images that belong to these; always from the same noise.

    Noise follows from each image's content, so the values do not depend on the number of processes. `UserError` without
    the package of the scores.
    """

    held_out: HeldOut  # this process's
    degradation: Degradation | None  # what makes conditions of them
    standards: Vectors | None  # of the numbers beside them
    labels_of: Callable[[Batch], Tensor]  # as the network knows them
    most: int  # images, of all processes together

    def __post_init__(self):
        self.scores = PairScores(about="paired_every_steps")
        chosen, self.count, self.num_images = some_of(self.held_out, self.most, self.accelerator)
        batch = ready(chosen, "cpu", self.degradation)
        num_classes = self.pipeline.transformer.config.num_classes
        self.keys = batch.positions.tolist()
        self.labels = [None if label == num_classes else label for label in listed(self.labels_of(batch))]
        self.truth = ((batch.images + 1) * 127.5).round().to(torch.uint8)
        self.conditions = (batch.condition + 1) / 2
        self.vectors = None if batch.vectors is None else self.standards.restored(batch.vectors.numpy()).tolist()
        self.passes = self.passes_for(self.num_images, None)
        self.before = self._untouched()
        self.names = {PAIR_SCORE.format(name=name) for name in self.scores.names}

    def values(self) -> dict[str, float]:
        """Return the means by their keys in the log, `val/psnr` and others, and `..._untouched`."""
        steps, batch_size = self.settings.num_inference_steps, max(8, self.batch_size)
        rows = []

        def draw() -> None:
            how = {"labels": self.labels, "conditions": self.conditions, "vectors": self.vectors}
            how |= {"batch_size": batch_size, "seed": self.seed}
            with self.stops.looking(steps * -(-len(self.keys) // batch_size)) as look:
                how |= {"settings": SamplerSettings(steps), "on_step": look}
                for start, (_, images) in enumerate(generate_batches(self.pipeline, self.keys, **how)):
                    first = start * batch_size
                    rows.append(self.scores(images, self.truth[first : first + len(images)]))

        if self.is_sharded:
            draw()  # a process that fails must end: the others wait inside the network
        else:
            on_all(self.accelerator, draw)
        return self._mean(torch.cat(rows)) | self.before

    def _untouched(self) -> dict[str, float]:
        pictures = untouched(self.conditions, self.truth)
        return {} if pictures is None else self._mean(self.scores(pictures, self.truth), UNTOUCHED)

    def _mean(self, rows: Tensor, ending: str = "") -> dict[str, float]:
        found = means(self.scores.names, gather_rows(rows[: self.count], self.accelerator))
        return {PAIR_SCORE.format(name=name) + ending: value for name, value in found.items()}


def some_of(held_out: HeldOut, most: int, accelerator) -> tuple[PixelBatch, int, int]:
    """Return this process's part of the `most` images with the smallest keys, its size, and that of all parts.

    It is filled up by its first image, or a grey one, to the size of the largest: a sharded network needs all processes
    for each forward.
    """
    of_all = enumerate(gather_object([held_out.keys.tolist()]))
    chosen = sorted((key, rank, place) for rank, keys in of_all for place, key in enumerate(keys))[:most]
    mine = [place for _, rank, place in chosen if rank == accelerator.process_index]
    largest = max(Counter(rank for _, rank, _ in chosen).values())
    places = torch.tensor(mine + [mine[0] if mine else 0] * (largest - len(mine)))
    return held_out.or_grey().batch(places), len(mine), len(chosen)
