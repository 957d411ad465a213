"""A conversion from beginning to end."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.convert.inputs import Input, open_input
from jit_accel.convert.settings import FOLDER, ConvertConfig, given_flags, read_class_names, target_kind
from jit_accel.convert.sizes import PAPER_GUIDANCE, model_name, network_config, preset_of, sampling_settings
from jit_accel.convert.targets import (
    Converted,
    build,
    check_target,
    plain_values,
    write_pth,
    write_safetensors,
    written_whole,
)
from jit_accel.model import hub
from jit_accel.model.card import CARD_FILE, CARD_PICTURE, conversion_card
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.loading import find_pipeline_in

# What else a pipeline folder may hold that belongs to its weights.
BELONGINGS = (CARD_FILE, CARD_PICTURE, "evaluation*")
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ONLY_IN_TRAINING = ("proj_dropout", "attn_dropout")


def convert(config: ConvertConfig) -> None:
    """Convert, and push where that is asked for. Raises `UserError`: nothing is half-written then."""
    disable_progress_bar()
    sharing = config.hub
    if sharing.push_to_hub:
        hub.check_login(sharing.hub_model_id)
    folder = find_pipeline_in(Path(config.input).expanduser()) if config.output is None else write(config)
    if folder is None:
        rule = f"is no pipeline folder ({INDEX_FILE}), which alone can be pushed as it is: add --output FOLDER to make "
        raise UserError(rule + "one of it.", about="input", value=config.input)
    if sharing.push_to_hub:
        say(f"Pushed: {hub.push_folder(folder, sharing.hub_model_id, private=sharing.hub_private)}")


def write(config: ConvertConfig) -> Path:
    """Convert, and return where to."""
    kind, target = target_kind(config.output), Path(config.output).expanduser().resolve()
    place = Path(config.input).expanduser()
    check_target(target, kind, place if place.exists() else None, overwrite=True)  # what can be said already
    flags = given_flags(config)
    if "class_names" in flags:
        flags["class_names"] = read_class_names(flags["class_names"])
    opened = open_input(config.input, config.weights)
    check_target(target, kind, opened.path, config.overwrite)
    result = convert_weights(opened, flags, config.dtype)
    describe(config.input, opened, result)
    writers = {"pth": write_pth, "safetensors": write_safetensors, FOLDER: lambda *what: write_folder(opened, *what)}
    with written_whole(target, kind) as temporary:
        writers[kind](result, temporary)
    say(f"Wrote:   {config.output}")
    return target


def write_folder(opened: Input, result: Converted, folder: Path) -> None:
    """Write a pipeline folder, with the input's model card and evaluations if the images stay the same."""
    pipeline = build(result)
    pipeline.save_pretrained(folder, safe_serialization=True)
    if opened.path and (opened.path / INDEX_FILE).is_file() and makes_the_same_images(opened, result):
        for file in (file for pattern in BELONGINGS for file in opened.path.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)
    if not (folder / CARD_FILE).exists():
        card = conversion_card(pipeline, model_name(result.config), opened.set_name, opened.facts)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def convert_weights(opened: Input, flags: dict, dtype: str) -> Converted:
    """Return the weights in their new type, with the sizes and settings that were found.

    Raises `UserError`: the weights are not a JiT's, or a flag is needed or wrong.
    """
    sizes, notes = network_config(opened.weights, opened.positions, opened.stated, flags)
    settings = sampling_settings(sizes, opened.stated, flags)
    paper = PAPER_GUIDANCE.get(preset_of(sizes))
    if settings["guidance_scale"] == 1 and "guidance_scale" not in flags and paper:
        papers = paper[sizes["img_size"] >= 512]
        notes.append(f"guidance is 1 (none) in the input; the paper has {papers:g} for this size (--guidance_scale).")
    for note in (*notes, *_shared_names(settings["class_names"] or ())):
        warn(note)
    weights = {name: in_type(name, tensor, dtype) for name, tensor in opened.weights.items()}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        warn(f"{len(broken)} tensors hold values that are not finite, {broken[0]} among them: images will be black.")
    return Converted(weights, sizes, settings, opened.set_name, opened.epoch)


def _shared_names(names: Sequence[str]) -> Iterator[str]:
    """Yield a note on each name that several classes have, as ImageNet's crane."""
    for name, count in Counter(names).items():
        if count > 1:
            same = [label for label, other in enumerate(names) if other == name]
            listed = ", ".join(map(str, same))
            yield f"{name!r} names the classes {listed}: asked for by name it is {same[0]}, the others by number."


def in_type(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Return the tensor as this type, the same object where it is that already; `UserError` where it cannot be."""
    if dtype == "same":
        if tensor.dtype not in COMPUTED:
            rule = f"{name} is {tensor.dtype}, in which no JiT computes: leave the flag out."
            raise UserError(rule, about="dtype", value=dtype)
        return tensor
    converted = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not converted.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{name} holds values above 65504: use bfloat16 or float32.", about="dtype", value=dtype)
    return converted


def describe(place: str, opened: Input, result: Converted) -> None:
    """Say what was found."""
    config, settings = result.config, result.settings
    number = sum(tensor.numel() for tensor in result.weights.values())
    low, high = settings["guidance_interval"]
    say(
        f"Input:   {place}, weights: {opened.set_name}\n"
        f"Network: {model_name(config)} at {config['img_size']} px, {number:,} parameters, {config['num_classes']} "
        f"classes, {config['num_heads']} heads, class tokens before block {config['in_context_start']}\n"
        f"Samples: predicts {settings['prediction']}, noise scale {settings['noise_scale']:g}, "
        f"{settings['solver']}, guidance {settings['guidance_scale']:g} in ({low:g}, {high:g})"
    )


def makes_the_same_images(opened: Input, result: Converted) -> bool:
    """Return whether what was said and measured of the input holds of the result."""
    now = {**result.config, **result.settings}
    stated = {name: value for name, value in opened.stated.items() if name in now and name not in ONLY_IN_TRAINING}
    return plain_values({name: now[name] for name in stated}) == plain_values(stated) and all(
        torch.promote_types(tensor.dtype, opened.weights[name].dtype) == tensor.dtype
        for name, tensor in result.weights.items()
    )
