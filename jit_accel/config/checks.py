"""Settings that cannot be right, found before anything is loaded. A range is a row in `RANGES`."""

from __future__ import annotations

import math
import re

from jit_accel.base.errors import UserError, lookup
from jit_accel.config.presets import parse_model_name
from jit_accel.config.settings import (
    DEFAULT_MODEL,
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_STEPS,
    TRACKERS,
    Config,
    HubConfig,
    OptimConfig,
    TrackingConfig,
)

LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")


def image_size(config: Config) -> int:
    """Training resolution in pixels: as set, or 16 patches a side as in the paper (256 tokens)."""
    return config.data.img_size or 16 * parse_model_name(config.model.model or DEFAULT_MODEL)[1]


# Flag, rule as a predicate, rule in words. None means "not given" and passes.
RANGES = [
    ("img_size", lambda v: 1 <= v <= MOST_PIXELS, f"at least 1 and at most {MOST_PIXELS:,}"),
    ("shuffle_buffer", lambda v: v >= 1, "at least 1"),
    ("num_workers", lambda v: v >= 0, "0 or more"),
    ("max_bad_images", lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    ("holdout", lambda v: 0 <= v <= 0.5, "a share between 0 (none) and 0.5"),
    ("num_classes", lambda v: v >= 1, "at least 1"),
    ("in_channels", lambda v: v == 3, "3: grey and transparent images are converted to RGB, so leave it out"),
    ("proj_dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("attn_dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("lora_rank", lambda v: v >= 1, "at least 1; leave it out to train all weights"),
    ("lora_alpha", lambda v: 0 < v < math.inf, "positive"),
    ("lora_dropout", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("P_mean", math.isfinite, "finite"),
    ("P_std", lambda v: 0 < v < math.inf, "positive"),
    ("noise_scale", lambda v: 0 < v < math.inf, "positive"),
    ("t_eps", lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
    ("label_drop_prob", lambda v: 0 <= v <= 1, "a probability between 0 and 1"),
    ("batch_size", lambda v: v >= 1, "at least 1"),
    ("gradient_accumulation_steps", lambda v: v >= 1, "at least 1"),
    ("epochs", lambda v: 0 < v < math.inf, "positive"),
    ("max_steps", lambda v: v >= 1, "at least 1"),
    ("learning_rate", lambda v: 0 < v < math.inf, "positive"),
    ("warmup_epochs", lambda v: 0 <= v < math.inf, "0 or more"),
    ("warmup_steps", lambda v: v >= 0, "0 or more"),
    ("min_learning_rate", lambda v: 0 <= v < math.inf, "0 or more"),
    ("weight_decay", lambda v: 0 <= v < math.inf, "0 or more"),
    ("adam_betas", lambda v: all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
    ("max_grad_norm", lambda v: v >= 0, "positive, or 0 for no clipping"),
    ("seed", lambda v: 0 <= v < 2**63, "0 or a positive 63-bit number"),
    ("save_every_steps", lambda v: v >= 0, "0 or more"),
    ("keep_checkpoints", lambda v: v >= 1, "at least 1"),
    ("log_every_steps", lambda v: v >= 1, "at least 1"),
    ("sample_every_steps", lambda v: v >= 0, "0 or more"),
    ("val_every_steps", lambda v: v >= 0, "0 or more"),
    ("val_images", lambda v: v >= 1, "at least 1"),
    ("eval_every_steps", lambda v: v >= 0, "0 or more"),
    ("eval_images", lambda v: 2 <= v <= MOST_IMAGES, f"at least 2 and at most {MOST_IMAGES:,}"),
    ("eval_num_inference_steps", lambda v: 1 <= v <= MOST_STEPS, f"at least 1 and at most {MOST_STEPS:,}"),
    ("guidance_scale", lambda v: 0 <= v < math.inf, "0 or more (1 = no guidance)"),
    ("num_inference_steps", lambda v: 1 <= v <= MOST_STEPS, f"at least 1 and at most {MOST_STEPS:,}"),
    ("health_loss_jump", lambda v: v == 0 or 1 < v < math.inf, "more than 1, or 0 for never"),
    ("health_max_grad_norm", lambda v: 0 <= v < math.inf, "positive, or 0 for never"),
    ("health_min_grad_norm", lambda v: 0 <= v < math.inf, "positive, or 0 for never"),
    ("health_flat_steps", lambda v: v >= 0, "positive, or 0 for never"),
    ("health_max_wait", lambda v: 0 <= v <= 1, "a share of the time between 0 (never) and 1"),
]


def check(config: Config) -> None:
    """Find every wrong setting that can be found without the data or a device.

    Raises:
        UserError: names the flag, the value, the rule and the remedy.
    """
    values = config.flat()
    for name, holds, rule in RANGES:
        if values[name] is not None and not holds(values[name]):
            raise UserError(f"must be {rule}.", about=name, value=values[name])
    _check_image_size(config)
    _check_tuning(config)
    _check_lengths(config.optim)
    _check_tracking(config.tracking)
    check_hub(config.hub)
    for decay in config.optim.ema_decays or ():
        check_ema_decay(decay)
    if config.optim.ema_decays is not None and not config.optim.ema_decays:
        raise UserError("needs at least one value; leave it out for the default, or write auto.", about="ema_decays")


def _check_tuning(config: Config) -> None:
    tune = config.tune
    if tune.init_from is not None and not tune.init_from.strip():
        raise UserError("is empty: give a pipeline folder, a run, a checkpoint or a Hub id.", about="init_from")
    if tune.lora_rank is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(tune, name):
                raise UserError(
                    "is for an adapter: add --lora_rank, such as 16.", about=name, value=f"{getattr(tune, name)}"
                )
        return
    if tune.init_from is None:
        raise UserError(
            "an adapter needs trained weights to stand on: add --init_from FOLDER.",
            about="lora_rank",
            value=tune.lora_rank,
        )
    if tune.lora_targets is not None and not any(target.strip() for target in tune.lora_targets):
        raise UserError(f"names no layer; the default is {' '.join(LORA_TARGETS)}.", about="lora_targets")
    if config.optim.optimizer == "muon":
        raise UserError(
            "is for whole matrices; on the thin factors of --lora_rank every direction would get the same step, "
            "however little it matters: use --optimizer adamw.",
            about="optimizer",
            value="muon",
        )


def _check_image_size(config: Config) -> None:
    if config.model.model is None:  # the source of --init_from will tell
        return
    _, patch = parse_model_name(config.model.model)
    size = image_size(config)
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        raise UserError(
            f"must be a multiple of the patch size {patch} ({config.model.model}): "
            f"use {f'{below} or ' if below else ''}{above}, or a model with another patch size.",
            about="img_size",
            value=size,
        )


def _check_lengths(optim: OptimConfig) -> None:
    for one, other in (("epochs", "max_steps"), ("warmup_epochs", "warmup_steps")):
        if getattr(optim, one) is not None and getattr(optim, other) is not None:
            raise UserError(
                f"says the same as --{other} {getattr(optim, other)}: give only one of them.",
                about=one,
                value=getattr(optim, one),
            )
    for name in ("epochs", "max_steps"):
        warmup_name = f"warmup_{name.removeprefix('max_')}"
        length, warmup = getattr(optim, name), getattr(optim, warmup_name)
        if length is not None and warmup is not None and warmup > length:
            raise UserError(
                f"must not be longer than the run (--{name} {length}): shorten the warm-up or lengthen the run.",
                about=warmup_name,
                value=warmup,
            )
    if optim.learning_rate is not None and optim.min_learning_rate > optim.learning_rate:
        raise UserError(
            f"must not be above --learning_rate {optim.learning_rate}.",
            about="min_learning_rate",
            value=optim.min_learning_rate,
        )


def _check_tracking(tracking: TrackingConfig) -> None:
    for name in tracking.report_to:
        if ":" not in name:  # else it is imported where training begins
            lookup(TRACKERS, name, "report_to")
    for tag in tracking.wandb_tags:
        if not 1 <= len(tag.strip()) <= 64:
            raise UserError(
                "W&B wants 1 to 64 characters a tag: shorten it, or leave it out.", about="wandb_tags", value=f"{tag!r}"
            )
    project = tracking.wandb_project
    if not 1 <= len(project) <= 128 or set(project) & set("/\\#?%:"):
        raise UserError(
            "must have 1 to 128 characters, none of them / \\ # ? % or : (the team goes into --wandb_entity).",
            about="wandb_project",
            value=f"{project!r}",
        )


def check_hub(hub: HubConfig) -> None:
    """Raise `UserError` unless these settings say completely, or not at all, where to push to."""
    if not hub.push_to_hub:
        for flag, value in (("hub_model_id", hub.hub_model_id), ("hub_private", hub.hub_private)):
            if value:
                raise UserError(
                    "says where to push, but nothing is pushed: add --push_to_hub.", about=flag, value=value
                )
        return
    if hub.hub_model_id is None:
        raise UserError("needs the repository to push to: add --hub_model_id owner/name.", about="push_to_hub")
    # huggingface_hub.utils.validate_repo_id's rule, and an owner, so that the card can name the repository.
    parts = hub.hub_model_id.split("/")
    is_odd = len(hub.hub_model_id) > 96 or hub.hub_model_id.endswith(".git") or re.search(r"--|\.\.", hub.hub_model_id)
    if is_odd or len(parts) != 2 or not all(re.fullmatch(r"\w(?:[\w.-]*\w)?", part, re.ASCII) for part in parts):
        raise UserError(
            "must be owner/name, such as alice/flowers-64: letters, digits, "
            "and - _ . inside (no -- or ..), 96 characters at most.",
            about="hub_model_id",
            value=hub.hub_model_id,
        )


def check_ema_decay(decay: str) -> None:
    """Raise `UserError` unless `decay` is `auto` or a number in [0, 1)."""
    try:
        good = decay == "auto" or 0 <= float(decay) < 1
    except ValueError:
        good = False
    if not good:
        raise UserError("each must be auto or a number in [0, 1), such as 0.9999.", about="ema_decays", value=decay)
