"""`jit_accel.evaluate` with several settings: the sweep on all processes, its files, and the pipeline's new default."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from jit_accel.base.console import say
from jit_accel.base.errors import UserError
from jit_accel.base.processes import on_all, on_main
from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.grid import Axes, Setting, averages, grid
from jit_accel.evaluate.names import is_better_higher
from jit_accel.evaluate.place import checkpoint_at, pipeline_folder_of
from jit_accel.evaluate.records import FILE, add_records, read_records, without_stamp
from jit_accel.evaluate.reference import Reference
from jit_accel.evaluate.settings import EvaluateConfig, axes_of, selected_metric
from jit_accel.evaluate.sweep import LOG_FILE, Measured, Outcome, SweepLog, sweep
from jit_accel.evaluate.sweep_files import as_markdown, verdict, write_sweep_files
from jit_accel.evaluate.winner import show_on_card, write_winner
from jit_accel.model.checkpoints import MANIFEST, STATE
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.loading import averages_of
from jit_accel.model.lora import identity_of
from jit_accel.model.pipeline import STEPS, JiTPipeline

SWEEP_FOLDER = "sweep"
Opened = Callable[[str | None], JiTPipeline]


def run_sweep(
    config: EvaluateConfig,
    weights: str,
    evaluator: Evaluator,
    open_pipeline: Opened,
    reference: Reference,
    about: dict,
    file: Path | None,
) -> None:
    """Measure the grid, write its files beside `file`, and the winner into the pipeline folder.

    Args:
        weights: what `weights_of` found for `--model`.
        open_pipeline: the pipeline with these averaged weights, on the device; None: as it is.
        about: what all records of this evaluation share.
        file: where the records of what was measured on all images are added.

    Raises:
        UserError: on all processes.
    """
    accelerator = evaluator.accelerator
    pipelines = Pipelines(open_pipeline, accelerator)
    settings, model_identity = open_grid(config, weights, pipelines)
    select, every_metric = selected_metric(config), evaluator.metrics
    if select not in every_metric:
        raise UserError(
            f"cannot be measured here; choose from {', '.join(every_metric)}.", about="select", value=select
        )
    sweep_images = config.sweep_images or max(2, config.num_images // 10)
    folder = (file.parent if file else Path()) / SWEEP_FOLDER
    context = {
        **{key: about[key] for key in ("features", "feature_weights", "img_size", "mixed_precision", "seed")},
        "metrics": list(every_metric),
        "max_features": config.max_features,
        "reference": identity_of_reference(reference),
        "model": model_identity,
    }
    log = SweepLog(folder / LOG_FILE, context)
    is_main = accelerator.is_main_process
    done = on_main(accelerator, lambda: writing(folder, log.read))
    if is_main:
        known = f"; {len(done)} measurements are there already" if done else ""
        say(f"Sweep:     {len(settings)} settings by {select} → {folder}{known}")

    def wanted(count: int) -> tuple[str, ...]:
        # What compares images one by one takes its time: of few images only what decides.
        return every_metric if count == config.num_images else (select,)

    def measure(setting: Setting, count: int) -> dict[str, float]:
        evaluator.metrics = wanted(count)
        return evaluator.measure_pipeline(
            pipelines.get(setting.ema), reference, count, sampler(setting), config.seed, about["img_size"]
        )

    outcome = sweep(
        settings,
        measure,
        sweep_images=sweep_images,
        num_images=config.num_images,
        top=config.sweep_top,
        select=select,
        higher_is_better=is_better_higher(select),
        done=done,
        keep=lambda one: on_main(accelerator, lambda: writing(folder, lambda: log.add(one))),
        wanted=wanted,
        tell=say if is_main else lambda line: None,
    )
    pipelines.close()
    on_main(accelerator, lambda: leave(config, weights, outcome, folder, about, file))


def open_grid(config: EvaluateConfig, weights: str, pipelines: Pipelines) -> tuple[list[Setting], str]:
    """The settings to measure, and what tells these weights from others."""
    accelerator, axes = pipelines.accelerator, axes_of(config)
    emas = on_all(accelerator, lambda: emas_of(config.model, weights, axes))
    first = pipelines.get(emas[0])
    identity = on_main(accelerator, lambda: identity_of_model(weights, emas, first))
    return settings_of(config, axes, emas, first), identity


def emas_of(model: str, weights: str, axes: Axes) -> list[str | None]:
    """The averages to measure, by their names in the checkpoint; [None] for the weights of a pipeline folder.

    Raises:
        UserError: there is no such average, or no checkpoint that has any.
    """
    checkpoint = checkpoint_at(weights)
    if not axes.emas:
        return [None] if checkpoint is None else averages_of(checkpoint)[:1]
    if checkpoint is None:
        raise UserError(
            f"{model} has no checkpoint to take averages from: give the output "
            "folder of a run, or leave the flag out to use the weights of the pipeline folder.",
            about="ema",
            value=f"{','.join(axes.emas)}",
        )
    return averages("ema", axes.emas, averages_of(checkpoint))


def settings_of(config: EvaluateConfig, axes: Axes, emas: list[str | None], pipeline: JiTPipeline) -> list[Setting]:
    """The grid; what no flag names is the pipeline's own."""
    own = pipeline.config
    return grid(
        emas,
        axes.guidance_scales or [float(own.guidance_scale)],
        axes.guidance_intervals or [tuple(map(float, own.guidance_interval))],
        axes.num_inference_steps or [own.num_inference_steps or STEPS],
        axes.methods or [own.method or pipeline.scheduler.config.solver],
        with_unguided=config.unguided,
    )


class Pipelines:
    """The pipeline with one average at a time, loaded when it is first asked for; by all processes alike."""

    def __init__(self, open_pipeline: Opened, accelerator):
        self.open_pipeline, self.accelerator = open_pipeline, accelerator
        self.ema: str | None = None
        self.pipeline: JiTPipeline | None = None

    def get(self, ema: str | None) -> JiTPipeline:
        if self.pipeline is None or ema != self.ema:
            self.close()
            self.pipeline = on_all(self.accelerator, lambda: self.open_pipeline(ema), in_turn=True)
            self.ema = ema
        return self.pipeline

    def close(self) -> None:
        self.pipeline = None
        gc.collect()  # its memory, before another is loaded


def sampler(setting: Setting) -> SamplerSettings:
    return SamplerSettings(
        setting.num_inference_steps, setting.guidance_scale, setting.guidance_interval, setting.method
    )


def leave(config: EvaluateConfig, weights: str, outcome: Outcome, folder: Path, about: dict, file: Path | None) -> None:
    """Write and say what was found; on the main process."""
    records = [record_of(one, about) for one in outcome.full]
    paths = writing(folder, lambda: write_sweep_files(outcome, folder, about))
    say(as_markdown(outcome))
    say(verdict(outcome))
    say("Sweep:     " + ", ".join(map(str, paths)))
    add_new_records(records, file)
    if not config.write_best:
        return
    checkpoint, pipeline_folder = checkpoint_at(weights), pipeline_folder_of(config.model, weights)
    if pipeline_folder is None:
        what = "has no pipeline folder here" if checkpoint is None else "is not the newest checkpoint of its run"
        say(f"Pipeline:  {config.model} {what}, so nothing is written: the defaults and weights stay as they are.")
        return
    say(writing(pipeline_folder, lambda: write_winner(checkpoint, pipeline_folder, outcome)))
    if file is None or (pipeline_folder / FILE).resolve() != file.resolve():  # the model card reads it there
        best = {outcome.best.setting, outcome.best_unguided and outcome.best_unguided.setting}
        shown = [record for record, one in zip(records, outcome.full) if one.setting in best]
        add_new_records(shown, pipeline_folder / FILE)
    show_on_card(pipeline_folder)


def add_new_records(records: list[dict], file: Path | None) -> None:
    """Add those that are not there yet: a sweep that goes on, or is run again, leaves each once."""
    known = [without_stamp(record) for record in read_records(file)]
    add_records([record for record in records if json.loads(json.dumps(record)) not in known], file)


def record_of(one: Measured, about: dict) -> dict:
    """In the form of an evaluation of one setting."""
    return {**about, **one.setting.plain(), "num_images": one.num_images, "metrics": one.values}


def identity_of_model(weights: str, emas: list[str | None], pipeline: JiTPipeline) -> str:
    """Tells weights apart: of a checkpoint by what seals it, of a pipeline by its tensors; and how they are sampled."""
    digest = hashlib.sha256(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    checkpoint = checkpoint_at(weights)
    if emas == [None] or checkpoint is None:
        digest.update(str(identity_of(pipeline.transformer.state_dict())).encode())
    else:
        for name in (MANIFEST, STATE):
            digest.update((checkpoint / name).read_bytes())
    return digest.hexdigest()[:16]


def identity_of_reference(reference: Reference) -> str:
    """A file of statistics by its content, images by where they are, how many, and what else tells data sets apart."""
    path = Path(reference.name).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return f"{reference.name} ({reference.num_images}, {reference.img_size} px) {reference.fingerprint}".rstrip()


def writing(folder: Path, write: Callable):
    """`write()`, whose failure is the user's to mend; what was measured before is kept.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        return write()
    except OSError as error:
        raise UserError(
            f"cannot be written or read ({error.strerror or error}): make room or give --output in "
            "another folder; the same command goes on where it stopped.",
            about="output",
            value=folder,
        ) from None
