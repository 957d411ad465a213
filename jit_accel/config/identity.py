"""The identity of a run: its name, its folder, and the settings that make it another experiment on the same data."""

import hashlib
import json
import os
import re
from dataclasses import fields
from pathlib import Path

from jit_accel.base.console import redacted
from jit_accel.config.checks import image_size, model_name
from jit_accel.config.groups import DataConfig
from jit_accel.config.presets import in_pixels
from jit_accel.config.run_groups import EvalConfig, HealthConfig, HubConfig, TrackingConfig
from jit_accel.config.settings import Config

# Settings that leave the trained weights as they are.
WITHOUT_EFFECT = (
    *("output_dir", "resume", "dry_run", "num_workers", "max_bad_images", "compile", "gradient_checkpointing"),
    "init_from",  # the weights have left it behind
    *("save_every_steps", "keep_checkpoints", "log_every_steps", "val_every_steps", "val_images", "max_stall_minutes"),
    *("profile_steps", "average_snapshots"),
    *("sample_every_steps", "guidance_scale", "guidance_on", "method", "num_inference_steps"),
    *(field.name for group in (EvalConfig, HealthConfig, HubConfig, TrackingConfig) for field in fields(group)),
)
# What a run is called, and how long it is, which may be extended
NAMES = ("wandb_project", "wandb_entity", "wandb_name")
LENGTHS = ("epochs", "max_steps", "warmup_epochs", "warmup_steps")


def tells_apart(name: str) -> bool:
    """Return True for a setting that makes another run of the same data another experiment."""
    return name in NAMES or name not in (*WITHOUT_EFFECT, *LENGTHS)


def experiment_of(config: Config) -> str:
    """Return a fingerprint of the given settings that tell one experiment from another; open ones are not in it."""
    defaults = Config(DataConfig("")).flat()
    given = {name: value for name, value in config.recorded().items() if tells_apart(name) and value != defaults[name]}
    for name in {"data_path", "condition_path"} & given.keys():
        given[name] = os.path.normpath(given[name])
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def run_folder(config: Config) -> str:
    """Return the run's folder: as set, or `runs/` and the W&B name, or a name that every process makes alike.

    Each trial of a W&B sweep has one of its own, below a folder that is set.
    """
    folder, name = os.path.expanduser(config.run.output_dir or ""), run_name(config.tracking)
    sweep, trial = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep and trial:
        own = _as_folder(trial)
        if re.search(rf"(?<!\w){re.escape(own)}(?!\w)", os.path.basename(folder.rstrip("/"))):
            return folder
        return os.path.join(folder or f"runs/sweep-{_as_folder(sweep)}", own)
    if folder or name:
        return folder or f"runs/{_as_folder(name)}"
    return default_folder(config)


def run_name(tracking: TrackingConfig) -> str | None:
    """Return the name of the run: as set, or where W&B is used as WANDB_NAME says, which wandb itself would read."""
    return tracking.wandb_name or (os.environ.get("WANDB_NAME") if "wandb" in tracking.trackers else None) or None


def default_folder(config: Config) -> str:
    """Return the folder of a run without a name: made of data, model, size and seed."""
    data = redacted(config.data.data_path).rstrip("/").rpartition("/")[2].removeprefix("builtin:")
    if data in ("", ".", "..", "~"):
        data = Path(config.data.data_path).expanduser().resolve().name or "data"
    if model := model_name(config):
        trained = f"{model}-{in_pixels(image_size(config))}px"
    else:
        source = config.tune.init_from.rstrip("/").removesuffix("/pipeline").rpartition("/")[2]
        trained = f"from-{source}" + (f"-lora{config.tune.lora_rank}" if config.tune.lora_rank else "")
    name = _as_folder(f"{data}-{trained}-seed{config.run.seed}")
    return f"runs/{name.lstrip('-.')}"


def _as_folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".") or "run"


def is_named(config: Config) -> bool:
    """Return True where the settings leave no choice about the run's folder."""
    return bool(config.run.output_dir) or run_folder(config) != default_folder(config)


def in_folder(config: Config, folder: Path | str) -> Config:
    """Return the settings of a run in this folder."""
    return config.updated(output_dir=str(folder))
