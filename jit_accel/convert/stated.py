"""Sizes and settings as a source states them: read with care, because others wrote them."""

from __future__ import annotations

from collections.abc import Mapping

from jit_accel.config.presets import PRESETS
from jit_accel.model.guidance import is_number
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.scheduler import CALLS_PER_STEP
from jit_accel.model.spaces import SPACES


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are(holds, value) -> bool:
    return isinstance(value, list | tuple) and all(map(holds, value))


def _is_text_of(choices):
    return lambda v: isinstance(v, str) and v in choices


SIZES = (
    *("img_size", "patch_size", "hidden_size", "depth", "num_heads", "bottleneck_dim", "in_context_len"),
    *("in_context_start", "num_classes", "in_channels"),
)
# What may be stated, and when it is believed.
BELIEVED = {
    **dict.fromkeys(SIZES, _is_count),
    **dict.fromkeys(("attn_dropout", "proj_dropout"), lambda v: is_number(v) and 0 <= v < 1),
    **dict.fromkeys(("mlp_ratio", "noise_scale"), lambda v: is_number(v) and v > 0),
    **dict.fromkeys(("solver", "method"), _is_text_of(CALLS_PER_STEP)),
    "model": lambda v: isinstance(v, str) and v.partition("/")[0] in PRESETS,
    "prediction": _is_text_of(SPACES),
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


def from_record(values: Mapping) -> dict:
    """Return what is believed of a mapping with our names."""
    return {name: values[name] for name, holds in BELIEVED.items() if name in values and holds(values[name])}


def from_arguments(arguments: Mapping) -> dict:
    """Return what is believed of the reference's `args`."""
    renamed = {ARGUMENT_NAMES.get(name, name): value for name, value in arguments.items() if isinstance(name, str)}
    if "interval_min" in renamed and "interval_max" in renamed:
        renamed.setdefault("guidance_interval", (renamed["interval_min"], renamed["interval_max"]))
    return from_record(renamed)


def to_arguments(stated: Mapping) -> dict:
    """Return the reference's words for sizes and settings, beside ours; plain values only."""
    theirs = {theirs: stated[ours] for theirs, ours in ARGUMENT_NAMES.items() if ours in stated}
    low, high = stated["guidance_interval"]
    return {**stated, **theirs, "interval_min": low, "interval_max": high}


def from_pipeline(pipeline: JiTPipeline) -> dict:
    """Return all that a pipeline knows of itself."""
    scheduler = pipeline.scheduler.config
    values = {**pipeline.transformer.config, **scheduler, **pipeline.config, "prediction": scheduler.prediction_type}
    return from_record(values)
