"""A network's sizes from the shapes of its weights, its settings from what is known of them and stated by others."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from jit_accel.base.errors import UserError, shown
from jit_accel.config.presets import (
    PRESETS,
    Preset,
    Size,
    grid_of,
    plain_size,
    sides_of,
    sizes_near,
    swiglu_width,
    usual_noise_scale,
)
from jit_accel.model import functional
from jit_accel.model.call_arguments import is_number
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.solvers import SOLVERS
from jit_accel.model.spaces import SPACES
from jit_accel.model.transformer import JiTTransformer2DModel

PATCHES_A_SIDE = 16  # the paper's, at every image size
# 2511.13720's guidance by size, below 512 px and from there on; G is ours, as in the recipes.
PAPER_GUIDANCE = {"JiT-B": (3.0, 3.0), "JiT-L": (2.4, 2.5), "JiT-H": (2.2, 2.3), "JiT-G": (2.2, 2.3)}
DEFAULT_GUIDANCE = 2.0
# Flags, and where in the weights their sizes are seen.
SHOWN_BY = {
    "num_heads": "shape of blocks.0.attn.q_norm.weight",
    "patch_size": "shape of x_embedder.proj1.weight",
    "img_size": "pos_embed",
}


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are(holds, value) -> bool:
    return isinstance(value, list | tuple) and all(map(holds, value))


SIZES = (
    *("img_size", "patch_size", "hidden_size", "depth", "num_heads", "bottleneck_dim", "in_context_len"),
    *("in_context_start", "num_classes", "in_channels"),
)
OF_CONDITIONS = ("condition_channels", "condition_bottleneck", "condition_inject", "vector_sizes")
# What may be stated, and when it is believed.
BELIEVED = {
    **dict.fromkeys(SIZES, _is_count),
    "img_size": lambda v: _is_count(v) or (_are(_is_count, v) and len(v) == 2),
    **dict.fromkeys(("attn_dropout", "proj_dropout"), lambda v: is_number(v) and 0 <= v < 1),
    **dict.fromkeys(("mlp_ratio", "noise_scale"), lambda v: is_number(v) and v > 0),
    **dict.fromkeys(("solver", "method"), lambda v: v in tuple(SOLVERS)),
    "model": lambda v: isinstance(v, str) and v.partition("/")[0] in PRESETS,
    "prediction": lambda v: v in SPACES,
    "t_eps": lambda v: is_number(v) and 0 < v < 1,
    "guidance_scale": lambda v: is_number(v) and v >= 0,
    "guidance_interval": lambda v: _are(is_number, v) and len(v) == 2 and 0 <= v[0] <= v[1] <= 1,
    "num_inference_steps": lambda v: _is_count(v) and v >= 1,
    "class_names": lambda v: _are(lambda name: isinstance(name, str), v),
}
# The reference's command line says the same in its own words.
ARGUMENT_NAMES = {
    "class_num": "num_classes",
    "cfg": "guidance_scale",
    "sampling_method": "solver",
    "num_sampling_steps": "num_inference_steps",
}


def from_arguments(arguments: Mapping) -> dict:
    """Return what is believed of the reference's `args`, or of a mapping with our names."""
    values = {ARGUMENT_NAMES.get(name, name): value for name, value in arguments.items() if isinstance(name, str)}
    if "interval_min" in values and "interval_max" in values:
        values.setdefault("guidance_interval", (values["interval_min"], values["interval_max"]))
    found = {name: values[name] for name, holds in BELIEVED.items() if name in values and holds(values[name])}
    return found | ({"img_size": plain_size(found["img_size"])} if "img_size" in found else {})


def from_pipeline(pipeline: JiTPipeline) -> dict:
    """Return all that a pipeline knows of itself."""
    objective, solver = pipeline.config.objective, pipeline.scheduler.config
    values = {**pipeline.transformer.config, **solver, **pipeline.config, **objective}
    return from_arguments(values | {"prediction": objective["prediction_type"]})


def network_config(
    weights: Mapping[str, Tensor], positions: Tensor | None, stated: Mapping, flags: Mapping
) -> tuple[dict, list[str]]:
    """Return the configuration of the network that these weights are of, and what is worth saying about it.

    Shapes count most; flags may fill in what they leave open, then what the input states, then the presets. Raises
    `UserError`: the weights are not a JiT's, a flag contradicts them, or a flag is needed.
    """
    sizes = sizes_of_shapes(weights)
    preset = preset_of(sizes)
    if positions is not None:
        sizes["img_size"] = _size_of_positions(positions, sizes["patch_size"])
    notes = []
    for name, size in ((name, sizes[name]) for name in SIZES if name in sizes):
        if flags.get(name, size) != size:
            rule = f"the weights say {shown(size)} ({SHOWN_BY[name]}): leave the flag out."
            raise UserError(rule, about=name, value=shown(flags[name]))
        if stated.get(name, size) != size:
            notes.append(
                f"the checkpoint says {name} {shown(stated[name])}, its weights have {shown(size)}, which counts."
            )
    if "model" in stated and stated["model"] not in (preset, model_name(sizes)):
        notes.append(f"the checkpoint says {stated['model']}, its weights are a {model_name(sizes)}, which counts.")
    if "img_size" not in sizes:
        sizes["img_size"] = _image_size(sizes, preset, stated, flags, notes)
    sizes["in_context_start"] = _in_context_start(sizes, preset, stated, flags)
    for name in ("proj_dropout", "attn_dropout"):
        sizes[name] = flags.get(name, stated.get(name, getattr(PRESETS.get(preset), name, 0.0)))
    check_fit(weights, positions, sizes)
    return sizes, notes


def _size_of_positions(positions: Tensor, patch: int) -> Size:
    """Return the size of the images whose `pos_embed` (1, N, D) this may be: its first half repeats in each row."""
    if positions.ndim != 3 or positions.shape[1] < 1 or positions.shape[2] < 2:
        raise _not_a_jit(f"pos_embed has the shape {tuple(positions.shape)}")
    of_columns = positions[0, :, : positions.shape[2] // 2].float()
    is_first = (of_columns - of_columns[0]).abs().amax(1) <= _rounding(positions)
    starts = is_first.nonzero().flatten().tolist()
    columns = starts[1] if len(starts) > 1 else len(is_first)
    return plain_size((len(is_first) // columns * patch, columns * patch))


def _rounding(positions: Tensor) -> float:
    """Return how far the table may be off: half-precision copies are as good as their type."""
    return max(1e-4, torch.finfo(positions.dtype).eps)


def _not_a_jit(problem: str, model: str = "JiT") -> UserError:
    return UserError(f"the weights are not those of a {model}: {problem}.", about="input")


def sizes_of_shapes(weights: Mapping[str, Tensor]) -> dict:
    """Return every size that follows from the shapes alone."""
    try:
        bottleneck, channels, patch, patch_across = weights["x_embedder.proj1.weight"].shape
        hidden = weights["x_embedder.proj2.weight"].shape[0]
        classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
        head_dim = weights["blocks.0.attn.q_norm.weight"].shape[0]
        inner = weights["blocks.0.mlp.w3.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise _not_a_jit(f"{error} is missing or has another shape") from None
    blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.([0-9]+)\.", name))}
    if blocks != set(range(len(blocks))):
        raise _not_a_jit(f"of the blocks only {sorted(blocks)[:9]} are there")
    if patch != patch_across or not head_dim or hidden % head_dim or not hidden:
        raise _not_a_jit(f"patches of {patch} x {patch_across}, {hidden} channels in heads of {head_dim}")
    if classes < 0:
        raise _not_a_jit("the table of classes has no row")
    context = weights.get("in_context_posemb")
    return {
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": len(blocks),
        "num_heads": hidden // head_dim,
        "bottleneck_dim": bottleneck,
        "in_context_len": context.shape[1] if context is not None and context.ndim == 3 else 0,
        "num_classes": classes,
        "mlp_ratio": mlp_ratio(hidden, inner),
        "in_channels": channels,
        **{name: getattr(Preset, name) for name in OF_CONDITIONS},  # whose weights are refused
    }


def mlp_ratio(hidden: int, inner: int) -> float:
    """Return the ratio whose SwiGLU has `inner` channels; 4 where that fits, as in the paper."""
    near = inner * 1.5 / hidden
    quarters = sorted((k / 4 for k in range(1, 65)), key=lambda ratio: abs(ratio - 4))
    exact = [(math.ceil(inner * 1.5) + shift) / hidden for shift in (0, 0.5, 1)]
    return next((ratio for ratio in (*quarters, near, *exact) if swiglu_width(hidden, ratio) == inner), near)


def preset_of(sizes: Mapping) -> str | None:
    """Return the preset with these depth, width, heads and bottleneck."""
    compared = [(size, sizes[size]) for size in ("depth", "hidden_size", "num_heads", "bottleneck_dim")]
    alike = (name for name, preset in PRESETS.items() if all(getattr(preset, size) == at for size, at in compared))
    return next(alike, None)


def model_name(config: Mapping) -> str:
    """Return `JiT-B/16`, or the sizes where no preset has them."""
    name = preset_of(config) or f"JiT {config['depth']}x{config['hidden_size']}"
    return f"{name}/{config['patch_size']}"


def _image_size(sizes: Mapping, preset: str | None, stated: Mapping, flags: Mapping, notes: list[str]) -> Size:
    patch = sizes["patch_size"]
    size = flags.get("img_size", stated.get("img_size"))
    if size is None:
        if preset is None:
            rule = "these weights have no pos_embed and no preset's sizes: say the size in pixels."
            raise UserError(rule, about="img_size")
        size = PATCHES_A_SIDE * patch
        notes.append(f"image size {size}: 16 patches a side, as in the paper; --img_size says otherwise.")
    near = sizes_near(size, patch)
    if near or not all(sides_of(size)):
        rule = f"must be a multiple of the patch size {patch}" + (f": use {near}." if near else ".")
        raise UserError(rule, about="img_size", value=shown(size))
    return size


def _in_context_start(sizes: Mapping, preset: str | None, stated: Mapping, flags: Mapping) -> int:
    about, asked = "in_context_start", flags.get("in_context_start")
    if not sizes["in_context_len"]:
        if asked:
            rule = "these weights have no class tokens (in_context_posemb): leave the flag out."
            raise UserError(rule, about=about, value=asked)
        return stated.get("in_context_start", 0)
    known = [asked, stated.get(about)]
    for name in (preset, stated.get("model", "").partition("/")[0]):
        like = PRESETS.get(name)
        if like and (like.hidden_size, like.depth) == (sizes["hidden_size"], sizes["depth"]):
            known.append(like.in_context_start)
    start = next((value for value in known if value is not None), None)
    if start is None:
        rule = (
            f"needed: no preset has {sizes['depth']} blocks of {sizes['hidden_size']} channels, {sizes['num_heads']} "
        )
        rule += f"heads and a bottleneck of {sizes['bottleneck_dim']}, and shapes do not show before which block the "
        raise UserError(rule + "class tokens join in.", about=about)
    if start >= sizes["depth"]:
        raise UserError(f"must be below the number of blocks, {sizes['depth']}.", about=about, value=start)
    return start


def check_fit(weights: Mapping[str, Tensor], positions: Tensor | None, config: Mapping) -> None:
    """Raise `UserError` unless the weights are exactly those of a network with this configuration."""
    try:
        with torch.device("meta"):
            expected = JiTTransformer2DModel(**config).state_dict()
    except ValueError as error:
        raise _not_a_jit(str(error)) from None
    problems = [f"missing: {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"unexpected: {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise _not_a_jit("; ".join(problems[:6]) + more, model_name(config))
    if positions is not None:
        table, close = position_table(config), {"rtol": 0, "atol": _rounding(positions)}
        if positions.shape != table.shape or not torch.allclose(positions.float(), table, **close):
            raise _not_a_jit("pos_embed is not the fixed 2-D sin-cos table")


def position_table(config: Mapping) -> Tensor:
    """Return the reference's `pos_embed` (1, N, D), float32."""
    grid = grid_of(config["img_size"], config["patch_size"])
    return functional.position_table(config["hidden_size"], grid, grid, torch.device("cpu"))


def paper_guidance(config: Mapping) -> float | None:
    """Return the paper's guidance for a network of this configuration; None for sizes that it does not have."""
    return PAPER_GUIDANCE.get(preset_of(config), (None, None))[usual_noise_scale(config["img_size"]) >= 2]


def sampling_settings(config: Mapping, stated: Mapping, flags: Mapping) -> dict:
    """Return what a pipeline needs beside its network: from flags, else as the input states, else the paper."""
    guidance = paper_guidance(config) or DEFAULT_GUIDANCE
    paper = {
        "prediction": "x",
        "noise_scale": usual_noise_scale(config["img_size"]),
        "t_eps": 0.05,
        "solver": "heun",
        "guidance_scale": guidance if config["num_classes"] > 1 else 1.0,
        "guidance_interval": (0.1, 1.0),
        "num_inference_steps": None,
        "method": None,
        "class_names": None,
    }
    settings = {name: flags.get(name, stated.get(name, default)) for name, default in paper.items()}
    names, number = settings["class_names"], config["num_classes"]
    if names is not None and len(names) != number:
        if "class_names" in flags:
            raise UserError(f"has {len(names)} names, the network {number} classes: one for each.", about="class_names")
        settings["class_names"] = None
    return settings
