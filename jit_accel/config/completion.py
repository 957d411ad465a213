"""What the settings come to, completed once data and devices are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jit_accel.base.errors import UserError
from jit_accel.config.checks import LORA_TARGETS, check, image_size
from jit_accel.config.presets import parse_model_name
from jit_accel.config.settings import Config, OptimConfig

PAPER_EMA_DECAYS = (0.9996, 0.9998, 0.9999)
PAPER_EPOCHS = 200.0
PAPER_WARMUP_EPOCHS = 5.0
# The memory of an EMA, 1 / (1 - decay) steps, may be this share of a run; beyond it the average
# still holds the random weights of the start (see `ema.py`).
EMA_SHARE_OF_RUN = 0.1
LORA_LEARNING_RATE = 1e-4  # what diffusers' LoRA training scripts start from


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
            f"must not be larger than the data set ({num_images} images): use a smaller batch or more images.",
            about="batch_size",
            value=f"{optim.batch_size} x {world_size} processes x {accumulation} accumulation steps = {global_batch}",
        )
    epochs = optim.epochs if optim.epochs is not None else PAPER_EPOCHS
    if optim.max_steps is not None:
        total = optim.max_steps
    elif num_images is None:
        raise UserError("this data set does not tell its length: give --max_steps instead.", about="epochs")
    else:
        total = max(1, math.ceil(epochs * num_images / global_batch))
    return Plan(total, _warmup_steps(optim, total, num_images, global_batch), global_batch, num_images)


def _warmup_steps(optim: OptimConfig, total: int, num_images: int | None, global_batch: int) -> int:
    if optim.warmup_steps is not None:
        warmup = optim.warmup_steps
    elif optim.warmup_epochs is not None:
        if num_images is None:
            raise UserError(
                "this data set does not tell its length: give --warmup_steps instead.", about="warmup_epochs"
            )
        warmup = round(optim.warmup_epochs * num_images / global_batch)
    else:
        paper = PAPER_WARMUP_EPOCHS * (num_images or math.inf) / global_batch
        return round(min(paper, 0.1 * total))
    if warmup > total:
        raise UserError(
            f"the warm-up of {warmup} steps is longer than the run of {total}: shorten it.", about="warmup_steps"
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
        raise UserError(
            "the labels of this stream are not known before it is read: give their number.", about="num_classes"
        )
    if data_classes is not None and num_classes < data_classes:
        raise UserError(
            f"the data has {data_classes} classes (labels 0 to {data_classes - 1}): "
            "leave the flag out, or give at least that number.",
            about="num_classes",
            value=num_classes,
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
                f"{total:,}: its samples will be noise, or far behind the weights. Use auto, or a longer run."
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
