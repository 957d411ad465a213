"""What the settings come to: checked before anything is loaded, completed once data and devices are known."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jit_accel.config import DEFAULT_MODEL, TRACKERS, Config, HubConfig, OptimConfig, TrackingConfig
from jit_accel.errors import UserError, lookup
from jit_accel.presets import parse_model_name

PAPER_EMA_DECAYS = (0.9996, 0.9998, 0.9999)
PAPER_EPOCHS = 200.0
PAPER_WARMUP_EPOCHS = 5.0
# The memory of an EMA, 1 / (1 - decay) steps, may be this share of a run; beyond it the average
# still holds the random weights of the start (see `ema.py`).
EMA_SHARE_OF_RUN = 0.1
LORA_LEARNING_RATE = 1e-4  # what diffusers' LoRA training scripts start from
LORA_TARGETS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")


def image_size(config: Config) -> int:
    """Training resolution in pixels: as set, or 16 patches a side as in the paper (256 tokens)."""
    return config.data.img_size or 16 * parse_model_name(config.model.model or DEFAULT_MODEL)[1]


# Flag, rule as a predicate, rule in words. None means "not given" and passes.
RANGES = [
    ("img_size", lambda v: v >= 1, "at least 1"),
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
    ("eval_images", lambda v: v >= 2, "at least 2"),
    ("eval_num_inference_steps", lambda v: v >= 1, "at least 1"),
    ("guidance_scale", lambda v: 0 <= v < math.inf, "0 or more (1 = no guidance)"),
    ("num_inference_steps", lambda v: v >= 1, "at least 1"),
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
            raise UserError(f"--{name} {values[name]}: must be {rule}.")
    _check_image_size(config)
    _check_tuning(config)
    _check_lengths(config.optim)
    _check_tracking(config.tracking)
    check_hub(config.hub)
    for decay in config.optim.ema_decays or ():
        check_ema_decay(decay)
    if config.optim.ema_decays is not None and not config.optim.ema_decays:
        raise UserError("--ema_decays: needs at least one value; leave it out for the default, or write auto.")


def _check_tuning(config: Config) -> None:
    tune = config.tune
    if tune.init_from is not None and not tune.init_from.strip():
        raise UserError("--init_from: is empty: give a pipeline folder, a run, a checkpoint or a Hub id.")
    if tune.lora_rank is None:
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(tune, name):
                raise UserError(f"--{name} {getattr(tune, name)}: is for an adapter: add --lora_rank, such as 16.")
        return
    if tune.init_from is None:
        raise UserError(
            f"--lora_rank {tune.lora_rank}: an adapter needs trained weights to stand on: add --init_from FOLDER."
        )
    if tune.lora_targets is not None and not any(target.strip() for target in tune.lora_targets):
        raise UserError(f"--lora_targets: names no layer; the default is {' '.join(LORA_TARGETS)}.")
    if config.optim.optimizer == "muon":
        raise UserError(
            "--optimizer muon: is for whole matrices; on the thin factors of --lora_rank every direction would get the "
            "same step, however little it matters: use --optimizer adamw."
        )


def _check_image_size(config: Config) -> None:
    if config.model.model is None:  # the source of --init_from will tell
        return
    _, patch = parse_model_name(config.model.model)
    size = image_size(config)
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        raise UserError(
            f"--img_size {size}: must be a multiple of the patch size {patch} ({config.model.model}): "
            f"use {f'{below} or ' if below else ''}{above}, or a model with another patch size."
        )


def _check_lengths(optim: OptimConfig) -> None:
    for one, other in (("epochs", "max_steps"), ("warmup_epochs", "warmup_steps")):
        if getattr(optim, one) is not None and getattr(optim, other) is not None:
            raise UserError(
                f"--{one} {getattr(optim, one)} and --{other} {getattr(optim, other)} "
                "say the same thing twice: give only one of them."
            )
    for name in ("epochs", "max_steps"):
        warmup_name = f"warmup_{name.removeprefix('max_')}"
        length, warmup = getattr(optim, name), getattr(optim, warmup_name)
        if length is not None and warmup is not None and warmup > length:
            raise UserError(
                f"--{warmup_name} {warmup}: must not be longer than the run (--{name} {length}): "
                "shorten the warm-up or lengthen the run."
            )
    if optim.learning_rate is not None and optim.min_learning_rate > optim.learning_rate:
        raise UserError(
            f"--min_learning_rate {optim.min_learning_rate}: must not be above --learning_rate {optim.learning_rate}."
        )


def _check_tracking(tracking: TrackingConfig) -> None:
    for name in tracking.report_to:
        lookup(TRACKERS, name, "--report_to")
    for tag in tracking.wandb_tags:
        if not 1 <= len(tag.strip()) <= 64:
            raise UserError(f"--wandb_tags {tag!r}: W&B wants 1 to 64 characters a tag: shorten it, or leave it out.")
    project = tracking.wandb_project
    if not 1 <= len(project) <= 128 or set(project) & set("/\\#?%:"):
        raise UserError(
            f"--wandb_project {project!r}: must have 1 to 128 characters, none of them / \\ # ? % or : "
            "(the team goes into --wandb_entity)."
        )


def check_hub(hub: HubConfig) -> None:
    """Raise `UserError` unless these settings say completely, or not at all, where to push to."""
    if not hub.push_to_hub:
        for flag, value in (("hub_model_id", hub.hub_model_id), ("hub_private", hub.hub_private)):
            if value:
                raise UserError(f"--{flag} {value}: says where to push, but nothing is pushed: add --push_to_hub.")
        return
    if hub.hub_model_id is None:
        raise UserError("--push_to_hub: needs the repository to push to: add --hub_model_id owner/name.")
    # huggingface_hub.utils.validate_repo_id's rule, and an owner, so that the card can name the repository.
    parts = hub.hub_model_id.split("/")
    well_formed = len(parts) == 2 and len(hub.hub_model_id) <= 96 and not hub.hub_model_id.endswith(".git")
    if not well_formed or not all(re.fullmatch(r"\w(?:[\w.-]*\w)?", part, re.ASCII) for part in parts):
        well_formed = False
    if not well_formed or "--" in hub.hub_model_id or ".." in hub.hub_model_id:
        raise UserError(
            f"--hub_model_id {hub.hub_model_id}: must be owner/name, such as alice/flowers-64: letters, digits, "
            "and - _ . inside (no -- or ..), 96 characters at most."
        )


def check_ema_decay(decay: str) -> None:
    """Raise `UserError` unless `decay` is `auto` or a number in [0, 1)."""
    try:
        good = decay == "auto" or 0 <= float(decay) < 1
    except ValueError:
        good = False
    if not good:
        raise UserError(f"--ema_decays {decay}: each must be auto or a number in [0, 1), such as 0.9999.")


@dataclass(frozen=True)
class Plan:
    """The lengths and rates of a run, in optimizer steps.

    Attributes:
        num_images: images of one epoch, or None where a stream does not tell.
        global_batch_size: images per optimizer step, over all processes and micro-steps.
    """

    total_steps: int
    warmup_steps: int
    global_batch_size: int
    num_images: int | None

    def epoch_of(self, step: int) -> float:
        """Passes over the data after `step` optimizer steps (0 where the length is unknown)."""
        return step * self.global_batch_size / self.num_images if self.num_images else 0.0


def plan_run(optim: OptimConfig, *, num_images: int | None, world_size: int) -> Plan:
    """Turn epochs into steps.

    Raises:
        UserError: the global batch is larger than the data, or epochs of a stream of unknown length.
    """
    accumulation = optim.gradient_accumulation_steps or 1
    global_batch = optim.batch_size * world_size * accumulation
    if num_images is not None and global_batch > num_images:
        raise UserError(
            f"--batch_size {optim.batch_size} x {world_size} processes x {accumulation} accumulation steps = "
            f"{global_batch}: must not be larger than the data set ({num_images} images): use a smaller "
            "batch or more images."
        )
    epochs = optim.epochs if optim.epochs is not None else PAPER_EPOCHS
    if optim.max_steps is not None:
        total = optim.max_steps
    elif num_images is None:
        raise UserError("--epochs: this data set does not tell its length: give --max_steps instead.")
    else:
        total = max(1, math.ceil(epochs * num_images / global_batch))
    return Plan(total, _warmup_steps(optim, total, num_images, global_batch), global_batch, num_images)


def _warmup_steps(optim: OptimConfig, total: int, num_images: int | None, global_batch: int) -> int:
    if optim.warmup_steps is not None:
        warmup = optim.warmup_steps
    elif optim.warmup_epochs is not None:
        if num_images is None:
            raise UserError("--warmup_epochs: this data set does not tell its length: give --warmup_steps instead.")
        warmup = round(optim.warmup_epochs * num_images / global_batch)
    else:
        paper = PAPER_WARMUP_EPOCHS * (num_images or math.inf) / global_batch
        return round(min(paper, 0.1 * total))
    if warmup > total:
        raise UserError(
            f"the warm-up of {warmup} steps is longer than the run of {total}: shorten it (--warmup_steps)."
        )
    return warmup


def resolve(
    config: Config,
    plan: Plan,
    *,
    data_classes: int | None,
    gradient_accumulation_steps: int,
    mixed_precision: str,
    num_workers: int,
    is_labelled: bool = True,
) -> Config:
    """Fill in every setting that was left to the data or the device.

    Args:
        is_labelled: False where nothing tells the images apart; guidance towards their one class means nothing then.

    Raises:
        UserError: `--num_classes` is smaller than what the data holds.
    """
    preset, _ = parse_model_name(config.model.model)
    num_classes = config.model.num_classes or data_classes
    if num_classes is None:
        raise UserError("--num_classes: the labels of this stream are not known before it is read: give their number.")
    if data_classes is not None and num_classes < data_classes:
        raise UserError(
            f"--num_classes {num_classes}: the data has {data_classes} classes (labels 0 to {data_classes - 1}): "
            "leave the flag out, or give at least that number."
        )
    size = image_size(config)
    optim, tune, guidance = config.optim, config.tune, config.sample.guidance_scale
    decays = optim.ema_decays or (
        "auto",
        *(str(d) for d in PAPER_EMA_DECAYS if ema_memory_steps(d) <= EMA_SHARE_OF_RUN * plan.total_steps),
    )
    settings = {
        "img_size": size,
        "num_workers": num_workers,
        "num_classes": num_classes,
        "proj_dropout": preset.proj_dropout if config.model.proj_dropout is None else config.model.proj_dropout,
        "noise_scale": config.objective.noise_scale or max(1.0, size / 256),
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": optim.learning_rate
        or (LORA_LEARNING_RATE if tune.lora_rank else 5e-5 * plan.global_batch_size / 256),
        "ema_decays": tuple(dict.fromkeys(decays)),
        "mixed_precision": mixed_precision,
        "guidance_scale": (2.0 if is_labelled else 1.0) if guidance is None else guidance,
        "output_dir": config.run.output_dir or default_output_dir(config),
    }
    if tune.lora_rank:
        settings |= {
            "lora_alpha": float(tune.lora_alpha or tune.lora_rank),
            "lora_targets": tune.lora_targets or LORA_TARGETS,
        }
    if optim.epochs is None and optim.max_steps is None:
        settings["epochs"] = PAPER_EPOCHS
    if optim.warmup_epochs is None:
        settings["warmup_steps"] = plan.warmup_steps
    resolved = config.updated(**settings)
    check(resolved)
    return resolved


def default_output_dir(config: Config) -> str:
    """`runs/` and the W&B name, or a name that every process makes alike."""
    if config.tracking.wandb_name:
        name = config.tracking.wandb_name
    else:
        data = config.data.data_path.rstrip("/").rpartition("/")[2].removeprefix("builtin:")
        name = f"{data or 'data'}-{_what_is_trained(config)}"
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")
    return f"runs/{safe or 'run'}"


def _what_is_trained(config: Config) -> str:
    if config.model.model:
        return f"{config.model.model}-{image_size(config)}px"
    source = config.tune.init_from.rstrip("/").removesuffix("/pipeline").rpartition("/")[2]
    return f"from-{source}" + (f"-lora{config.tune.lora_rank}" if config.tune.lora_rank else "")


def ema_memory_steps(decay: float) -> float:
    """Steps over which an EMA of this decay averages."""
    return 1 / (1 - decay)


def warnings_for(config: Config, plan: Plan) -> list[str]:
    """What a run of this length will not achieve with these (resolved) settings, each with its remedy."""
    total, found = plan.total_steps, []
    is_from_scratch = config.tune.init_from is None  # else weights and averages start as good as the source
    for decay in config.optim.ema_decays if is_from_scratch else ():
        if decay != "auto" and ema_memory_steps(float(decay)) > EMA_SHARE_OF_RUN * total:
            found.append(
                f"--ema_decays {decay} averages over {ema_memory_steps(float(decay)):,.0f} steps, but the run has only "
                f"{total:,}: its samples will be noise. Use auto, or a longer run."
            )
    if plan.warmup_steps > 0.5 * total:
        found.append(
            f"the warm-up takes {plan.warmup_steps:,} of the run's {total:,} steps: shorten it (--warmup_steps) "
            "or lengthen the run."
        )
    learning_rate = config.optim.learning_rate
    # AdamW moves a weight by about the learning rate a step, so their product bounds the distance travelled;
    # the paper's shortest run travels about 50, our shortest good one 0.3.
    if is_from_scratch and learning_rate * total < 0.3:
        found.append(
            f"{total:,} steps at a learning rate of {learning_rate:.1e} hardly move the weights: expect grey or noisy "
            "samples. Train longer (--epochs), or see launch/recipes/my_images_64.yaml for settings that suit a "
            "small data set (such as --learning_rate 3e-4)."
        )
    return found
