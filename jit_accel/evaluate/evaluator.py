"""Images in, numbers out, on all processes together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_all, on_main
from jit_accel.evaluate import formulas
from jit_accel.evaluate.features import MAIN, SPATIAL, FeatureNetwork
from jit_accel.evaluate.images import ImageSet, find_array, open_image_set
from jit_accel.evaluate.libraries import has_torch_fidelity
from jit_accel.evaluate.names import metric_names
from jit_accel.evaluate.reference import Reference, read_reference, reference_of
from jit_accel.evaluate.statistics import INCEPTION_SCORE_SPLITS, Collector, ImageStatistics
from jit_accel.model.generation import SamplerSettings, generate_batches, share_of
from jit_accel.model.pipeline import JiTPipeline

T = TypeVar("T")


@dataclass
class Seconds:
    """Where the time of this process went."""

    images: float = 0.0  # making them, or reading them
    features: float = 0.0  # the feature network
    sums: float = 0.0  # statistics, added up across processes
    formulas: float = 0.0  # on the main process


@dataclass
class Evaluator:
    """Measures images and pipelines with one feature network; all processes call the same methods together.

    Args:
        network: of `load_features`, on the accelerator's device.
        metrics: names from `metric_names(network.name)`.
        batch_size: images that a process makes, reads and looks at together.
        max_features: of so many images at most, drawn at random, features are kept and compared one by one for kernel
            distance, precision and recall.
        show_progress: a bar of this process's images, on the main process.
    """

    network: FeatureNetwork
    accelerator: Any
    metrics: tuple[str, ...]
    batch_size: int = 64
    max_features: int = 10_000
    show_progress: bool = False
    seconds: Seconds = field(default_factory=Seconds)

    def measure_pipeline(
        self,
        pipeline: JiTPipeline,
        reference: Reference,
        num_images: int,
        settings: SamplerSettings,
        seed: int = 0,
        img_size: int | None = None,
    ) -> dict[str, float]:
        """`compare` images 0 to `num_images` - 1 of this seed, of class number % classes, with the reference.

        Args:
            img_size: in pixels; None: the training size.
        """
        statistics = self.statistics_of_pipeline(pipeline, num_images, settings, seed, img_size)
        return self.compare(statistics, reference)

    def statistics_of_pipeline(
        self,
        pipeline: JiTPipeline,
        num_images: int,
        settings: SamplerSettings,
        seed: int = 0,
        img_size: int | None = None,
    ) -> ImageStatistics:
        """Generate on all processes, which make equally many calls of the network, and collect; nothing is stored."""
        processes, side = self.accelerator.num_processes, img_size or pipeline.transformer.config.img_size
        padded = range(-(-num_images // processes) * processes)  # those from num_images on only fill batches up
        numbers = share_of(padded, self.accelerator.process_index, processes)
        collector = self._collector(num_images)
        how = {"seed": seed, "settings": settings, "batch_size": self.batch_size, "height": side, "width": side}

        def draw() -> None:
            for part, images in self._timed(generate_batches(pipeline, numbers, **how), len(numbers)):
                self._collect(collector, torch.tensor(part), images)

        if self.is_sharded:
            draw()  # a process that meets something must end: no other could be told
        else:
            on_all(self.accelerator, draw)
        return self._finish(collector, side)

    def statistics_of_images(self, images: ImageSet, img_size: int, about: str = "images") -> ImageStatistics:
        """Read each image once, every process its share.

        Raises:
            UserError: the data cannot be read, or hardly anything in it is an image.
        """
        collector, accelerator = self._collector(images.num_images), self.accelerator

        def read() -> None:
            shares = images.shares(img_size, self.batch_size, accelerator.process_index, accelerator.num_processes)
            total = images.num_images and images.num_images // accelerator.num_processes
            for share in self._timed(shares, total):
                collector.bad_images += share.bad_images
                if len(share.numbers):
                    self._collect(collector, share.numbers, share.images, share.labels)

        on_all(accelerator, read)
        statistics = self._finish(collector, img_size)
        if statistics.bad_images and accelerator.is_main_process:
            first = f" ({collector.bad_images[0]}, ...)" if collector.bad_images else ""
            warn(f"--{about} {images.name}: {statistics.bad_images:,} images cannot be read and are left out{first}.")
        if statistics.num_images < 2:
            raise UserError(f"has {statistics.num_images} images, too few to compare.", about=about, value=images.name)
        return statistics

    def load_reference(self, path: str, img_size: int | None = None) -> Reference:
        """Read statistics from a file, or measure images, cropped to `img_size` (None: the size that they have).

        Raises:
            UserError: on all processes, whatever is wrong with it.
        """
        found, shape = None, None
        if path.endswith(".npz"):
            found = on_all(self.accelerator, lambda: read_reference(path, self.network))
            shape = on_all(self.accelerator, lambda: find_array(path, "reference"))
        if found is not None and (shape is None or found.kept is not None or not self._keeps_features):
            return found
        images = on_all(self.accelerator, lambda: open_image_set(path, "reference"), in_turn=True)
        statistics = self.statistics_of_images(images, side_of(images, img_size, "reference"), "reference")
        measured = reference_of(path, statistics, images.fingerprint)
        return measured if found is None else replace(found, kept=measured.kept, img_size=measured.img_size)

    def compare(self, statistics: ImageStatistics, reference: Reference) -> dict[str, float]:
        """The metrics, the same on all processes; kernel distance and Inception Score also have `..._std`."""

        def measure() -> dict[str, float]:
            start, found = time.perf_counter(), {}
            table = metric_names(self.network.name)
            for name in self.metrics:
                if name not in found:
                    found |= MEASURES[table[name].short](name, statistics, reference)
            self.seconds.formulas += time.perf_counter() - start
            return {name: value for name, value in found.items() if name.removesuffix("_std") in self.metrics}

        return on_main(self.accelerator, measure)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold shards of the generating network, and wait for each other inside it."""
        return self.accelerator.distributed_type.value == "FSDP"

    @property
    def _keeps_features(self) -> bool:
        table = metric_names(self.network.name)
        return any(table[name].short in NEED_KEPT for name in self.metrics)

    def _collector(self, num_images: int | None) -> Collector:
        shorts = {metric_names(self.network.name)[name].short for name in self.metrics}
        return Collector(
            self.network,
            num_images,
            max_features=self.max_features if self._keeps_features else 0,
            wants_scores="is" in shorts,
            with_spatial="sfd" in shorts,
        )

    def _collect(self, collector: Collector, numbers: Tensor, images: Tensor, labels: np.ndarray | None = None) -> None:
        with self._clock("features"):
            layers = self.network(images)
        with self._clock("sums"):
            collector.add(numbers, layers, labels)

    def _finish(self, collector: Collector, img_size: int) -> ImageStatistics:
        with self._clock("sums"):
            return collector.finish(self.accelerator, img_size)

    def _timed(self, batches: Iterable[T], num_images: int | None) -> Iterator[T]:
        """The same batches, made under the accelerator's precision, with their time counted and a progress bar."""
        batches = iter(batches)
        is_silent = not (self.show_progress and self.accelerator.is_main_process)
        with tqdm(total=num_images, unit="image", leave=False, disable=is_silent) as bar:
            while True:
                with self._clock("images"), self.accelerator.autocast():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
                bar.update(len(batch[0]))

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.network.device.type != "cpu":  # a wait of microseconds for each batch, which takes a second
                torch.accelerator.synchronize()
            setattr(self.seconds, name, getattr(self.seconds, name) + time.perf_counter() - start)


def side_of(images: ImageSet, img_size: int | None, about: str) -> int:
    """The side to crop images to: `img_size`, or else the one that they have.

    Raises:
        UserError: neither is known, or images that were prepared would have to be enlarged.
    """
    side = img_size or images.img_size
    if side is None:
        raise UserError(
            "the first image is no square: give a size to crop to as --img_size.", about=about, value=images.name
        )
    return side


def unmeasurable(metrics: tuple[str, ...], reference: Reference, num_images: int | None = None) -> dict[str, str]:
    """Of the metrics those that this reference, number of images or installation does not allow, and why."""
    counts = (num_images, None if reference.kept is None else len(reference.kept))
    fewest = min((count for count in counts if count is not None), default=math.inf)
    table, reasons = metric_names(reference.features), {}
    for name in metrics:
        short = table[name].short
        if short == "sfd" and SPATIAL not in reference.gaussians:
            reasons[name] = "the reference has no spatial statistics (mu_s, sigma_s)"
        elif short in NEED_KEPT and reference.kept is None:
            reasons[name] = "the reference has mean and covariance alone, no features of single images"
        elif short in NEED_KEPT and not has_torch_fidelity():
            reasons[name] = "torch-fidelity is not installed: pip install 'jit_accel[eval]'"
        elif short in ("precision", "recall") and fewest <= formulas.NEIGHBOURS:
            reasons[name] = f"of {fewest} images none has {formulas.NEIGHBOURS} neighbours"
        elif short == "is" and num_images is not None and num_images < 2 * INCEPTION_SCORE_SPLITS:
            reasons[name] = f"{num_images} images are fewer than two for each of {INCEPTION_SCORE_SPLITS} parts"
    return reasons


def _frechet(layer: str, name: str, statistics: ImageStatistics, reference: Reference) -> dict[str, float]:
    moments, other = statistics.moments[layer], reference.gaussians[layer]
    return {name: formulas.frechet_distance(moments.mean, moments.covariance, other.mean, other.root)}


def _inception_score(name: str, statistics: ImageStatistics, reference: Reference) -> dict[str, float]:
    mean, std = formulas.inception_score(statistics.scores)
    return {name: mean, f"{name}_std": std}


def _kernel(name: str, statistics: ImageStatistics, reference: Reference) -> dict[str, float]:
    mean, std = formulas.kernel_distance(statistics.kept, reference.kept)
    return {name: mean, f"{name}_std": std}


def _precision_recall(name: str, statistics: ImageStatistics, reference: Reference) -> dict[str, float]:
    device = statistics.moments[MAIN].total.device
    precision, recall = formulas.precision_recall(statistics.kept.to(device), reference.kept.to(device))
    _, _, features = name.partition("_")
    return dict(zip((f"precision_{features}".rstrip("_"), f"recall_{features}".rstrip("_")), (precision, recall)))


# Of each metric by its short name; a new one is a function here and a row in `METRICS`
MEASURES: dict[str, Callable[[str, ImageStatistics, Reference], dict[str, float]]] = {
    "fd": partial(_frechet, MAIN),
    "sfd": partial(_frechet, SPATIAL),
    "is": _inception_score,
    "kd": _kernel,
    "precision": _precision_recall,
    "recall": _precision_recall,
}
NEED_KEPT = ("kd", "precision", "recall")
