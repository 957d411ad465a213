"""A conversion from beginning to end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.convert.settings import FOLDER, ConvertConfig, given_flags, read_class_names, target_kind
from jit_accel.convert.sizes import PAPER_GUIDANCE, model_name, network_config, preset_of, sampling_settings
from jit_accel.convert.sources import Source, open_source
from jit_accel.convert.targets import (
    Result,
    check_target,
    write_folder,
    write_pth,
    write_safetensors,
    written_whole,
)
from jit_accel.model import hub
from jit_accel.model.card import CARD_FILE, CARD_PICTURE, conversion_card
from jit_accel.model.carried_code import INDEX_FILE

WRITERS = {"pth": write_pth, "safetensors": write_safetensors}
# What else a pipeline folder may hold that belongs to its weights.
BELONGINGS = (CARD_FILE, CARD_PICTURE, "evaluation*")
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ONLY_IN_TRAINING = ("proj_dropout", "attn_dropout")


def convert(config: ConvertConfig) -> None:
    """Convert, and push where that is asked for.

    Raises:
        UserError: something the user can mend; nothing is half-written then.
    """
    sharing = config.hub
    if sharing.push_to_hub:
        hub.check_login(sharing.hub_model_id)
    folder = pipeline_folder(config.input) if config.output is None else write(config)
    if sharing.push_to_hub:
        say(f"Pushed: {hub.push_folder(folder, sharing.hub_model_id, private=sharing.hub_private)}")


def pipeline_folder(place: str) -> Path:
    """The pipeline folder that is, or lies in, the folder of this name."""
    folder = Path(place).expanduser()
    for candidate in (folder, folder / "pipeline"):
        if (candidate / INDEX_FILE).is_file():
            return candidate
    raise UserError(
        f"is no pipeline folder ({INDEX_FILE}), which alone can be pushed as it is: add --output "
        "FOLDER to make one of it.",
        about="input",
        value=place,
    )


def write(config: ConvertConfig) -> Path:
    """Convert, and return where to."""
    kind, target = target_kind(config.output), Path(config.output).expanduser().resolve()
    place = Path(config.input).expanduser()
    check_target(target, kind, place if place.exists() else None, overwrite=True)  # what can be told already
    flags = given_flags(config)
    if "class_names" in flags:
        flags["class_names"] = read_class_names(flags["class_names"])
    source = open_source(config.input, config.weights)
    check_target(target, kind, source.path, config.overwrite)
    result = convert_weights(source, flags, config.dtype)
    describe(config.input, source, result)
    with written_whole(target, kind) as temporary:
        if kind == FOLDER:
            pipeline = write_folder(result, temporary)
            if makes_the_same_images(source, result):
                keep_belongings(source.path, temporary)
            if not (temporary / CARD_FILE).exists():
                card = conversion_card(pipeline, model_name(result.config), source.set_name, source.facts)
                (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        else:
            WRITERS[kind](result, temporary)
    say(f"Wrote:   {config.output}")
    return target


def convert_weights(source: Source, flags: dict, dtype: str) -> Result:
    """Sizes and settings found, and the weights in their new type.

    Raises:
        UserError: the weights are not a JiT's, or a flag is needed or wrong.
    """
    sizes, notes = network_config(source.weights, source.positions, source.stated, flags)
    settings = sampling_settings(sizes, source.stated, flags)
    paper = PAPER_GUIDANCE.get(preset_of(sizes))
    if settings["guidance_scale"] == 1 and "guidance_scale" not in flags and paper:
        papers = paper[sizes["img_size"] >= 512]
        notes.append(f"guidance is 1 (none) in the input; the paper has {papers:g} for this size (--guidance_scale).")
    notes += _shared_names(settings["class_names"] or ())
    for note in notes:
        warn(note)
    weights = {name: in_type(name, tensor, dtype) for name, tensor in source.weights.items()}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        warn(f"{len(broken)} tensors hold values that are not finite, {broken[0]} among them: images will be black.")
    return Result(weights, sizes, settings, source.set_name, source.epoch)


def _shared_names(names: Sequence[str]) -> Iterator[str]:
    """What should be told of names that several classes have, as ImageNet's crane."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        labels.setdefault(name, []).append(label)
    for name, same in labels.items():
        if len(same) > 1:
            listed = ", ".join(map(str, same))
            yield f"{name!r} names the classes {listed}: asked for by name it is {same[0]}, the others by number."


def in_type(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The tensor as this type; the same object where it is that already.

    Raises:
        UserError: values that the type cannot hold.
    """
    if dtype == "same":
        if tensor.dtype not in COMPUTED:
            raise UserError(
                f"{name} is {tensor.dtype}, in which no JiT computes: leave the flag out.", about="dtype", value=dtype
            )
        return tensor
    converted = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not converted.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{name} holds values above 65504: use bfloat16 or float32.", about="dtype", value=dtype)
    return converted


def describe(place: str, source: Source, result: Result) -> None:
    """Say what was found."""
    config, settings = result.config, result.settings
    number = sum(tensor.numel() for tensor in result.weights.values())
    low, high = settings["guidance_interval"]
    say(
        f"Input:   {place}, weights: {source.set_name}\n"
        f"Network: {model_name(config)} at {config['img_size']} px, {number:,} parameters, {config['num_classes']} "
        f"classes, {config['num_heads']} heads, class tokens before block {config['in_context_start']}\n"
        f"Samples: predicts {settings['prediction']}, noise scale {settings['noise_scale']:g}, "
        f"{settings['solver']}, guidance {settings['guidance_scale']:g} in ({low:g}, {high:g})"
    )


def makes_the_same_images(source: Source, result: Result) -> bool:
    """Whether what was said and measured of the source holds of the result."""
    is_exact = all(
        torch.promote_types(tensor.dtype, source.weights[name].dtype) == tensor.dtype
        for name, tensor in result.weights.items()
    )
    now = {**result.config, **result.settings}
    stated = {name: value for name, value in source.stated.items() if name in now and name not in ONLY_IN_TRAINING}
    return is_exact and all(_plain(now[name]) == _plain(value) for name, value in stated.items())


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def keep_belongings(source: Path | None, target: Path) -> None:
    """Copy what belongs to a pipeline's weights beside them."""
    if source is None or not (source / INDEX_FILE).is_file():
        return
    for pattern in BELONGINGS:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copy(file, target / file.name)
