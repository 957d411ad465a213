"""Images in, numbers out, on all processes together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_all, on_main
from jit_accel.data.formats.sources import Source
from jit_accel.evaluate.features import FeatureNetwork
from jit_accel.evaluate.formulas import hindrances, measured
from jit_accel.evaluate.image_sets import ImageSet, find_array, open_image_set
from jit_accel.evaluate.settings import metric_names
from jit_accel.evaluate.statistics import Collector, ImageStatistics, read_reference
from jit_accel.model.generation import SamplerSettings, generate_batches, share_of
from jit_accel.model.pipeline import JiTPipeline

T = TypeVar("T")


@dataclass
class Evaluator:
    """Measures images and pipelines with one feature network; all processes call the same methods together.

    network: of `load_features`, on the accelerator's device. metrics: names from `metric_names(network.name)`.
    batch_size: images that a process makes, reads and looks at together. max_features: as in `Collector`.
    """

    network: FeatureNetwork
    accelerator: Any
    metrics: tuple[str, ...]
    batch_size: int = 64
    max_features: int = 10_000
    show_progress: bool = False

    def measure_pipeline(
        self,
        pipeline: JiTPipeline,
        reference: ImageStatistics,
        num_images: int,
        settings: SamplerSettings,
        seed: int = 0,
        img_size: int | None = None,
    ) -> dict[str, float]:
        """Return `compare` of images 0 to `num_images` - 1 of this seed, of class number % classes; nothing is stored.

        All processes make equally many calls of the network. `img_size` None: the training size.
        """
        processes, side = self.accelerator.num_processes, img_size or pipeline.transformer.config.img_size
        padded = range(-(-num_images // processes) * processes)  # those from num_images on only fill batches up
        numbers = share_of(padded, self.accelerator.process_index, processes)
        collector = self._collector(num_images)
        how = {"seed": seed, "settings": settings, "batch_size": self.batch_size, "height": side, "width": side}

        def draw() -> None:
            with self.accelerator.autocast():  # in which features and sums keep their float32 and float64
                for part, images in self._watched(generate_batches(pipeline, numbers, **how), len(numbers)):
                    collector.add(torch.tensor(part), self.network(images))

        if self.is_sharded:
            draw()  # a process that fails must end: the others wait inside the network and cannot hear of it
        else:
            on_all(self.accelerator, draw)
        return self.compare(collector.finish(self.accelerator, img_size=side), reference)

    def statistics_of_images(self, images: ImageSet, img_size: int, about: str = "images") -> ImageStatistics:
        """Read each image once, every process its share.

        Raises `UserError`: the data cannot be read, or hardly anything in it is an image.
        """
        collector, accelerator = self._collector(images.num_images), self.accelerator

        def read() -> None:
            shares = images.shares(img_size, self.batch_size, accelerator.process_index, accelerator.num_processes)
            for share in self._watched(shares, images.num_images // accelerator.num_processes):
                collector.bad_images += share.bad_images
                if len(share.numbers):
                    collector.add(share.numbers, self.network(share.images), share.labels)

        on_all(accelerator, read)
        statistics = collector.finish(accelerator, images.name, img_size)
        if statistics.bad_images and accelerator.is_main_process:
            first = f" ({collector.bad_images[0]}, ...)" if collector.bad_images else ""
            warn(f"{images.name}: {statistics.bad_images:,} images cannot be read and are left out{first}.")
        if statistics.num_images < 2:
            rule = f"has {statistics.num_images} images, too few to compare."
            raise UserError(rule, about=about, value=images.name)
        return replace(statistics, fingerprint=images.fingerprint)

    def load_reference(self, path: str | Source, img_size: int | None = None) -> ImageStatistics:
        """Read statistics from a file, or measure images, cropped to `img_size` (None: the size that they have).

        Raises `UserError`: on all processes, whatever is wrong with it.
        """
        about, found, shape = "reference", None, None
        if isinstance(path, str) and path.endswith(".npz"):
            found = on_all(self.accelerator, lambda: read_reference(path, self.network))
            shape = on_all(self.accelerator, lambda: find_array(path, about))
        is_pairwise = any(metric_names(self.network.name)[name].is_pairwise for name in self.metrics)
        if found is not None and (shape is None or found.kept is not None or not is_pairwise):
            return found
        images = on_all(self.accelerator, lambda: open_image_set(path, about), in_turn=True)
        of_images = self.statistics_of_images(images, images.side(img_size, about), about)
        if found is None:
            return replace(of_images, name=path if isinstance(path, str) else path.name)
        return replace(found, kept=of_images.kept, img_size=of_images.img_size)

    def keep_measurable(self, reference: ImageStatistics, num_images: int, are_wanted: bool) -> None:
        """Keep the metrics that reference, number of images and installation allow; warn of the others.

        Raises `UserError`: there is another one, and they `are_wanted` by name.
        """
        reasons = hindrances(self.metrics, reference, num_images)
        self.metrics = tuple(reasons.pop("", ()))
        for reason, names in reasons.items():
            if are_wanted:
                raise UserError(f"{reason}.", about="metrics", value=names[0])
            if self.accelerator.is_main_process:
                warn(f"without {', '.join(names)}: {reason}.")

    def compare(self, statistics: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
        """Return the metrics, the same on all processes; kernel distance and Inception Score also have `..._std`."""
        return on_main(self.accelerator, lambda: measured(self.metrics, statistics, reference))

    @property
    def is_sharded(self) -> bool:
        """Processes hold shards of the generating network, and wait for each other inside it."""
        return self.accelerator.distributed_type.value == "FSDP"

    def _collector(self, num_images: int) -> Collector:
        return Collector(self.network, num_images, self.metrics, self.max_features)

    def _watched(self, batches: Iterable[T], num_images: int) -> Iterator[T]:
        """Yield the same batches, with a progress bar."""
        is_silent = not (self.show_progress and self.accelerator.is_main_process)
        with tqdm(total=num_images, unit="image", leave=False, disable=is_silent) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch[0]))
