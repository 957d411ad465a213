"""The model that is measured: its weights, its averages, and where results on it go."""

import gc
import hashlib
import json
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from jit_accel.base.processes import on_all, on_main
from jit_accel.evaluate.grid import Setting, averages, axes_of, grid
from jit_accel.evaluate.settings import EvaluateConfig
from jit_accel.model.checkpoints import MANIFEST, STATE, is_complete
from jit_accel.model.loading import averages_of, find_checkpoint_in, find_pipeline_in, load_pipeline
from jit_accel.model.lora import weights_fingerprint
from jit_accel.model.pipeline import STEPS, JiTPipeline


class Candidate:
    """The model that `--model` names now: a training that goes on makes others. All processes call it together.

    weights: a pipeline folder, a checkpoint, or an id of the Hub. checkpoint: the same where it is a checkpoint. emas:
    the averages to measure, by their names in the checkpoint; [None] for the weights of a pipeline folder. Raises
    `UserError` on all processes where there is no such model or average.
    """

    def __init__(self, config: EvaluateConfig, accelerator):
        self.config, self.accelerator, self.axes = config, accelerator, axes_of(config)
        self.weights = on_main(accelerator, lambda: weights_of(config.model, wants_average=bool(self.axes["ema"])))
        folder = Path(self.weights).expanduser()
        self.checkpoint = folder if is_complete(folder) else None
        self.emas = on_all(accelerator, self._find_emas)
        self._ema: str | None = None
        self._pipeline: JiTPipeline | None = None

    def _find_emas(self) -> list[str | None]:
        names = self.axes["ema"]
        if self.checkpoint is None:
            return names or [None]  # `load_pipeline` refuses names
        available = averages_of(self.checkpoint)
        return averages("ema", names, available) if names else available[:1]

    def pipeline(self, ema: str | None) -> JiTPipeline:
        """Return the pipeline with these averaged weights on the device; one of them is loaded at a time."""
        if self._pipeline is None or ema != self._ema:
            self.close()
            self._pipeline = on_all(self.accelerator, lambda: self._load(ema), in_turn=True)
            self._ema = ema
        return self._pipeline

    def _load(self, ema: str | None) -> JiTPipeline:
        diffusers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()
        pipeline = load_pipeline(self.weights, ema).to(self.accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        if self.config.compile:
            pipeline.transformer.compile_repeated_blocks()
        return pipeline

    def close(self) -> None:
        """Give the pipeline's memory back."""
        self._pipeline = None
        gc.collect()

    def settings(self) -> list[Setting]:
        """Return the settings to measure; without flags they are the pipeline's own."""
        pipeline = self.pipeline(self.emas[0])
        own = {
            "ema": self.emas,
            "guidance_scale": [float(pipeline.config.guidance_scale)],
            "guidance_interval": [tuple(map(float, pipeline.config.guidance_interval))],
            "num_inference_steps": [pipeline.config.num_inference_steps or STEPS],
            "method": [pipeline.config.method or pipeline.scheduler.config.solver],
        }
        given = {name: values for name, values in self.axes.items() if values and name != "ema"}
        return grid(**{**own, **given}, with_unguided=self.config.unguided)

    def fingerprint(self) -> str:
        """Return a hash of the weights, by a checkpoint's seal or a pipeline's tensors, and of the scheduler."""
        pipeline = self.pipeline(self.emas[0])
        digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
        if self.checkpoint is None:
            digest.update(str(weights_fingerprint(pipeline.transformer.state_dict())).encode())
        else:
            for name in (MANIFEST, STATE):
                digest.update((self.checkpoint / name).read_bytes())
        return digest.hexdigest()[:16]


def weights_of(model: str, wants_average: bool) -> str:
    """Return what `--model` stands for: a pipeline folder, a checkpoint, or, where it is neither, itself.

    `wants_average`: of a run the averages of its newest checkpoint are asked for.
    """
    folder = Path(model).expanduser()
    exported = None if wants_average else find_pipeline_in(folder)
    return str(exported or find_checkpoint_in(folder) or model)


def run_folder_of(folder: Path) -> Path:
    """Return the folder of the run that owns this checkpoint, which is sealed; any other folder itself."""
    place = folder.resolve()
    return folder.parent.parent if folder.parent.name == place.parent.name == "checkpoints" else folder
