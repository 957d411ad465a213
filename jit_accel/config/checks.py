"""Settings that cannot be right, found before anything is loaded. A range is a row of `RANGES`."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from inspect import formatannotation
from types import SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jit_accel.base.errors import MOST, UserError, check_places, check_ranges, lookup, shown
from jit_accel.config.groups import (
    DEFAULT_MODEL,
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_STEPS,
    MOST_WORKERS,
    problem_of_raw,
    problem_of_separator,
)
from jit_accel.config.presets import parse_model_name, sides_of, sizes_near
from jit_accel.config.run_groups import TRACKERS, HubConfig
from jit_accel.config.settings import SETTINGS, Config
from jit_accel.config.techniques import contradictions_of_techniques

LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")

MOST_PROFILED = 100  # steps

# What holds, in words, and for which settings. None means "not given" and passes.
RANGES: list[tuple[Callable[[Any], bool], str, str]] = [
    (
        lambda v: all(1 <= side <= MOST_PIXELS for side in sides_of(v)),
        f"at least 1 and at most {MOST_PIXELS:,}",
        "img_size",
    ),
    (lambda v: 1 <= v <= MOST_STEPS, f"at least 1 and at most {MOST_STEPS:,}", "num_inference_steps"),
    (lambda v: 1 <= v <= MOST_STEPS, f"at least 1 and at most {MOST_STEPS:,}", "eval_num_inference_steps"),
    (lambda v: 2 <= v <= MOST_IMAGES, f"at least 2 and at most {MOST_IMAGES:,}", "eval_images"),
    (lambda v: 1 <= v <= MOST_CLASSES, f"at least 1 and at most {MOST_CLASSES:,}", "num_classes"),
    (lambda v: v >= 1, "at least 1", "shuffle_buffer batch_size gradient_accumulation_steps max_steps"),
    (lambda v: v >= 1, "at least 1", "lanes keep_checkpoints log_every_steps val_images paired_images"),
    (lambda v: v >= 1, "at least 1; leave it out to train all weights", "lora_rank"),
    (lambda v: 1 <= v <= MOST_CHANNELS, f"at least 1 and at most {MOST_CHANNELS}", "in_channels"),
    (lambda v: -math.inf < v[0] < v[1] < math.inf, "two numbers, the smaller one first", "value_range"),
    (lambda v: 0 <= v <= MOST_WORKERS, f"0 or more and at most {MOST_WORKERS:,}", "num_workers"),
    (lambda v: v >= 0, "0 or more", "warmup_steps save_every_steps sample_every_steps val_every_steps"),
    (lambda v: v >= 0, "a number of steps, or 0 for never", "average_snapshots"),
    (lambda v: v >= 0, "0 or more", "eval_every_steps paired_every_steps"),
    (lambda v: 0 <= v < math.inf, "0 or more", "warmup_epochs min_learning_rate weight_decay"),
    (lambda v: 0 <= v < math.inf, "0 or more (1 = no guidance)", "guidance_scale"),
    (lambda v: 0 < v < math.inf, "positive", "lora_alpha P_std noise_scale epochs learning_rate"),
    (math.isfinite, "finite", "P_mean"),
    (lambda v: 0 <= v < 1, "in [0, 1)", "proj_dropout attn_dropout lora_dropout token_routing"),
    (lambda v: 0 < v < 1, "between 0 and 1, both excluded", "t_eps"),
    (lambda v: 0 <= v <= 1, "a share between 0 and 1", "max_bad_images augment"),
    (lambda v: isinstance(v, str) or 0 <= v <= 0.5, "a share between 0 (none) and 0.5, or a split's name", "holdout"),
    (lambda v: 0 <= v <= 1, "a probability between 0 and 1", "label_drop_prob condition_drop_prob"),
    (lambda v: 1 <= v < math.inf, "1 (none) or more, such as 2", "model_guidance"),
    (lambda v: 0 <= v <= MOST_CHANNELS, f"at most {MOST_CHANNELS}, or 0 for those of the data", "condition_channels"),
    (lambda v: v >= 1, "at least 1; leave it out for none", "condition_bottleneck"),
    (lambda v: 0 < v <= 1, "a share of the run above 0 and at most 1", "decay_fraction"),
    (lambda v: all(0 <= beta < 1 for beta in v), "two numbers in [0, 1)", "adam_betas"),
    (lambda v: v >= 0, "positive, or 0 for no clipping", "max_grad_norm"),
    (lambda v: 0 <= v < math.inf, "a number of minutes, or 0 for no limit", "max_stall_minutes"),
    (lambda v: 0 <= v < 2**63, "0 or a positive 63-bit number", "seed"),
    (lambda v: v == 0 or 1 < v < math.inf, "more than 1, or 0 for never", "health_loss_jump"),
    (
        lambda v: 0 <= v < math.inf,
        "positive, or 0 for never",
        "health_max_grad_norm health_min_grad_norm health_min_contrast",
    ),
    (lambda v: v >= 0, "positive, or 0 for never", "health_flat_steps"),
    (lambda v: 0 <= v <= 1, "a share of the time between 0 (never) and 1", "health_max_wait"),
    (lambda v: 0 <= v <= 1, "a share of the values between 0 (never) and 1", "health_max_saturated"),
    (lambda v: v == 0 or 1 <= v < math.inf, "1 or more, or 0 for never", "health_patch_grid"),
]


def check(config: Config) -> None:
    """Raise `UserError` for every wrong setting that can be found without the data or a device."""
    values, name = config.flat(), model_name(config)
    check_places(values)
    check_ranges(values, ((name, holds, rule) for holds, rule, names in RANGES for name in names.split()))
    patch, size = parse_model_name(name)[1] if name else 1, image_size(config)
    if max(sides_of(size)) > MOST_PIXELS:
        rule = f"16 patches a side are {size:,} pixels, and images may have {MOST_PIXELS:,}: choose a smaller patch."
        raise UserError(rule, about="model", value=name)
    if near := sizes_near(size, patch):
        rule = f"must be a multiple of the patch size {patch} ({name}): use {near}, or a model with another patch size."
        raise UserError(rule, about="img_size", value=shown(size))
    if (text := config.run.profile_steps) is not None and steps_of(text) is None:
        rule = f"must be two numbers: 10:15 are the steps 10 to 14; {MOST_PROFILED} at most, since memory holds them."
        raise UserError(rule, about="profile_steps", value=text)
    for name in config.tracking.report_to:
        if ":" not in name:  # else it is imported where training begins
            lookup(dict.fromkeys(TRACKERS), name, "report_to")
    _refuse(_contradictions_of_data, values)
    _refuse(_contradictions, values)
    _refuse(contradictions_of_techniques, values)
    check_hub(config.hub)


def check_hub(hub: HubConfig) -> None:
    """Raise `UserError` unless these settings say completely, or not at all, where to push to."""
    _refuse(_contradictions_of_hub, vars(hub))


def _contradictions_of_data(s: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Yield as `_contradictions` does, of what the data is."""
    if not s.data_path.strip():
        yield "data_path", "is empty: give a folder of images, or what else --help lists."
    made = [name for name in ("condition_from", "condition_path", "condition_column") if getattr(s, name) is not None]
    if len(made) > 1:
        yield made[1], f"says where conditions come from, as --{made[0]} {getattr(s, made[0])} does: give one of them."
    if problem := problem_of_separator(s.label_separator, s.label_column):
        yield "label_separator", problem
    if problem := problem_of_raw(s.raw_shape, s.raw_dtype):
        yield problem
    if "" in s.vector_column or len(set(s.vector_column)) < len(s.vector_column):
        yield "vector_column", "names a column twice, or none: give each once."


def _contradictions(s: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Yield the setting to blame, and the rule with the remedy, for each way in which settings do not fit together."""
    if s.init_from is not None and not s.init_from.strip():
        yield "init_from", "is empty: give a pipeline folder, a run, a checkpoint or a Hub id."
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if s.lora_rank is None and getattr(s, name):
            yield name, "is for an adapter: add --lora_rank, such as 16."
    if s.lora_rank is not None and s.init_from is None:
        yield "lora_rank", "an adapter needs trained weights to stand on: add --init_from FOLDER."
    if s.lora_targets is not None and not any(target.strip() for target in s.lora_targets):
        yield "lora_targets", f"names no layer; the default is {' '.join(LORA_TARGETS)}."
    if s.lora_rank is not None and s.optimizer == "muon":
        rule = "is for whole matrices; on the thin factors of --lora_rank every direction would get the same step, "
        yield "optimizer", rule + "however little it matters: use --optimizer adamw."
    for name, other in (("epochs", "max_steps"), ("warmup_epochs", "warmup_steps")):
        if None not in (getattr(s, name), getattr(s, other)):
            yield name, f"says the same as --{other} {getattr(s, other)}: give only one of them."
    for name, other in (("warmup_epochs", "epochs"), ("warmup_steps", "max_steps")):
        length = getattr(s, other)
        if length is not None and (getattr(s, name) or 0) > length:
            rule = f"must not be longer than the run (--{other} {length})"
            yield name, f"{rule}: shorten the warm-up or lengthen the run."
    if s.path == "bridge" and s.noise_scale not in (None, 1.0):
        yield "noise_scale", "scales the noise, of which --path bridge has none: leave it out."
    if s.path == "bridge" and s.prediction == "e":
        rule = "would be the start, which of a --path bridge is known: it says nothing of the image; use x or v."
        yield "prediction", rule
    if s.in_channels not in (1, 3):
        rule = f"and images of --in_channels {s.in_channels} are neither: leave it out."
        if s.eval_every_steps:
            yield "eval_every_steps", f"compares features of grey or colour pictures, {rule}"
        if any(loss.startswith("features") for loss in s.aux_loss):
            yield "aux_loss", f"features are of grey or colour pictures, {rule}"
        if (s.condition_from or "").startswith("jpeg"):
            yield "condition_from", f"JPEGs are grey or colour pictures, {rule}"
    if s.aux_feature_weights is not None and not any(loss.startswith("features") for loss in s.aux_loss):
        yield "aux_feature_weights", "are of a loss that is not asked for: add --aux_loss features=0.05."
    if s.learning_rate is not None and s.min_learning_rate > s.learning_rate:
        yield "min_learning_rate", f"must not be above --learning_rate {s.learning_rate}."
    if s.ema_decays == []:
        yield "ema_decays", "needs at least one value; leave it out for the default, or write auto."
    for decay in s.ema_decays or ():
        if not _is_decay(decay):
            yield "ema_decays", f"each must be auto or a number in [0, 1), such as 0.9999, and {decay!r} is not."
    for tag in s.wandb_tags:
        if not 1 <= len(tag.strip()) <= 64:
            yield "wandb_tags", f"W&B wants 1 to 64 characters a tag: shorten {tag!r}, or leave it out."
    if s.eval_every_steps and any(
        step % s.eval_every_steps == 0 for step in (steps_of(s.profile_steps or "") or ())[:-1]
    ):
        rule = f"memory would hold the evaluation between them (--eval_every_steps {s.eval_every_steps}): take others."
        yield "profile_steps", rule
    if s.model_guidance > 1 and s.label_drop_prob == 0:
        yield "model_guidance", "leads away from no class, which the network never sees: raise --label_drop_prob."
    for name in ("wandb_log_model", "wandb_watch", "wandb_class_images"):
        if getattr(s, name) and not s.use_wandb and "wandb" not in s.report_to:
            yield name, "says what is sent to W&B, but nothing is: add --use_wandb."
    if s.wandb_aliases and not s.wandb_log_model:
        yield "wandb_aliases", "names an artifact, but none is sent: add --wandb_log_model."
    if any(not alias.strip() or set(alias) & set("/:") for alias in s.wandb_aliases):
        yield "wandb_aliases", "an alias of W&B has at least one character, and neither / nor : in it."
    if not 1 <= len(s.wandb_project) <= 128 or set(s.wandb_project) & set("/\\#?%:"):
        rule = "must have 1 to 128 characters, none of them / \\ # ? % or : (the team goes into --wandb_entity)."
        yield "wandb_project", rule


def _contradictions_of_hub(s: SimpleNamespace) -> Iterator[tuple[str, str]]:
    if not s.push_to_hub:
        for name in ("hub_model_id", "hub_private"):
            if getattr(s, name):
                yield name, "says where to push, but nothing is pushed: add --push_to_hub."
    elif s.hub_model_id is None:
        yield "push_to_hub", "needs the repository to push to: add --hub_model_id owner/name."
    elif not _is_repository(s.hub_model_id):
        rule = "must be owner/name, such as alice/flowers-64: letters, digits, and - _ . inside (no -- or ..)"
        yield "hub_model_id", f"{rule}, 96 characters at most."


def _refuse(contradictions: Callable[..., Iterator[tuple[str, str]]], values: Mapping[str, Any]) -> None:
    for name, rule in contradictions(SimpleNamespace(**values)):
        raise UserError(rule, about=name, value=None if values[name] is True else shown(values[name]) or None)


def model_name(config: Config) -> str | None:
    """Return the model's name; None where only the weights to start from know it."""
    return config.model.model or (None if config.tune.init_from else DEFAULT_MODEL)


def image_size(config: Config) -> int | tuple[int, int]:
    """Return the size of the training images in pixels: as set, or 16 patches a side as in the paper (256 tokens)."""
    return config.data.img_size or 16 * parse_model_name(config.model.model or DEFAULT_MODEL)[1]


def _is_repository(name: str) -> bool:
    """Return whether this is an owner/name that the Hub allows."""
    # huggingface_hub.utils.validate_repo_id's rule, and an owner, so that the card can name the repository.
    parts = name.split("/")
    is_odd = len(name) > 96 or name.endswith(".git") or re.search(r"--|\.\.", name)
    return not is_odd and len(parts) == 2 and all(re.fullmatch(r"\w(?:[\w.-]*\w)?", part, re.ASCII) for part in parts)


def alternatives(hint: Any) -> tuple:
    """Return the types of which `hint` allows each."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def as_type(name: str, value: Any) -> Any:
    """Return a value as the setting `name` wants it, int as float and list as tuple; `UserError` for other types."""
    hint = SETTINGS[name].type
    for part in value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, int) and part.bit_length() > 64:  # of many more it could not even be said
            raise UserError(f"must be at most {MOST:,}.", about=name, value=f"a number of {part.bit_length()} bits")
    for choice in alternatives(hint):
        parts, kind = get_args(choice), get_origin(choice) or choice
        if kind is tuple:
            kinds = (int, float) if parts[0] is float else parts[:1]
            is_list = isinstance(value, list | tuple) and (... in parts or len(parts) == len(value))
            if is_list and all(type(part) in kinds for part in value):
                return tuple(map(parts[0], value))
        elif kind is float and type(value) is int:
            return float(value)
        elif value in parts if kind is Literal else type(value) is kind:
            return value
    raise UserError(f"must be of the type {formatannotation(hint)}.", about=name, value=repr(value))


def steps_of(text: str) -> range | None:
    """Return the steps that `10:15` means: 10 to 14, as in Python; None where it means none, or more than can be."""
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text, re.ASCII)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    return steps if 1 <= len(steps) <= MOST_PROFILED and steps[0] >= 1 else None


def _is_decay(text: str) -> bool:
    try:
        return text == "auto" or 0 <= float(text) < 1
    except ValueError:
        return False
