"""The files and folders that a conversion writes, whole or not at all: `.pth`, `.safetensors`, pipeline folder."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, atomic_folder, disk_error
from jit_accel.convert.settings import FOLDER
from jit_accel.convert.sizes import model_name, position_table, to_arguments
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.defaults import DEFAULTS
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel

PREFIX = "net."  # the reference's Denoiser holds the network under this name


@dataclass
class Converted:
    """The weights that are to be written, by the network's parameter names and in the type to write.

    config: of the network. settings: of the sampling, as `sizes.sampling_settings` gives them.
    """

    weights: dict[str, Tensor]
    config: dict
    settings: dict
    set_name: str
    epoch: int | None = None


def check_target(target: Path, kind: str, source: Path | None, overwrite: bool) -> None:
    """Raise `UserError` for a target that exists, is of another kind, or is the source or holds it."""
    try:
        is_there, is_folder = target.exists(), target.is_dir()
    except OSError as error:  # a name that is too long, say
        raise disk_error(error, "output", target) from None
    source = source and source.resolve()
    is_pipeline = (target / INDEX_FILE).is_file()
    problem = None
    if source and (target == source or target in source.parents):
        problem = f"is, or holds, what is converted ({source}): give another place."
    elif source and source in target.parents and (source / INDEX_FILE).exists():
        problem = "lies inside the pipeline that is converted: give another place."
    elif is_there and is_folder != (kind == FOLDER):
        problem = f"is {'a folder' if is_folder else 'a file'}: give another name."
    elif is_folder and not is_pipeline and any(target.iterdir()):
        problem = "is a folder that holds other things than a pipeline: give another name."
    elif is_there and not overwrite and (is_pipeline or not is_folder):
        problem = "is there already: add --overwrite to replace it, or give another name."
    if problem:
        raise UserError(problem, about="output", value=target)


@contextlib.contextmanager
def written_whole(target: Path, kind: str) -> Iterator[Path]:
    """Give a path beside `target` to write to, which takes its place at the end; nothing is left where that fails.

    Raises `UserError`: the disk does not take it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (atomic_folder if kind == FOLDER else atomic_file)(target) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise disk_error(error, "output", target) from None


def write_pth(result: Converted, path: Path) -> None:
    """Write a checkpoint for the reference's code: its `model`, `model_ema1` and `model_ema2` are all these weights.

    `args` is a dictionary of plain values, so that `torch.load(weights_only=True)` reads the file.
    """
    arguments = to_arguments({**result.config, **result.settings, "model": model_name(result.config)})
    sets = dict.fromkeys(("model", "model_ema1", "model_ema2"), reference_names(result))  # stored once
    try:
        torch.save({**sets, "epoch": result.epoch or 0, "args": plain_values(arguments)}, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(str(error)) from error


def write_safetensors(result: Converted, path: Path) -> None:
    """Write one file with the reference's names; sizes and settings are JSON in its metadata."""
    config, settings = (json.dumps(plain_values(values)) for values in (result.config, result.settings))
    metadata = {"format": "pt", "weights": result.set_name, "config": config, "pipeline": settings}
    save_file(reference_names(result), path, metadata=metadata)


def build(result: Converted) -> JiTPipeline:
    """Return the pipeline of these weights, which are not copied."""
    settings = result.settings
    with torch.device("meta"):
        network = JiTTransformer2DModel(**result.config)
    network.load_state_dict(result.weights, strict=True, assign=True)
    scheduler = JiTScheduler(*(settings[name] for name in ("prediction", "t_eps", "noise_scale", "solver")))
    return JiTPipeline(network.eval(), scheduler, **{name: settings[name] for name in ("class_names", *DEFAULTS)})


def reference_names(result: Converted) -> dict[str, Tensor]:
    """Return the weights and the fixed table as the reference's state dict, each with a storage of its own."""
    dtype = next(iter(result.weights.values())).dtype
    table = position_table(result.config).to(dtype).clone()
    return {PREFIX + name: _alone(tensor) for name, tensor in {"pos_embed": table, **result.weights}.items()}


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous, and no view of something larger, which would be saved whole."""
    tensor = tensor.contiguous()
    is_all = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_all else tensor.clone()


def plain_values(values: Mapping) -> dict:
    """Return values as JSON and `weights_only` take them: without absent ones, tuples as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
    }
