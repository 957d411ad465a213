"""A run in words and numbers: for the terminal, the trackers and the model card."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from jit_accel import __version__
from jit_accel.base.console import warn
from jit_accel.base.devices import device_name
from jit_accel.base.redaction import redacted
from jit_accel.config.lengths import Plan
from jit_accel.data.formats.sources import Source

RECORD_FILE = "run.json"
RECORDED_PACKAGES = ("torch", "accelerate", "diffusers", "datasets", "numpy", "wandb")


def describe_data(source: Source) -> str:
    """Return a data set's name, size and classes in words."""
    classes = f"{source.num_classes or 'unknown number of'} classes" if source.is_labelled else "unlabelled"
    return f"{redacted(source.name)} ({source.num_images:,} images, {classes})"


def record_run(settings: dict, plan: Plan, network: torch.nn.Module, accelerator) -> dict:
    """Return all settings of a run, and what they run on."""
    return {
        **settings,
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


def write_record(record: dict, output_dir: Path) -> None:
    """Leave the record as `run.json`, for the report and for whoever looks at the folder later."""
    try:
        (output_dir / RECORD_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        warn(f"{output_dir / RECORD_FILE} cannot be written ({error.strerror}); the training does not need it.")


def git_commit() -> str | None:
    """Return the commit of the code, with `-dirty` behind it where files were changed; None where it is no checkout."""
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # not a copy inside another repository
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
