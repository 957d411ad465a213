"""The results of a run: its record in words and numbers, loss curve, diffusers pipeline folder, adapter."""

import filecmp
import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pandas
import torch
from safetensors import SafetensorError

from jit_accel import __version__
from jit_accel.base.console import redacted, warn
from jit_accel.base.devices import device_name
from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_folder, check_guard, write_json
from jit_accel.base.processes import on_main, whole_tensors
from jit_accel.config.facts import Plan
from jit_accel.config.settings import write_config
from jit_accel.data.formats.sources import Source
from jit_accel.model.call_arguments import DEFAULTS
from jit_accel.model.card import CARD_FILE, CARD_PICTURE, training_card
from jit_accel.model.loading import PIPELINE_FOLDER
from jit_accel.model.lora import merged
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.monitor.log import REPORT_FILE, iterate_metrics
from jit_accel.monitor.metric_table import TRAIN_LOSS
from jit_accel.train.averages import Ema
from jit_accel.train.initial_weights import Tuning

RECORD_FILE, CURVE_FILE, LORA_FOLDER = "run.json", "loss_curve.png", "lora"
RECORDED_PACKAGES = ("torch", "accelerate", "diffusers", "datasets", "numpy", "wandb")


def describe_data(source: Source) -> str:
    """Return a data set's name, size, classes and columns of numbers in words."""
    classes = f"{source.num_classes or 'unknown number of'} classes" if source.is_labelled else "unlabelled"
    numbers = f", with {', '.join(source.vectors.names)}" if source.vectors else ""
    pairs = "images with conditions" if source.condition_channels else "images"
    return f"{redacted(source.name)} ({source.num_images:,} {pairs}, {classes}{numbers})"


def record_run(facts: dict, plan: Plan, network: torch.nn.Module, accelerator) -> dict:
    """Return all settings of a run, and what they run on."""
    return {
        **facts["settings"],
        "experiment": facts["experiment"],
        "global_batch_size": plan.global_batch_size,
        "total_steps": plan.total_steps,
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "num_images": plan.num_images,
        "num_processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "distributed_type": accelerator.distributed_type.value,
        "jit_accel_version": __version__,
        "git_commit": git_commit(),
        "python_version": platform.python_version(),
        **{f"{name}_version": _version(name) for name in RECORDED_PACKAGES},
    }


def read_record(output_dir: Path) -> dict:
    """Return the record of the run in a folder; an empty one where there is none that can be read."""
    try:
        record = json.loads((output_dir / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(record: dict, settings: dict, output_dir: Path) -> None:
    """Leave the record as `run.json`, for whoever looks at the folder later, and the settings for `--config`."""
    try:
        write_config(settings, output_dir / "config.yaml")
        write_json(output_dir / RECORD_FILE, record)
    except OSError as error:
        warn(f"{output_dir / RECORD_FILE} cannot be written ({error.strerror}); the training does not need it.")


def git_commit() -> str | None:
    """Return the commit of the code, with `-dirty` behind it where files were changed; None where it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a copy inside another repository
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_results(
    output_dir: Path, sheet: Path, pipeline: JiTPipeline, averages: Ema, tuning: Tuning, record: dict, accelerator
) -> None:
    """Write loss curve, pipeline folder (safetensors only) and adapter of a finished run, all processes together.

    sheet: its last samples, for the model card. record: its settings and facts, on the main process. Raises `UserError`
    on all processes, where the disk does not take them.
    """
    is_main, adapter = accelerator.is_main_process, tuning.adapter
    trained = whole_tensors(averages.first, keep=is_main)
    frozen = whole_tensors(pipeline.transformer.state_dict(), keep=is_main) if adapter else {}

    def write() -> None:
        check_guard(output_dir)
        try:
            if adapter and not adapter.added:  # alone it would be of no use
                adapter.save(trained, output_dir / LORA_FOLDER)
            draw_loss_curve(output_dir)
            network = type(pipeline.transformer).from_config(pipeline.transformer.config)
            network.load_state_dict(merged(frozen, trained, adapter.scale) if adapter else trained, strict=True)
            settings = {name: pipeline.config[name] for name in ("class_names", "vectors", *DEFAULTS)}
            with atomic_folder(output_dir / PIPELINE_FOLDER) as folder:
                JiTPipeline(network, pipeline.scheduler, **settings).save_pretrained(folder, safe_serialization=True)
                shutil.copy(sheet, folder / CARD_PICTURE)
                (folder / CARD_FILE).write_text(training_card(pipeline, record, averages.name), encoding="utf-8")
        except (OSError, SafetensorError) as problem:
            rule = f"cannot be written to ({problem}). The training is complete and its last checkpoint is saved:"
            remedy = "make room, and the same command with --resume auto writes the rest."
            raise UserError(rule, about="output_dir", value=output_dir, remedy=remedy) from None

    on_main(accelerator, write)


def is_exported(output_dir: Path, sheet: Path) -> bool:
    """Return True where the run's folder has a whole pipeline folder, exported together with this sheet of samples."""
    copy = output_dir / PIPELINE_FOLDER / CARD_PICTURE
    return sheet.exists() and copy.exists() and filecmp.cmp(copy, sheet, shallow=False)


def places_of(output_dir: Path, sheet: Path, *, has_report: bool) -> str:
    """Return the names and paths of what a finished run leaves, one a line."""
    places = {"Samples": sheet, "Loss curve": output_dir / CURVE_FILE, "Pipeline": output_dir / PIPELINE_FOLDER}
    places |= {"Report": output_dir / REPORT_FILE} if has_report else {}
    return "\n".join(f"{name + ':':<12}{path}" for name, path in places.items())


def draw_loss_curve(output_dir: Path) -> None:
    """Plot `train/loss` over the steps, raw and smoothed, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in iterate_metrics(output_dir) if isinstance(row.get(TRAIN_LOSS), float)]
    losses = pandas.Series({row["step"]: row[TRAIN_LOSS] for row in rows})
    memory = max(1.0, 0.02 * len(losses))  # a running mean over a fiftieth of the curve
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses.index, losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(losses.index, losses.ewm(alpha=1 / memory).mean(), color="#08519c", linewidth=1.8, label="smoothed")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title=TRAIN_LOSS)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(output_dir / CURVE_FILE, dpi=150)
