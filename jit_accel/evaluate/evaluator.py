"""Images in, numbers out, on all processes together; and the model whose images they are."""

import gc
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.base.processes import gather_rows, on_all, on_main
from jit_accel.config.groups import width_of
from jit_accel.config.presets import Size, plain_size, sides_of
from jit_accel.data.formats.columns import COLOUR, PixelFormat
from jit_accel.data.formats.sources import Source
from jit_accel.evaluate.drawing import Setting, axes_of, grid
from jit_accel.evaluate.features import FeatureNetwork, Layers
from jit_accel.evaluate.flag_values import ALL, averages
from jit_accel.evaluate.image_sets import ImageSet, find_array, in_bytes, open_image_set, read_reference
from jit_accel.evaluate.reference_facts import FactsTally, fits, open_with_facts
from jit_accel.evaluate.settings import EvaluateConfig, metric_names
from jit_accel.evaluate.statistics import Collector, ImageStatistics, hindrance, measured
from jit_accel.evaluate.uncertainty import groups_of
from jit_accel.model.checkpoints import MANIFEST, STATE
from jit_accel.model.generation import SamplerSettings, checked_size, generate_batches, share_of
from jit_accel.model.loading import averages_of, find_checkpoint_in, find_pipeline_in, load_quietly
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.precision import BlockWork, settle_accelerator
from jit_accel.model.saved_weights import weights_fingerprint
from jit_accel.model.width_averages import fit_to


@dataclass
class Evaluator:
    """Measures images and pipelines with one feature network; all processes call the same methods together.

    network: of `load_features`, on the accelerator's device. metrics: names from `metric_names(network.name)`.
    batch_size: images that a process makes, reads and looks at together. max_features: as in `Collector`.
    has_intervals: distances get intervals, for which they are computed eleven times. seen: called with the numbers,
    images and features of each batch that is compared. A `UserError` is raised on all processes.
    """

    network: FeatureNetwork
    accelerator: Any
    metrics: tuple[str, ...]
    batch_size: int = 64
    max_features: int = 10_000
    show_progress: bool = False
    has_intervals: bool = False
    seen: Callable[[Tensor, Tensor, Layers], None] | None = None

    def measure_pipeline(
        self,
        pipeline: JiTPipeline,
        reference: ImageStatistics,
        num_images: int,
        settings: SamplerSettings,
        seed: int = 0,
        img_size: Size | None = None,
        looking: Callable[[], AbstractContextManager[Callable | None]] = nullcontext,
    ) -> dict[str, float]:
        """Return `compare` of images 0 to `num_images` - 1 of this seed, of class number % classes; nothing is stored.

        Where the reference has facts, an image has the labels and numbers of one of its images.

        All processes make equally many calls of the network. `img_size` None: the training size. `looking` gives the
        pipeline's `callback_on_step_end`, and is left as soon as this process has made its images, or failed.
        """
        processes, size = self.accelerator.num_processes, img_size or plain_size(pipeline.transformer.config.img_size)
        padded = range(-(-num_images // processes) * processes)  # those from num_images on only fill batches up
        numbers = share_of(padded, self.accelerator.process_index, processes)
        in_turn = None if reference and reference.facts else pipeline.transformer.config.num_classes
        groups = groups_of(num_images, in_turn) if self.has_intervals else None
        collector = Collector(self.network, num_images, self.metrics, self.max_features, groups)
        how: dict[str, Any] = {"seed": seed, "settings": settings, "batch_size": self.batch_size}
        how |= reference.facts.drawn(numbers, seed) if reference and reference.facts else {}
        how |= zip(("height", "width"), sides_of(size))

        def draw() -> None:
            # In autocast features and sums keep their float32 and float64.
            with self.accelerator.autocast(), self._progress(len(numbers)) as progress, looking() as on_step:
                for part, images in generate_batches(pipeline, numbers, on_step=on_step, **how):
                    self._collect(collector, torch.tensor(part), images)
                    progress.update(len(part))

        if self.is_sharded:
            draw()  # a process that fails must end: the others wait inside the network and cannot hear of it
        else:
            on_all(self.accelerator, draw)
        return self.compare(collector.finish(self.accelerator, img_size=size), reference)

    def statistics_of_images(
        self, images: ImageSet, about: str = "images", tally: FactsTally | None = None
    ) -> ImageStatistics:
        """Read each image once, every process its share; UserError if hardly anything in the data can be read."""
        is_compared = self.has_intervals and about == "images"
        groups = groups_of(images.num_images) if is_compared else None
        collector = Collector(self.network, images.num_images, self.metrics, self.max_features, groups)
        accelerator, bad_images = self.accelerator, []

        def read() -> None:
            shares = images.shares(self.batch_size, accelerator.process_index, accelerator.num_processes)
            with self._progress(images.num_images // accelerator.num_processes) as progress:
                for share in shares:
                    bad_images.extend(share.bad_images)
                    if tally:
                        tally.add(share)
                    if len(share.numbers):
                        pictures = in_bytes(share.images, images.pixels)
                        self._collect(collector, share.numbers, pictures, share.labels)
                    progress.update(len(share.numbers))

        with renamed_settings(data_path=about):
            on_all(accelerator, read)
        statistics = collector.finish(accelerator, images.name, images.img_size)
        num_bad = int(gather_rows(torch.tensor([len(bad_images)]), accelerator).sum())
        if num_bad and accelerator.is_main_process:
            first = f" ({bad_images[0]}, ...)" if bad_images else ""
            warn(f"{images.name}: {num_bad:,} images cannot be read and are left out{first}.")
        if statistics.num_images < 2:
            rule = f"has {statistics.num_images} images, too few to compare."
            raise UserError(rule, about=about, value=images.name)
        return replace(statistics, fingerprint=images.fingerprint, facts=tally and tally.finish(accelerator))

    def load_reference(
        self,
        path: str | Source,
        img_size: Size | None = None,
        split: str | None = None,
        pixels: PixelFormat = COLOUR,
        shown_to: JiTPipeline | None = None,
        **reading: Any,
    ) -> ImageStatistics:
        """Read statistics from a file, or measure images, cropped to `img_size` (None: the size that they have).

        pixels: what those of a path are decoded to. shown_to: the model whose images are to be given the numbers, or
        several labels, of these, if it was trained with such. reading: further settings of `open_images`, for a path.
        """
        about, found = "reference", None
        if isinstance(path, str) and path.endswith(".npz"):
            found = on_all(self.accelerator, lambda: read_reference(path, self.network))
            is_pairwise = any(metric_names(self.network.name)[name].is_pairwise for name in self.metrics)
            if found and (found.kept is not None or not is_pairwise or not find_array(path, about)):
                return found
        how, opened, tally = (about, img_size, split), path, None
        if shown_to and not (isinstance(path, str) and path.endswith(".npz")):
            wanted = {"split": split, "pixels": pixels, **reading}
            opened = on_all(self.accelerator, lambda: open_with_facts(path, shown_to, **wanted), in_turn=True)
            tally = FactsTally(opened, shown_to) if fits(opened, shown_to) else None
        images = on_all(self.accelerator, lambda: open_image_set(opened, *how, pixels=pixels, **reading), in_turn=True)
        of_images = self.statistics_of_images(images, about, tally)
        if found is None:
            name = path if isinstance(path, str) else path.name
            return replace(of_images, name=f"{name} ({split})" if split else name)
        return replace(found, kept=of_images.kept, img_size=of_images.img_size)

    def keep_measurable(self, reference: ImageStatistics, num_images: int, are_wanted: bool) -> None:
        """Keep the metrics that reference, images and installation allow; warn of others, UserError if `are_wanted`."""
        reasons: dict[str, list[str]] = {}
        for name, metric in metric_names(self.network.name).items():
            if name in self.metrics:
                reasons.setdefault(hindrance(metric, reference, num_images), []).append(name)
        self.metrics = tuple(reasons.pop("", ()))
        for reason, names in reasons.items():
            if are_wanted:
                raise UserError(f"{reason}.", about="metrics", value=names[0])
            if self.accelerator.is_main_process:
                warn(f"without {', '.join(names)}: {reason}.")

    def compare(self, statistics: ImageStatistics, reference: ImageStatistics) -> dict[str, float]:
        """Return the metrics as `measured` does, the same on all processes."""
        return on_main(self.accelerator, lambda: measured(self.metrics, statistics, reference))

    @property
    def is_sharded(self) -> bool:
        """Processes hold shards of the generating network, and wait for each other inside it."""
        return self.accelerator.distributed_type.value == "FSDP"

    def _collect(self, collector: Collector, numbers: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        layers = self.network(images)
        collector.add(numbers, layers, labels)
        if self.seen is not None:
            self.seen(numbers, images, layers)

    def _progress(self, num_images: int) -> tqdm:
        is_silent = not (self.show_progress and self.accelerator.is_main_process)
        return tqdm(total=num_images, unit="image", leave=False, disable=is_silent)


def refuse_conditions(pipeline: JiTPipeline) -> None:
    """Raise `UserError` for a network that makes its images of conditions."""
    if pipeline.transformer.config.condition_channels:
        rule = "was trained with a condition: score it with python -m jit_accel.evaluate --pairs."
        raise UserError(rule, about="pipe")


def pixels_of(pipeline: JiTPipeline) -> PixelFormat:
    """Return the format of the images that a pipeline makes, which those to compare with are decoded to."""
    value_range = pipeline.config.value_range
    return PixelFormat(pipeline.transformer.config.in_channels, value_range=value_range and tuple(value_range))


def open_candidate(config: EvaluateConfig, accelerator) -> tuple["Candidate", Size]:
    """Return the model to measure, in the precision that suits it, and the size of its images in pixels.

    Raises `UserError` for a model with a condition where there are no `--pairs`, and for one without where there are.
    """
    candidate = Candidate(config, accelerator)
    pipeline = candidate.pipeline(candidate.emas[0])
    img_size, sizes = checked_size(pipeline, config.img_size), pipeline.transformer.config
    if (sizes.condition_channels > 0) != (config.pairs is not None):
        rule = "was trained with a condition, of which it makes images: give these as --pairs, not --reference."
        rule = rule if config.pairs is None else "was trained without a condition: measure it against --reference."
        raise UserError(rule, about="model", value=config.model)
    if config.pairs is None and sizes.in_channels not in (1, 3):
        rule = f"makes images of {sizes.in_channels} channels, and features are of grey or colour: compare them from "
        raise UserError(rule + "Python, in measures of your own.", about="model", value=config.model)
    work = BlockWork.of(sizes, sizes.patch_size, *sides_of(img_size), config.batch_size, trains=False)
    times = settle_accelerator(accelerator, config.mixed_precision, work)
    if times and accelerator.is_main_process:
        say(f"Precision: {accelerator.mixed_precision} ({times.in_words()})")
    return candidate, img_size


class Candidate:
    """The model that `--model` names now: a training that goes on makes others. All processes call it together.

    weights: a pipeline folder, a checkpoint, or an id of the Hub. checkpoint: the same where it is a checkpoint. emas:
    the averages to measure, by their names in the checkpoint; [None] for the weights of a pipeline folder.
    """

    def __init__(self, config: EvaluateConfig, accelerator):
        self.config, self.accelerator, self.axes = config, accelerator, axes_of(config)
        self.is_sweep = ALL in self.axes["ema"] or any(len(values) > 1 for values in self.axes.values())
        self.weights, self.checkpoint, self.emas = on_main(accelerator, self._find)
        self._ema: str | None = None
        self._pipeline: JiTPipeline | None = None

    def _find(self) -> tuple[str, Path | None, list[str | None]]:
        names, folder = self.axes["ema"], Path(self.config.model).expanduser()
        exported = None if names else find_pipeline_in(folder)  # averages are a checkpoint's
        checkpoint = None if exported else find_checkpoint_in(folder)
        if checkpoint is None:
            return str(exported or self.config.model), None, names or [None]  # `load_pipeline` refuses names
        available = averages_of(checkpoint)
        emas = averages("ema", names, available) if names else available[:1]
        for name in filter(width_of, emas):  # found out before any is measured
            fit_to(checkpoint, name)
        return str(checkpoint), checkpoint, emas

    def pipeline(self, ema: str | None) -> JiTPipeline:
        """Return the pipeline with these averaged weights on the device; one of them is loaded at a time."""
        if self._pipeline is None or ema != self._ema:
            self.close()
            how = self.weights, ema, self.accelerator.device, self.config.compile, self.config.guide
            self._pipeline, self._ema = on_all(self.accelerator, lambda: load_quietly(*how), in_turn=True), ema
        return self._pipeline

    def close(self) -> None:
        """Give the pipeline's memory back."""
        self._pipeline = None
        gc.collect()

    def settings(self) -> list[Setting]:
        """Return the settings to measure; without flags they are the pipeline's own."""
        pipeline = self.pipeline(self.emas[0])
        for method in self.axes["method"] or [None]:
            own = asdict(SamplerSettings(method=method).completed(pipeline))
        axes = [values or [own[name]] for name, values in self.axes.items() if name != "ema"]
        return grid(self.emas, *axes, with_unguided=self.config.unguided)

    def fingerprint(self) -> str:
        """Return a hash of the weights, by a checkpoint's seal or a pipeline's tensors, and of the scheduler."""
        pipeline = self.pipeline(self.emas[0])
        digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
        if self.checkpoint is None:
            digest.update(str(weights_fingerprint(pipeline.transformer.state_dict())).encode())
        else:
            for name in (MANIFEST, STATE):
                digest.update((self.checkpoint / name).read_bytes())
        if pipeline.guide is not None:
            digest.update(str(weights_fingerprint(pipeline.guide.state_dict())).encode())
        return digest.hexdigest()[:16]
