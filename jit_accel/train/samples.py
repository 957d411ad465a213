"""Samples of a run on its way: sheets to look at, and how far generated images are from real ones."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError, message_of, renamed_settings
from jit_accel.base.files import atomic_file
from jit_accel.base.image_rows import as_pictures, draw_rows, legible
from jit_accel.base.processes import SharedStop, on_all, on_main
from jit_accel.config.presets import Size, plain_size
from jit_accel.config.run_groups import EvalConfig, SheetConfig
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.features import load_features
from jit_accel.evaluate.image_sets import read_reference, save_reference
from jit_accel.evaluate.settings import metric_names
from jit_accel.evaluate.statistics import ImageStatistics
from jit_accel.model.generation import SamplerSettings, generate
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.solvers import SOLVERS
from jit_accel.monitor.log import is_measured
from jit_accel.monitor.metric_table import EVAL, UNGUIDED
from jit_accel.train.averages import Ema
from jit_accel.train.examples import Examples

SAMPLES_PER_CLASS = 8
MAX_CLASSES = 10
REFERENCE_FILE = "eval_reference.npz"
MEASURED = ("fd", "is")  # what sums alone give: no features of single images are kept in a training
# The training's names for the settings of the evaluation and of its reference.
NAMES = {
    "data_path": "eval_reference",
    "reference": "eval_reference",
    "features": "eval_features",
    "feature_weights": "eval_feature_weights",
}


@dataclass(kw_only=True)
class AveragedSamples:
    """Images of a run's averaged weights, always from the same noise; all processes make them together."""

    pipeline: JiTPipeline  # around the network without its wrapper
    averages: Ema  # of its weights
    accelerator: Accelerator
    settings: SheetConfig
    seed: int  # of the noise
    batch_size: int  # images that a process makes at once
    stops: SharedStop  # looked at after each ODE step of theirs

    def passes_for(self, images: int, steps: int | None, *more_guidance: float) -> float:
        """Return how many images each process passes forward for so many in `steps`, at each guidance."""
        guidance = {self.pipeline.config.guidance_scale, *more_guidance}
        steps = steps or self.settings.num_inference_steps
        calls = steps if SOLVERS[self.pipeline.solver_name()].calls == 1 else 2 * steps - 1
        calls *= sum(1 if scale == 1 else 2 for scale in guidance)
        return images * calls / self.accelerator.num_processes


@dataclass
class SampleSheets(AveragedSamples):
    """Draws sheets of a few classes; of a network that sees conditions, of examples with what it makes of them.

    generated: the images of the newest sheet alone, uint8 (n, H, W, 3), on the main process.
    """

    examples: Examples | None = None
    generated: np.ndarray | None = None

    def __post_init__(self):
        num_classes = self.pipeline.transformer.config.num_classes
        count = min(num_classes, MAX_CLASSES)
        self.classes = [i * num_classes // count for i in range(count)]
        self.row_names = [legible(self.pipeline.config.class_names[label], label) for label in self.classes]
        if self.examples:
            self.row_names = list(self.examples.rows)
        self.labels = self.examples.labels if self.examples else np.repeat(self.classes, SAMPLES_PER_CLASS).tolist()
        self.passes = self.passes_for(len(self.labels), None)

    def caption(self, step: int) -> str:
        """Return a sheet in words."""
        return (
            f"step {step:,}, EMA {self.averages.name}, guidance {self.pipeline.config.guidance_scale:g}, "
            f"{self.settings.num_inference_steps} {self.pipeline.solver_name()} steps; "
            f"rows: {', '.join(self.row_names)}"
        )

    def draw(self, path: Path) -> dict[str, np.ndarray]:
        """Make a sheet, and write it as a PNG on the main process; a full disk is warned of.

        Returns the images, uint8 (n, H, W, 3), of each row by its name; on other processes, and without a sheet, {}.
        Raises `Stopped` on all processes.
        """
        accelerator, steps = self.accelerator, self.settings.num_inference_steps
        labels, examples = self.labels, self.examples
        share = -(-len(labels) // accelerator.num_processes)  # padded: every process makes equally many
        mine = [(accelerator.process_index * share + i) % len(labels) for i in range(share)]
        batch_size = max(self.batch_size, SAMPLES_PER_CLASS)
        with self.averages.applied(), self.stops.looking(steps * -(-share // batch_size)) as look:
            images = generate(
                self.pipeline,
                mine,
                seed=self.seed,
                labels=[labels[i] for i in mine],
                num_inference_steps=steps,
                batch_size=batch_size,
                on_step=look,
                **(examples.given(mine) if examples else {}),
            )
        images = accelerator.gather(images.to(accelerator.device))[: len(labels)].cpu()
        if not accelerator.is_main_process:
            return {}
        pictures = as_pictures(images.permute(0, 2, 3, 1).numpy())
        pixels = pictures.reshape(-1, min(SAMPLES_PER_CLASS, len(labels)), *pictures.shape[1:])
        self.generated = pictures
        pixels = examples.around(*pixels) if examples else pixels
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, durable=False) as temporary:
                draw_rows(list(zip(self.row_names, pixels))).save(temporary, format="PNG")
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror or error}): make room.")
            return {}
        return dict(zip(self.row_names, pixels))


@dataclass(kw_only=True)
class SampleMeasure(AveragedSamples):
    """Numbers about the images of a step. What one process raises costs all of them these numbers, and no more.

    A kind of it has `names`, their keys in the log, `num_images`, and `values`, which measures them.
    """

    every: int  # steps
    output_dir: Path

    def has_measured(self, step: int) -> bool:
        """Return False where the log has this step without the values; the main process looks."""
        return on_main(self.accelerator, lambda: is_measured(self.output_dir, step, self.names))

    def prepare(self) -> None:
        """Get what is compared with, before the first step."""

    def measure(self, step: int) -> dict[str, float]:
        """Return the values by their keys in the log; {} where they cannot be had, of which is warned.

        Raises `Stopped`.
        """
        # With FSDP's shards an error inside the network is one process's alone: it must end, as in a training step.
        survived = UserError if self.is_sharded else Exception
        try:
            with self.averages.applied():
                return self.values()
        except survived as error:  # met by all processes
            if self.accelerator.is_main_process:
                warn(f"step {step:,} is not evaluated, and training goes on: {message_of(error)}")
            return {}

    @property
    def is_sharded(self) -> bool:
        """Processes hold shards of the network, and wait for each other inside it."""
        return self.accelerator.distributed_type == DistributedType.FSDP


@dataclass
class SampleQuality(SampleMeasure):
    """Measures how far the images are from real ones; `UserError` if feature network or reference cannot be had."""

    evaluation: EvalConfig
    images: Source | str  # of the training; the reference's, which may be a file, where the settings name another
    reference: ImageStatistics | None = None

    def __post_init__(self):
        accelerator, wanted, path = self.accelerator, self.evaluation, self.evaluation.eval_reference
        self.img_size = plain_size(self.pipeline.transformer.config.img_size)
        self.num_images = wanted.eval_images
        self.passes = self.passes_for(self.num_images, wanted.eval_num_inference_steps, 1.0)
        with renamed_settings(**NAMES):
            network = on_all(
                accelerator,
                lambda: load_features(wanted.eval_features, accelerator.device, wanted.eval_feature_weights),
                in_turn=True,  # the first one fetches weights that are not there yet
            )
            # What is wrong with the reference is found now, also in a dry run; its images are read in `prepare`.
            if path is not None and path.endswith(".npz"):
                self.images, self.reference = path, on_all(accelerator, lambda: read_reference(path, network))
            elif path is not None:
                sizes = self.pipeline.transformer.config
                how = {"in_channels": sizes.in_channels, "value_range": self.pipeline.config.value_range}
                self.images = on_all(accelerator, lambda: open_images(path, **how), in_turn=True)
        metrics = tuple(name for name, metric in metric_names(network.name).items() if metric.short in MEASURED)
        # No gradients are kept, so that the batch of the training has room for guidance's double one.
        self.evaluator = Evaluator(network, accelerator, metrics, max(8, self.batch_size))
        self.names = {EVAL.format(name=name) for name in metrics}

    def prepare(self) -> None:
        """Get the statistics of the reference, a file or images that are read once; `UserError` if it is unreadable."""
        if self.reference is None:
            read = self.evaluator.load_reference if isinstance(self.images, str) else self._statistics_of
            with renamed_settings(**NAMES):
                self.reference = read(self.images, self.img_size)

    def values(self) -> dict[str, float]:
        """Return the metrics by their keys in the log: `eval/<metric>` at the sheets' guidance, and `..._unguided`."""
        scale, images = self.pipeline.config.guidance_scale, self.num_images
        steps = self.evaluation.eval_num_inference_steps or self.settings.num_inference_steps
        batches = -(-images // (self.accelerator.num_processes * self.evaluator.batch_size))
        found: dict[float, dict[str, float]] = {}
        for guidance in dict.fromkeys((1.0, scale)):
            how = SamplerSettings(steps, guidance), self.seed
            looking = partial(self.stops.looking, steps * batches)
            found[guidance] = self.evaluator.measure_pipeline(
                self.pipeline, self.reference, images, *how, looking=looking
            )
        return {
            EVAL.format(name=name + ending): found[guidance][name]
            for guidance, ending in ((scale, ""), (1.0, UNGUIDED))
            for name in self.evaluator.metrics
        }

    def _statistics_of(self, source: Source, img_size: Size) -> ImageStatistics:
        """Return what an earlier start of this run measured, or measure it now."""
        network, path = self.evaluator.network, self.output_dir / REFERENCE_FILE
        follows_from = (source.fingerprint, img_size, network.name, network.weights_id)
        key = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()

        def remembered() -> ImageStatistics | None:
            try:
                with np.load(path, allow_pickle=False) as file:
                    is_same = json.loads(str(file["about"]))["source"] == key
                return read_reference(str(path), network) if is_same else None
            except Exception:  # whatever is broken about it, it is made again
                return None

        if found := on_main(self.accelerator, remembered):
            return found
        if self.accelerator.is_main_process:
            images = f"{source.num_images:,} images of {source.name}"
            say(f"Evaluation: looks at the {images} once, to compare with them ...")
        reference = replace(self.evaluator.load_reference(source, img_size), name=key)
        if self.accelerator.is_main_process:
            try:
                save_reference(path, reference)
            except UserError:
                warn(f"{path} cannot be written: the next start looks at the reference's images again.")
        return reference
