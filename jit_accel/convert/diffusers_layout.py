"""The layout of the JiT proposed for diffusers (its pull request 13098): names of weights, words for sizes, folders.

Its weights are the reference's under other names, at first with q, k and v in one matrix, later in three.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.functional import NORM_EPS
from jit_accel.model.saved_weights import WEIGHT_FILE, variant_of

CONFIG_FILE = "config.json"
# Its names, as patterns, and the reference's.
_RENAMED = (
    (r"(?<!final_layer\.)norm_final\.", "final_layer.norm_final."),
    (r"linear_final\.", "final_layer.linear."),
    (r"adaLN_modulation_final\.", "final_layer.adaLN_modulation.1."),
    (r"adaLN_modulation\.(?=weight|bias)", "adaLN_modulation.1."),
    (r"attn\.norm_(q|k)\.", r"attn.\1_norm."),
    (r"attn\.to_out\.0\.", "attn.proj."),
)
_PART_OF_QKV = re.compile(r"attn\.to_([qkv])\.")
# Its words for sizes, those of its forerunners last, and ours.
WORDS = {
    "sample_size": "img_size",
    "num_layers": "depth",
    "num_attention_heads": "num_heads",
    "attention_dropout": "attn_dropout",
    "dropout": "proj_dropout",
    "num_class_embeds": "num_classes",
    "model_type": "model",
    "prediction_type": "prediction",  # of this package's own schedulers
}


def reference_name(name: str) -> str:
    """Return the reference's name of a weight that has it, or diffusers' name."""
    for pattern, ours in _RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def joined_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the matrices of q, k and v in one, in this order, where they are three."""
    joined, parts = {}, {}
    for name, tensor in weights.items():
        if match := _PART_OF_QKV.search(name):
            parts.setdefault(_PART_OF_QKV.sub("attn.qkv.", name), {})[match[1]] = tensor
        else:
            joined[name] = tensor
    for name, three in parts.items():
        if len(three) < 3:
            raise UserError(f"{name}: of q, k and v only {', '.join(three)} are there.", about="input")
        joined[name] = torch.cat([three[part] for part in "qkv"])
    return joined


def network_folder(folder: Path) -> Path | None:
    """Return where a network lies: the folder, or its `transformer` where that is not of a pipeline of this package."""
    for place in (folder / "transformer", folder):
        config = _config_of(place)
        if config and (place == folder or "img_size" not in config):
            return place
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a network's weights: safetensors before pickles, and those of no variant before others.

    Raises `UserError`: there are none, or those of several variants alone.
    """
    for ending in ("safetensors", "bin"):
        variants: dict[str | None, list[Path]] = {}
        for file in sorted(folder.glob(f"*.{ending}")):
            if WEIGHT_FILE.fullmatch(file.name):
                variants.setdefault(variant_of(file.name), []).append(file)
        if None in variants or len(variants) == 1:
            return variants.get(None) or next(iter(variants.values()))
        if variants:
            rule = f"has weights as {' and '.join(map(str, variants))}: give one of the files."
            raise UserError(rule, about="input", value=folder)
    rule = "has no weights (diffusion_pytorch_model*.safetensors) beside its config.json: get them, too."
    raise UserError(rule, about="input", value=folder)


def stated_beside(folder: Path) -> dict:
    """Return what a network's `config.json` states, and the files of the pipeline that it is part of, in our words.

    Raises `UserError`: it is a network that cannot be had here.
    """
    config = _config_of(folder)
    eps = config.get("norm_eps", NORM_EPS)
    if eps != NORM_EPS:
        raise UserError(f"norm_eps is {eps}, which is always {NORM_EPS} here.", about="input", value=folder)
    index = _read(folder.parent / INDEX_FILE) if config and folder.name == "transformer" else {}
    scheduler = _read(folder.parent / "scheduler" / "scheduler_config.json") if index else {}
    stated = {WORDS.get(name, name): value for name, value in {**scheduler, **index, **config}.items()}
    names = index.get("id2label") or index.get("class_names")
    if isinstance(names, dict) and set(names) == {str(i) for i in range(len(names))}:
        names = [str(names[str(i)]) for i in range(len(names))]
        short = [name.partition(",")[0].strip() for name in names]  # of "tench, Tinca tinca"
        stated["class_names"] = short if "id2label" in index and len(set(short)) == len(short) else names
    return stated


def _config_of(folder: Path) -> dict:
    config = _read(folder / CONFIG_FILE)
    return config if str(config.get("_class_name")).startswith("JiT") else {}


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
