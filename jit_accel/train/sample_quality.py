"""The distance of a training's generated images from real ones, measured on the way by all processes together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError, message_of, renamed_settings
from jit_accel.base.processes import on_all, on_main
from jit_accel.base.sharding import reshard
from jit_accel.config.settings import EvalConfig
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.features import load_features
from jit_accel.evaluate.image_sets import images_of_source
from jit_accel.evaluate.settings import metric_names
from jit_accel.evaluate.statistics import ImageStatistics, read_reference, save_reference
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.monitor.log import iterate_metrics
from jit_accel.monitor.metric_table import EVAL, UNGUIDED
from jit_accel.train.averages import Ema

REFERENCE_FILE = "eval_reference.npz"
MEASURED = ("fd", "is")  # what sums alone give: no features of single images are kept in a training
# The training's names for the settings of the evaluation and of its reference.
NAMES = {
    "data_path": "eval_reference",
    "reference": "eval_reference",
    "features": "eval_features",
    "feature_weights": "eval_feature_weights",
}


class Unmeasured(Exception):
    """All processes know that the images could not be measured, and can go on without."""


class SampleQuality:
    """Measures images of a run's averaged weights, always from the same noise; all processes call it together.

    Args:
        pipeline: around the network without its wrapper; `averages` are those of its weights.
        source: the images of the training, which are the reference unless the settings name another.
        settings: what to measure.
        seed: of the noise.
        num_inference_steps: steps of the solver, where `settings` do not say otherwise.
        batch_size: images that a process makes at once.

    Raises:
        UserError: on all processes, where the feature network cannot be had.
    """

    def __init__(
        self,
        pipeline: JiTPipeline,
        averages: Ema,
        accelerator,
        source: Source,
        settings: EvalConfig,
        *,
        output_dir: Path,
        seed: int,
        num_inference_steps: int,
        batch_size: int,
    ):
        self.pipeline, self.averages, self.accelerator, self.source = pipeline, averages, accelerator, source
        self.output_dir, self.seed, self.path = output_dir, seed, settings.eval_reference
        self.num_images = settings.eval_images
        self.num_inference_steps = settings.eval_num_inference_steps or num_inference_steps
        self.img_size = pipeline.transformer.config.img_size
        with renamed_settings(**NAMES):
            features = on_all(
                accelerator,
                lambda: load_features(settings.eval_features, accelerator.device, settings.eval_feature_weights),
                in_turn=True,  # the first one fetches weights that are not there yet
            )
        metrics = tuple(name for name, metric in metric_names(features.name).items() if metric.short in MEASURED)
        # No gradients are kept, so that the batch of the training has room for guidance's double one.
        self.evaluator = Evaluator(features, accelerator, metrics, max(8, batch_size))
        self.reference: ImageStatistics | None = None
        if self.path is not None:
            self._open_reference(self.path)

    def _open_reference(self, path: str) -> None:
        """Find at once, also in a dry run, what is wrong with `--eval_reference`; images are read in `prepare`."""
        with renamed_settings(**NAMES):
            if path.endswith(".npz"):
                network = self.evaluator.network
                self.reference = on_all(self.accelerator, lambda: read_reference(path, network))
            else:
                self.source = on_all(self.accelerator, lambda: open_images(path), in_turn=True)

    @property
    def keys(self) -> list[str]:
        """Names of the values in the log."""
        return [EVAL.format(name=name + ending) for ending in ("", UNGUIDED) for name in self.evaluator.metrics]

    def is_lacking(self, step: int) -> bool:
        """Return True where the log has this step, but without the values; the main process looks."""

        def look() -> bool:
            row = next((row for row in iterate_metrics(self.output_dir) if row["step"] == step), None)
            return row is not None and not any(key in row for key in self.keys)

        return on_main(self.accelerator, look)

    def prepare(self) -> None:
        """Get the reference's statistics: from a file, or of images, which are read once and remembered.

        Raises:
            UserError: on all processes, whatever is wrong with it.
        """
        path = self.path
        if self.reference is not None:
            return
        with renamed_settings(**NAMES):
            if path and path.endswith(".npz"):  # of images
                self.reference = self.evaluator.load_reference(path, self.img_size)
            else:
                self.reference = self._remembered(self.source) or self._measured(self.source)

    def measure(self) -> dict[str, float]:
        """Return the metrics by their keys in the log: `eval/<metric>` with the samples' guidance, and `..._unguided`.

        Raises:
            Unmeasured: on all processes, whatever one of them raised.
        """
        # With FSDP's shards an error inside the network is one process's alone: it must end, as in a training step.
        survived = UserError if self.evaluator.is_sharded else Exception
        try:
            return self._measured_values()
        except survived as error:
            raise Unmeasured(message_of(error)) from error

    def _measured_values(self) -> dict[str, float]:
        scale = self.pipeline.config.guidance_scale
        found: dict[float, dict[str, float]] = {}
        with self.averages.applied():
            try:
                for guidance in dict.fromkeys((1.0, scale)):
                    settings = SamplerSettings(self.num_inference_steps, guidance)
                    found[guidance] = self.evaluator.measure_pipeline(
                        self.pipeline, self.reference, self.num_images, settings, self.seed
                    )
            finally:
                reshard(self.pipeline.transformer)  # the gathered weights are the average's
        return {
            EVAL.format(name=name + ending): found[guidance][name]
            for guidance, ending in ((scale, ""), (1.0, UNGUIDED))
            for name in self.evaluator.metrics
        }

    def _fingerprint(self, source: Source) -> str:
        """Return a hash of everything that the statistics follow from."""
        network = self.evaluator.network
        parts = (source.fingerprint, self.img_size, network.name, network.weights_id)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _remembered(self, source: Source) -> ImageStatistics | None:
        """Return what an earlier start of this run measured, if it did; the main process alone compares with it."""
        path, key = self.output_dir / REFERENCE_FILE, self._fingerprint(source)
        found = None
        if self.accelerator.is_main_process and is_of(path, key):
            try:
                found = read_reference(str(path), self.evaluator.network)
            except UserError:  # a broken file is made again
                found = None
        is_there = on_main(self.accelerator, lambda: found is not None)
        network = self.evaluator.network
        return (found or ImageStatistics(network.name, network.weights_id, {})) if is_there else None

    def _measured(self, source: Source) -> ImageStatistics:
        if self.accelerator.is_main_process:
            count = "" if source.num_images is None else f"{source.num_images:,} "
            say(f"Evaluation: looks at the {count}images of {source.name} once, to compare with them ...")
        images = images_of_source(source)
        statistics = self.evaluator.statistics_of_images(images, self.img_size, "reference")
        reference = replace(statistics, name=self._fingerprint(source))
        if self.accelerator.is_main_process:
            path = self.output_dir / REFERENCE_FILE
            try:
                save_reference(path, reference)
            except UserError:
                warn(f"{path} cannot be written: the next start looks at the reference's images again.")
        return reference


def is_of(path: Path, key: str) -> bool:
    """Return True where a file of statistics is there and was made under this name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["about"]))["source"] == key
    except Exception:  # whatever is broken about it, it is made again
        return False
