"""The settings of `jit_accel.convert`; imports no torch, so that `--help` answers at once."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jit_accel.base.errors import UserError, check_ranges, within
from jit_accel.config.checks import check_hub
from jit_accel.config.groups import MOST_PIXELS, problem_of_width
from jit_accel.config.presets import settle_size
from jit_accel.config.run_groups import HubConfig

# What the name of --output ends in, and what is written then; other names are folders.
TARGET_KINDS = {".pth": "pth", ".pt": "pth", ".safetensors": "safetensors"}
FOLDER = "folder"
# Names like these would make odd folders.
OTHER_KINDS = (".ckpt", ".bin", ".pkl", ".npz", ".npy", ".zip", ".tar", ".onnx", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True)
class NetworkFlags:
    """Sizes: read from the weights; needed where these do not show them, else compared with them."""

    num_heads: int | None = None
    """Attention heads (default: from the shape of q_norm)."""
    in_context_start: int | None = None
    """Block before which the class tokens join in, counted from 0 (default: the preset's with these sizes)."""
    patch_size: int | None = None
    """Side of a patch in pixels (default: from the shape of the patch embedding)."""
    img_size: int | tuple[int, int] | None = None
    """Side of the training images in pixels, or their height and width (default: from pos_embed; without one 16
    patches a side)."""
    proj_dropout: float | None = None
    """Dropout for a training that goes on (default: the checkpoint's or the preset's)."""
    attn_dropout: float | None = None
    """The same on the attention weights (default: likewise)."""

    __post_init__ = settle_size


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling: taken from the input where it says so, else from the paper."""

    prediction: Literal["x", "e", "v"] | None = None
    """Prediction of the network (default: x)."""
    noise_scale: float | None = None
    """Standard deviation of the noise (default: img_size / 256, at least 1)."""
    t_eps: float | None = None
    """Lower bound of 1 - t (default: 0.05)."""
    guidance_scale: float | None = None
    """The pipeline's default guidance (default: the paper's for the size, else 2)."""
    guidance_interval: tuple[float, float] | None = None
    """Times at which guidance acts (default: 0.1 1.0)."""
    class_names: str | None = None
    """File with the name of each class: one a line, or JSON, a list or {"0": "name", ...} (default: the input's)."""


@dataclass(frozen=True)
class ConvertConfig:
    """Convert the paper's checkpoints to pipeline folders, and pipelines to its checkpoints or one safetensors file.

    The end of --output's name says which: .pth, .safetensors, else a folder.
    """

    input: str
    """A checkpoint of the paper's code (.pth), a plain state dict, a .safetensors file, a pipeline folder, a run's
    output folder, one of its checkpoints, or owner/name of the Hub; also of the JiT proposed for diffusers."""
    output: str | None = None
    """File or folder to write. Required, unless a pipeline folder is pushed as it is."""
    weights: str | None = None
    """model, ema1 or ema2 of a checkpoint; in the paper's, ema1 has decay 0.9999 and ema2 0.9996. A run's averages also
    by their decay, such as 0.9998 (default: ema1)."""
    ema_width: float | None = None
    """Relative width, 0.001 or more and below 0.288, of an average to make of those that a training with
    --average_snapshots stored, such as 0.05 (default: none is made)."""
    dtype: Literal["float32", "bfloat16", "float16", "same"] = "float32"
    """Type of the weights written; same keeps the input's."""
    overwrite: bool = False
    """Replace what is at --output: a file, or a pipeline folder."""
    network: NetworkFlags = field(default_factory=NetworkFlags)
    """Sizes."""
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    """Sampling."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Sharing."""


RANGES = [
    *((name, lambda v: v >= 1, "at least 1") for name in ("num_heads", "patch_size")),
    *within(1, MOST_PIXELS, "img_size"),
    *((name, lambda v: 0 <= v < 1, "in [0, 1)") for name in ("proj_dropout", "attn_dropout")),
    ("in_context_start", lambda v: v >= 0, "0 or more"),
    ("noise_scale", lambda v: 0 < v < math.inf, "positive"),
    ("t_eps", lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
    ("guidance_scale", lambda v: 0 <= v < math.inf, "0 or more (1 = no guidance)"),
    ("guidance_interval", lambda v: 0 <= v[0] <= v[1] <= 1, "two times LOW HIGH with 0 <= LOW <= HIGH <= 1"),
]


def check(config: ConvertConfig) -> None:
    """Raise `UserError` for settings that are out of range or contradict each other."""
    given = given_flags(config)
    check_ranges(given, RANGES)
    check_hub(config.hub)
    if config.ema_width is not None and config.weights is not None:
        rule = f"says which weights are taken, as --weights {config.weights} does: give one of them."
        raise UserError(rule, about="ema_width", value=f"{config.ema_width:g}")
    if config.ema_width is not None and (problem := problem_of_width(config.ema_width)):
        raise UserError(problem, about="ema_width", value=f"{config.ema_width:g}")
    if config.output is not None:
        if config.hub.push_to_hub and target_kind(config.output) != FOLDER:
            rule = f"pushes a pipeline folder, and --output {config.output} is not one: name a folder."
            raise UserError(rule, about="push_to_hub")
        return
    if not config.hub.push_to_hub:
        raise UserError("not given; name a .pth or .safetensors file, or a folder for a pipeline.", about="output")
    others = ("weights", "ema_width", "overwrite", "dtype")
    changes = [*given, *(name for name in others if getattr(config, name) != getattr(ConvertConfig, name))]
    if changes:
        rule = "changes what is converted, but without --output the folder is pushed as it is: add --output FOLDER, or "
        raise UserError(rule + "leave the flag out.", about=changes[0])


def given_flags(config: ConvertConfig) -> dict:
    """Return the sizes and sampling settings that the user gave."""
    values = {**vars(config.network), **vars(config.sampling)}
    return {name: value for name, value in values.items() if value is not None}


def target_kind(output: str) -> str:
    """Return what is written to a path of this name: pth, safetensors or folder; raise `UserError` for other files."""
    suffix = Path(output).suffix.lower()
    if suffix in OTHER_KINDS:
        rule = f"{suffix} files are not written here: end the name in .pth or .safetensors, or name a folder for a "
        raise UserError(rule + "pipeline.", about="output", value=output)
    return TARGET_KINDS.get(suffix, FOLDER)


def read_class_names(path: str) -> list[str]:
    """Return the names in a file of `--class_names`, lines, a list or {"0": name}, in the order of the labels."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith(("[", "{")):
            return [line.strip() for line in text.strip().splitlines()]
        values = json.loads(text)
        if isinstance(values, dict):
            values = [values[str(i)] for i in range(len(values))]
        # {"0": ["n01440764", "tench"]}, as ImageNet's index is often kept
        names = [value[-1] if isinstance(value, list) and value else value for value in values]
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({error}): give a text or JSON file."
    except (ValueError, KeyError) as error:
        forms = '["cat", "dog"], or {"0": "cat", "1": "dog"} without gaps'
        rule = f"not understood ({error}): write one name a line, or JSON: {forms}."
    else:
        others = [name for name in names if not isinstance(name, str)]
        if not others:
            return names
        rule = f"each name must be text; found {others[0]!r}."
    raise UserError(rule, about="class_names", value=path) from None
