"""What a conversion writes, whole or not at all: a `.pth`, a `.safetensors` file, a pipeline folder."""

from __future__ import annotations

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
from jit_accel.convert.sizes import model_name, position_table
from jit_accel.convert.stated import to_arguments
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.defaults import DEFAULTS
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel

PREFIX = "net."  # the reference's Denoiser holds the network under this name


@dataclass
class Result:
    """What is to be written.

    Attributes:
        weights: by the network's parameter names, in the type to write.
        config: of the network.
        settings: of the sampling, as `sizes.sampling_settings` gives them.
    """

    weights: dict[str, Tensor]
    config: dict
    settings: dict
    set_name: str
    epoch: int | None = None


def check_target(target: Path, kind: str, source: Path | None, overwrite: bool) -> None:
    """Refuse a target that would lose something.

    Raises:
        UserError: it exists, is of another kind, or is the source or holds it.
    """
    try:
        target.exists()
    except OSError as error:  # a name that is too long, say
        raise UserError(
            f"cannot be written ({error.strerror}): give another place.", about="output", value=target
        ) from None
    if source is not None:
        source = source.resolve()
        if target == source or target in source.parents:
            raise UserError(
                f"is, or holds, what is converted ({source}): give another place.", about="output", value=target
            )
        if source in target.parents and source.is_dir() and (source / INDEX_FILE).exists():
            raise UserError(
                "lies inside the pipeline that is converted: give another place.", about="output", value=target
            )
    if not target.exists():
        return
    if target.is_dir() != (kind == FOLDER):
        raise UserError(
            f"is {'a folder' if target.is_dir() else 'a file'}: give another name.", about="output", value=target
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.is_dir() and not (target / INDEX_FILE).is_file():
        raise UserError(
            "is a folder that holds other things than a pipeline: give another name.", about="output", value=target
        )
    if not overwrite:
        raise UserError(
            "is there already: add --overwrite to replace it, or give another name.", about="output", value=target
        )


@contextlib.contextmanager
def written_whole(target: Path, kind: str) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its place at the end; nothing is left where that fails.

    Raises:
        UserError: the disk does not take it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (atomic_folder if kind == FOLDER else atomic_file)(target) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise disk_error(error, "output", target) from None


def write_pth(result: Result, path: Path) -> None:
    """A checkpoint for the reference's code, which reads `model`, `model_ema1` and `model_ema2`: all three are these.

    `args` is a dictionary of plain values, so that `torch.load(weights_only=True)` reads the file.
    """
    weights = reference_names(result)
    arguments = to_arguments({**result.config, **result.settings, "model": model_name(result.config)})
    sets = dict.fromkeys(("model", "model_ema1", "model_ema2"), weights)  # stored once
    content = {**sets, "epoch": 0 if result.epoch is None else result.epoch, "args": _plain(arguments)}
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(str(error)) from error


def write_safetensors(result: Result, path: Path) -> None:
    """One file with the reference's names; sizes and settings are JSON in its metadata."""
    metadata = {"format": "pt", "weights": result.set_name}
    metadata |= {"config": json.dumps(_plain(result.config)), "pipeline": json.dumps(_plain(result.settings))}
    save_file(reference_names(result), path, metadata=metadata)


def write_folder(result: Result, folder: Path) -> JiTPipeline:
    """A pipeline folder, without a model card."""
    pipeline = build(result)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline


def build(result: Result) -> JiTPipeline:
    """The pipeline of these weights, which are not copied."""
    settings = result.settings
    with torch.device("meta"):
        network = JiTTransformer2DModel(**result.config)
    network.load_state_dict(result.weights, strict=True, assign=True)
    scheduler = JiTScheduler(
        prediction_type=settings["prediction"],
        t_eps=settings["t_eps"],
        noise_scale=settings["noise_scale"],
        solver=settings["solver"],
    )
    sampling = {name: settings[name] for name in ("class_names", *DEFAULTS)}
    return JiTPipeline(network.eval(), scheduler, **sampling)


def reference_names(result: Result) -> dict[str, Tensor]:
    """The weights, each with a storage of its own, and the fixed table, as the reference's state dict has them."""
    dtype = next(iter(result.weights.values())).dtype
    table = position_table(result.config).to(dtype).clone()
    own = {name: _alone(tensor) for name, tensor in {"pos_embed": table, **result.weights}.items()}
    return {PREFIX + name: tensor for name, tensor in own.items()}


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, and no view of something larger, which would be saved whole."""
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _plain(values: Mapping) -> dict:
    """Without absent values, tuples as lists: what JSON and `weights_only` take."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
    }
