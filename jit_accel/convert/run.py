"""A conversion from beginning to end: a file or a pipeline folder is written, whole or not at all."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, atomic_folder, disk_error, disk_errors
from jit_accel.config.presets import in_pixels
from jit_accel.convert import sizes
from jit_accel.convert.inputs import Input, open_input
from jit_accel.convert.settings import FOLDER, ConvertConfig, given_flags, read_class_names, target_kind
from jit_accel.model import hub
from jit_accel.model.call_arguments import DEFAULTS
from jit_accel.model.card import CARD_FILE, CARD_PICTURE, conversion_card
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.loading import find_pipeline_in
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel

PREFIX = "net."  # the reference's Denoiser holds the network under this name
# What else a pipeline folder may hold that belongs to its weights.
BELONGINGS = (CARD_FILE, CARD_PICTURE, "evaluation*")
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ONLY_IN_TRAINING = ("proj_dropout", "attn_dropout")


@dataclass
class Converted:
    """The weights that are to be written, by the network's parameter names and in the type to write.

    opened: where they come from. config: of the network. settings: of the sampling.
    """

    opened: Input
    weights: dict[str, Tensor]
    config: dict
    settings: dict


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
    opened = open_input(config.input, config.weights, config.ema_width)
    check_target(target, kind, opened.path, config.overwrite)
    result = convert_weights(opened, flags, config.dtype)
    describe(config.input, result)
    writers = {"pth": write_pth, "safetensors": write_safetensors, FOLDER: write_folder}
    with written_whole(target, kind) as temporary:
        writers[kind](result, temporary)
    say(f"Wrote:   {config.output}")
    return target


def check_target(target: Path, kind: str, source: Path | None, overwrite: bool) -> None:
    """Raise `UserError` for a target that exists, is of another kind, or is the source or holds it."""
    with disk_errors("output", target):  # a name that is too long, say
        is_there, is_folder = target.exists(), target.is_dir()
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
    """Give a path beside `target` to write to, which takes its place at the end; `UserError` where the disk fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (atomic_folder if kind == FOLDER else atomic_file)(target) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise disk_error(error, "output", target) from None


def convert_weights(opened: Input, flags: dict, dtype: str) -> Converted:
    """Return the weights in their new type, with the sizes and settings that were found. Raises `UserError`."""
    config, notes = sizes.network_config(opened.weights, opened.positions, opened.stated, flags)
    settings = sizes.sampling_settings(config, opened.stated, flags)
    paper = sizes.paper_guidance(config)
    if settings["guidance_scale"] == 1 and "guidance_scale" not in flags and paper:
        notes.append(f"guidance is 1 (none) in the input; the paper has {paper:g} for this size (--guidance_scale).")
    for note in (*notes, *_shared_names(settings["class_names"] or ())):
        warn(note)
    weights = {name: in_type(name, tensor, dtype) for name, tensor in opened.weights.items()}
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        warn(f"{len(broken)} tensors hold values that are not finite, {broken[0]} among them: images will be black.")
    return Converted(opened, weights, config, settings)


def _shared_names(names: Sequence[str]) -> Iterator[str]:
    """Yield a note on each name that several classes have, as ImageNet's crane."""
    for name, count in Counter(names).items():
        if count > 1:
            first, *others = [str(label) for label, other in enumerate(names) if other == name]
            labels = ", ".join([first, *others])
            yield f"{name!r} names the classes {labels}: asked for by name it is {first}, the others by number."


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


def describe(place: str, result: Converted) -> None:
    config, settings = result.config, result.settings
    number = sum(tensor.numel() for tensor in result.weights.values())
    low, high = settings["guidance_interval"]
    say(
        f"Input:   {place}, weights: {result.opened.set_name}\n"
        f"Network: {sizes.model_name(config)} at {in_pixels(config['img_size'])} px, {number:,} parameters, "
        f"{config['num_classes']} classes, {config['num_heads']} heads, "
        f"class tokens before block {config['in_context_start']}\n"
        f"Samples: predicts {settings['prediction']}, noise scale {settings['noise_scale']:g}, "
        f"{settings['solver']}, guidance {settings['guidance_scale']:g} in ({low:g}, {high:g})"
    )


def makes_the_same_images(result: Converted) -> bool:
    """Return True where what was said and measured of the input holds of the result."""
    opened, now = result.opened, {**result.config, **result.settings}
    stated = {name: value for name, value in opened.stated.items() if name in now and name not in ONLY_IN_TRAINING}
    return plain_values({name: now[name] for name in stated}) == plain_values(stated) and all(
        torch.promote_types(tensor.dtype, opened.weights[name].dtype) == tensor.dtype
        for name, tensor in result.weights.items()
    )


def write_folder(result: Converted, folder: Path) -> None:
    """Write a pipeline folder, with the input's model card and evaluations if the images stay the same."""
    opened, settings = result.opened, result.settings
    with torch.device("meta"):
        network = JiTTransformer2DModel(**result.config)
    network.load_state_dict(result.weights, strict=True, assign=True)
    scheduler = JiTScheduler(*(settings[name] for name in ("prediction", "t_eps", "noise_scale", "solver")))
    kept = {name: settings.get(name, opened.stated.get(name)) for name in ("class_names", *DEFAULTS)}
    pipeline = JiTPipeline(network.eval(), scheduler, **kept)
    pipeline.save_pretrained(folder, safe_serialization=True)
    if opened.path and (opened.path / INDEX_FILE).is_file() and makes_the_same_images(result):
        for file in (file for pattern in BELONGINGS for file in opened.path.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)
    if not (folder / CARD_FILE).exists():
        card = conversion_card(pipeline, sizes.model_name(result.config), opened.set_name, opened.facts)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def write_pth(result: Converted, path: Path) -> None:
    """Write a checkpoint for the reference's code: its `model`, `model_ema1` and `model_ema2` are all these weights.

    `args`, in the reference's words beside ours, are plain values, so that `torch.load(weights_only=True)` reads them.
    """
    arguments = {**result.config, **result.settings, "model": sizes.model_name(result.config)}
    arguments |= {theirs: arguments[ours] for theirs, ours in sizes.ARGUMENT_NAMES.items()}
    arguments["interval_min"], arguments["interval_max"] = arguments["guidance_interval"]
    sets = dict.fromkeys(("model", "model_ema1", "model_ema2"), reference_names(result))  # stored once
    try:
        torch.save({**sets, "epoch": result.opened.epoch or 0, "args": plain_values(arguments)}, path)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(str(error)) from error


def write_safetensors(result: Converted, path: Path) -> None:
    """Write one file with the reference's names; sizes and settings are JSON in its metadata."""
    config, settings = (json.dumps(plain_values(values)) for values in (result.config, result.settings))
    metadata = {"format": "pt", "weights": result.opened.set_name, "config": config, "pipeline": settings}
    save_file(reference_names(result), path, metadata=metadata)


def reference_names(result: Converted) -> dict[str, Tensor]:
    """Return the weights and the fixed table as the reference's state dict, each with a storage of its own."""
    dtype = next(iter(result.weights.values())).dtype
    table = sizes.position_table(result.config).to(dtype).clone()
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
