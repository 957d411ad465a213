"""What `--input` may be, and what each kind tells: weights, sizes, settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jit_accel.base.errors import UserError, nearest
from jit_accel.config.settings import UNAVERAGED
from jit_accel.convert.pickles import read_pickle
from jit_accel.convert.stated import from_arguments, from_pipeline, from_record
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.loading import averages_of, find_checkpoint_in, load_folder, load_pipeline, pipeline_of_checkpoint
from jit_accel.model.pipeline import JiTPipeline

# The keys of the paper's checkpoints, and what they are called here; its decays.
REFERENCE_SETS = {"model": UNAVERAGED, "model_ema1": "ema1", "model_ema2": "ema2", "state_dict": UNAVERAGED}
REFERENCE_DECAYS = {"ema1": "0.9999", "ema2": "0.9996"}
# Parts of names that wrappers have put in: the reference's Denoiser, DDP, torch.compile.
WRAPPERS = {"net", "module", "_orig_mod"}
TELLTALE = "x_embedder.proj1.weight"
POSITIONS = "pos_embed"
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


@dataclass
class Source:
    """Opened weights, one set of them.

    Attributes:
        path: the file or folder itself (of a run, its pipeline or checkpoint), None for the Hub.
        weights: by the network's parameter names.
        set_name: which weights these are, in words.
        stated: sizes and settings that the source itself names; they may be wrong where others wrote it.
        positions: the fixed position table, where the weights hold one.
        facts: further facts for the model card.
    """

    path: Path | None
    weights: dict[str, Tensor]
    set_name: str
    stated: dict
    positions: Tensor | None = None
    epoch: int | None = None
    facts: dict[str, object] = field(default_factory=dict)


def open_source(place: str, wanted: str | None) -> Source:
    """Open what `--input` names.

    Args:
        wanted: `--weights`; None takes ema1, or the only set there is.

    Raises:
        UserError: nothing is there, it is refused or broken, or has no such weights.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return open_tensors(path, wanted) if is_safetensors(path) else open_checkpoint(path, wanted)
    if path.exists() and not path.is_dir():
        raise UserError("is neither a file nor a folder.", about="input", value=place)
    if not path.exists() and (path.suffix.lower() in FILE_SUFFIXES or place.count("/") != 1):
        raise UserError(
            "there is no such file or folder: give a checkpoint (.pth), a .safetensors file, a "
            "pipeline folder, the output folder of a run, or owner/name of the Hub.",
            about="input",
            value=place,
        )
    return open_pipeline(place, path, wanted)


def is_safetensors(path: Path) -> bool:
    """By content, where the name does not tell: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"


def open_checkpoint(path: Path, wanted: str | None) -> Source:
    """A `.pth` of the reference, or any plain state dict of its names."""
    content = read_pickle(path)
    if isinstance(content, Mapping) and is_state_dict(content):
        content = {UNAVERAGED: content}
    sets = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Mapping) and is_state_dict(value):
                sets.setdefault(REFERENCE_SETS.get(key, str(key)), value)
    if not sets:
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(
            f"holds no weights of a JiT (found {found or 'nothing'}; looked for {TELLTALE}, with or "
            "without net. before it).",
            about="input",
            value=path,
        )
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = arguments if isinstance(arguments, Mapping) else {}
    decays = {name: str(arguments.get(f"ema_decay{name[3:]}", decay)) for name, decay in REFERENCE_DECAYS.items()}
    name = choose(path, sets, wanted, {decay: name for name, decay in decays.items()})
    weights, positions = plain_names(path, sets[name])
    if positions is None:  # the table is the same for all sets
        positions = next((table for other in sets.values() if (table := plain_names(path, other)[1]) is not None), None)
    epoch = content.get("epoch")
    epoch = epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None
    set_name = f"{name} (decay {decays[name]})" if name in decays else name
    facts = {"epochs trained": epoch + 1} if epoch is not None and "optimizer" in content else {}
    return Source(path, weights, set_name, from_arguments(arguments), positions, epoch, facts)


def choose(path: Path, sets: Mapping, wanted: str | None, by_decay: Mapping[str, str]) -> str:
    """The key in `sets` that `--weights` means."""
    if wanted is not None:
        wanted = by_decay.get(wanted, wanted)
        if wanted not in sets:
            raise UserError(
                f"{path} has no such weights, but {', '.join(sets)}.{nearest(wanted, sets)}",
                about="weights",
                value=wanted,
            )
        return wanted
    if "ema1" in sets or len(sets) == 1:
        return "ema1" if "ema1" in sets else next(iter(sets))
    raise UserError(f"{path} has no ema1, but {', '.join(sets)}: choose one with --weights.", about="weights")


def open_tensors(path: Path, wanted: str | None) -> Source:
    """One `.safetensors` file of the reference's names; ours tells sizes and settings in its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot be read as safetensors ({error}): get it again.", about="input", value=path) from None
    if not is_state_dict(tensors):
        raise UserError(f"holds no weights of a JiT: there is no {TELLTALE} in it.", about="input", value=path)
    choose(path, {UNAVERAGED: tensors}, wanted, {})
    weights, positions = plain_names(path, tensors)
    stated = {}
    for key in ("config", "pipeline"):
        try:
            stated |= from_record(json.loads(metadata.get(key, "{}")))
        except ValueError:
            continue
    return Source(path, weights, metadata.get("weights") or UNAVERAGED, stated, positions)


def open_pipeline(place: str, folder: Path, wanted: str | None) -> Source:
    """A pipeline folder, a run, one of its checkpoints, or a pipeline of the Hub."""
    if wanted is None:
        for candidate in (folder, folder / "pipeline"):
            if (candidate / INDEX_FILE).is_file():
                source = _of_pipeline(candidate, load_folder(candidate, "input"), "the pipeline's")
                dtype = stored_dtype(candidate)  # diffusers has made all of it float32
                source.weights = {name: tensor.to(dtype) for name, tensor in source.weights.items()}
                return source
    checkpoint = find_checkpoint_in(folder)
    if checkpoint:
        average = average_for(checkpoint, wanted)
        pipeline = pipeline_of_checkpoint(checkpoint, average, "input")
        return _of_pipeline(checkpoint, pipeline, average if average == UNAVERAGED else f"average of decay {average}")
    if wanted is not None:
        raise UserError(
            f"{place} holds one set of weights only: leave the flag out, or give the output folder "
            "of a run, or a .pth.",
            about="weights",
            value=wanted,
        )
    if folder.exists():
        raise UserError(
            f"holds no pipeline ({INDEX_FILE}) and no checkpoint: give a pipeline folder, the "
            "output folder of a run, or a .pth or .safetensors file.",
            about="input",
            value=place,
        )
    return _of_pipeline(None, load_pipeline(place, about="input"), "the pipeline's")


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the weights in a pipeline folder."""
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                return tensors.get_tensor(name).dtype
    return torch.float32


def average_for(checkpoint: Path, wanted: str | None) -> str:
    """The average of a run's checkpoint that `--weights` means.

    ema1 and ema2 are the reference's decays where the run kept both, else the run's first and second.
    """
    averages = averages_of(checkpoint)
    if wanted is None:
        return averages[0]
    named = dict(zip((f"ema{i + 1}" for i in range(len(averages))), averages))
    if set(REFERENCE_DECAYS.values()) <= set(averages):
        named |= REFERENCE_DECAYS
    average = named.get(wanted, wanted)
    if average not in (UNAVERAGED, *averages):
        there = [UNAVERAGED, *(f"{name} (decay {decay})" for name, decay in named.items())]
        raise UserError(f"{checkpoint} has {', '.join(there)}.", about="weights", value=wanted)
    return average


def _of_pipeline(path: Path | None, pipeline: JiTPipeline, set_name: str) -> Source:
    return Source(path, dict(pipeline.transformer.state_dict()), set_name, from_pipeline(pipeline))


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_state_dict(content: Mapping) -> bool:
    return any(
        isinstance(name, str) and isinstance(value, Tensor) and plain_name(name) == TELLTALE
        for name, value in content.items()
    )


def plain_names(path: Path, state_dict: Mapping) -> tuple[dict[str, Tensor], Tensor | None]:
    """The weights under the network's own names, and the fixed position table if it is among them.

    Raises:
        UserError: what is no floating-point tensor, or two names that are the same one here.
    """
    weights: dict[str, Tensor] = {}
    for full_name, tensor in state_dict.items():
        name = plain_name(str(full_name))
        if name.endswith(("freqs_cos", "freqs_sin")):  # rotary tables follow from the sizes
            continue
        if name in weights:
            raise UserError(f"{full_name} is there twice, under different prefixes.", about="input", value=path)
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.layout} {tensor.device.type} {tensor.dtype}" if is_tensor else type(tensor).__name__
            raise UserError(f"{full_name} is no plain floating-point tensor but {kind}.", about="input", value=path)
        weights[name] = tensor.detach()
    return weights, weights.pop(POSITIONS, None)
