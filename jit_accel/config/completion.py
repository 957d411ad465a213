"""Settings completed once: what was left open follows from devices, data, checkpoint and weights to start from."""

import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from jit_accel.base.errors import UserError
from jit_accel.config.checks import LORA_TARGETS, check, image_size, model_name, steps_of
from jit_accel.config.facts import Facts, Plan, Start
from jit_accel.config.groups import DECAY_FRACTION, OptimConfig
from jit_accel.config.identity import run_folder, run_name
from jit_accel.config.presets import (
    PRESETS,
    Preset,
    grid_of,
    parse_model_name,
    plain_size,
    sizes_near,
    usual_noise_scale,
)
from jit_accel.config.settings import Config
from jit_accel.config.techniques import refuse_condition, warnings_of_techniques

PAPER_EPOCHS, PAPER_WARMUP_EPOCHS = 200.0, 5.0
WARMUP_SHARE_OF_RUN = 0.1
PAPER_EMA_DECAYS = (0.9996, 0.9998, 0.9999)
# The memory of an EMA, 1 / (1 - decay) steps, may be this share of a run; beyond it the average
# still holds the random weights of the start.
EMA_SHARE_OF_RUN = 0.1
# Up to that many images (40 passes over ImageNet) a run is short, and the paper's rate would leave it at its start.
SHORT_RUN_IMAGES = 50_000_000
SHORT_RUN_RATES = {"adamw": 3e-4, "muon": 1e-3}
TUNING_RATE = 1e-4  # what diffusers' LoRA training scripts start from
USUAL_WORKERS = 8  # more decoding processes rarely help; one core is left to the training itself
# The sizes that all of a network hangs on; others may differ from those of weights to start from.
SIZES = ("depth", "hidden_size", "num_heads", "mlp_ratio")
DEFAULT_METHOD = "etd2"  # of sheets and pipelines: docs/generate.md compares
# What a checkpoint knows of the weights that its run started from, which need not be there any more.
OF_START = ("model", "img_size", "noise_scale", "guidance_scale")


def complete(config: Config, facts: Facts) -> tuple[Config, Plan, list[str]]:
    """Return the settings, none of them open, the run's lengths, and warnings; `UserError` if one defies the facts."""
    config = started(config, facts.saved, facts.start)
    optim, lora_rank, size = config.optim, config.tune.lora_rank, image_size(config)
    preset, _ = parse_model_name(config.model.model)
    plan = plan_run(optim, facts)
    longest = EMA_SHARE_OF_RUN * plan.total_steps
    decays = [str(decay) for decay in PAPER_EMA_DECAYS if 1 / (1 - decay) <= longest]
    guidance = 2.0 if facts.start is None or facts.start.guidance_scale is None else facts.start.guidance_scale
    learns_it = config.objective.model_guidance > 1
    if learns_it and not facts.is_labelled:
        rule = "is a guidance on labels, and this data has none: leave it out."
        raise UserError(rule, about="model_guidance", value=config.objective.model_guidance)
    # A run that began before there was a choice stays as it was.
    method = config.sample.method or (None if facts.saved and facts.saved.get("method") is None else DEFAULT_METHOD)
    defaults: dict[str, Any] = {
        "img_size": size,
        "lanes": None if facts.saved else facts.lanes,
        "num_workers": max(0, min(USUAL_WORKERS, facts.cores - 1)) if facts.is_encoded else 0,
        "num_classes": _num_classes(config.model.num_classes, facts.num_classes),
        "proj_dropout": preset.proj_dropout,
        "noise_scale": 1.0 if config.objective.path == "bridge" else usual_noise_scale(size),
        "learning_rate": default_rate(config, plan)[0],
        "decay_fraction": DECAY_FRACTION if optim.lr_schedule == "wsd" else None,
        "guidance_scale": guidance if facts.is_labelled and not facts.condition_channels and not learns_it else 1.0,
        "method": method,
        "num_inference_steps": 25 if method in (DEFAULT_METHOD, "ab2") else 50,
        "paired_every_steps": _paired_every_steps(config, facts, plan),
        "lora_alpha": float(lora_rank) if lora_rank else None,
        "lora_targets": LORA_TARGETS if lora_rank else None,
        "epochs": PAPER_EPOCHS if optim.max_steps is None else None,
        "warmup_steps": plan.warmup_steps if optim.warmup_epochs is None else None,
        "wandb_name": run_name(config.tracking),
    }
    flat = config.flat()
    config = config.updated(
        **{name: default for name, default in defaults.items() if flat[name] is None},
        gradient_accumulation_steps=facts.accumulation,
        mixed_precision=facts.precision,
        condition_channels=config.condition.condition_channels or facts.condition_channels,
        value_range=facts.value_range or config.data.value_range,
        output_dir=run_folder(config),
        resume=os.path.expanduser(config.run.resume),
        ema_decays=tuple(dict.fromkeys(optim.ema_decays or ("auto", *decays))),
    )
    if plan.refused_warmup_steps:
        config = config.updated(warmup_steps=plan.warmup_steps, warmup_epochs=None)
    check(config)
    _refuse_other_conditions(config, facts)
    if config.optim.optimizer == "muon" and facts.precision == "fp16":
        rule = "does not go with --mixed_precision fp16: use bf16 or no, or adamw."
        raise UserError(rule, about="optimizer", value="muon")
    tokens = math.prod(grid_of(image_size(config), parse_model_name(config.model.model)[1]))
    warnings = [*_warnings_of_length(config, plan), *_warnings_of_device(facts)]
    return config, plan, [*warnings, *warnings_of_techniques(config.technique, tokens)]


def plan_run(optim: OptimConfig, facts: Facts) -> Plan:
    """Return epochs as steps; `UserError` if the global batch is larger than the data."""
    global_batch, num_images = optim.batch_size * facts.processes * facts.accumulation, facts.num_images
    if global_batch > num_images:
        factors = f"{optim.batch_size} x {facts.processes} processes x {facts.accumulation} accumulation steps"
        raise UserError(
            f"must not be larger than the data set ({num_images} images): use a smaller batch or more images.",
            about="batch_size",
            value=f"{factors} = {global_batch}",
        )
    total = optim.max_steps or max(1, math.ceil((optim.epochs or PAPER_EPOCHS) * num_images / global_batch))
    warmup, usual = optim.warmup_steps, round(WARMUP_SHARE_OF_RUN * total)
    if warmup is None and optim.warmup_epochs is not None:
        warmup = round(optim.warmup_epochs * num_images / global_batch)
    elif warmup is None:
        warmup = min(round(PAPER_WARMUP_EPOCHS * num_images / global_batch), usual)
    if warmup > total:
        return Plan(total, usual, global_batch, num_images, refused_warmup_steps=warmup)
    return Plan(total, warmup, global_batch, num_images)


def default_rate(config: Config, plan: Plan) -> tuple[float, str]:
    """Return the learning rate of a run of this length for which none is given, and the reason in words."""
    paper = 5e-5 * plan.global_batch_size / 256
    is_short = plan.total_steps * plan.global_batch_size < SHORT_RUN_IMAGES
    rate = TUNING_RATE if config.tune.init_from else SHORT_RUN_RATES.get(config.optim.optimizer, 3e-4)
    if config.tune.lora_rank:
        return TUNING_RATE, "the default of adapters"
    if is_short and rate > paper:
        return rate, f"the default below {SHORT_RUN_IMAGES:,} images; the paper's rule would give {paper:.3g}"
    return paper, "the paper's rule, 5e-5 x global batch / 256"


def rate_in_words(given: Config, completed: Config, plan: Plan, is_resumed: bool) -> str:
    """Return a completed learning rate, with the reason for it unless it was given."""
    rate = f"{completed.optim.learning_rate:.3g}"
    if given.optim.learning_rate is not None:
        return rate
    return f"{rate} ({'as before' if is_resumed else default_rate(given, plan)[1]})"


def started(config: Config, saved: Mapping[str, Any], start: Start | None) -> Config:
    """Return the settings with what a checkpoint and the weights to start from leave no choice about.

    The default averages and rate depend on the length of the run, which may be another one now: a checkpoint's stay.
    """
    open_settings = {name for name, value in config.flat().items() if value is None}
    kept = ("ema_decays", "learning_rate", "lanes", *(OF_START if config.tune.init_from else ()))
    config = config.updated(**{name: saved[name] for name in kept if name in open_settings and name in saved})
    if start:
        return config.updated(**_of_start(config, start))
    return config.updated(model=model_name(config))


def _of_start(config: Config, start: Start) -> dict[str, Any]:
    refused, network = partial(UserError, about="init_from", value=start.path), start.network
    sizes = {name: network[name] for name in SIZES}
    known = [f"{name}/{network['patch_size']}" for name, preset in PRESETS.items() if _sizes(preset) == sizes]
    if not config.model.model and not known:
        raise refused(
            f"{_in_words(sizes)} is none of the sizes that can be trained ({', '.join(PRESETS)}): start from a "
            "network of one of these."
        )
    model = config.model.model or known[0]
    preset, patch = parse_model_name(model)
    if _sizes(preset) != sizes:
        raise refused(
            f"is of another size than --model {model}: {_in_words(sizes)} against {_in_words(_sizes(preset))}: "
            "leave --model out, or choose the size of the source."
        )
    if start.prediction != config.objective.prediction:
        raise refused(
            f"predicts {start.prediction}, and --prediction is {config.objective.prediction}: its last layer would "
            f"mean something else: use --prediction {start.prediction}."
        )
    trained = plain_size(network["img_size"])
    size = config.data.img_size or (16 * patch if sizes_near(trained, patch) else trained)
    settings: dict[str, Any] = {"model": model, "img_size": size}
    is_noisy = config.objective.path == "noise"
    if size == trained and config.objective.noise_scale is None and is_noisy:
        settings["noise_scale"] = start.noise_scale
    if config.tune.lora_rank and config.model.num_classes is None:
        settings["num_classes"] = network["num_classes"]
    return settings


def _sizes(preset: Preset) -> dict[str, float]:
    return {name: getattr(preset, name) for name in SIZES}


def _in_words(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in sizes.items())


def _refuse_other_conditions(config: Config, facts: Facts) -> None:
    """Raise `UserError` for settings of a condition that the data does not have."""
    channels, given = facts.condition_channels, config.condition
    if given.condition_channels != channels:
        rule = f"the condition of this data has {channels} channels: leave the flag out."
        rule = (
            rule if channels else "the data has no condition: add --condition_from, such as downscale:4, or name one."
        )
        raise UserError(rule, about="condition_channels", value=given.condition_channels)
    for name, default in (("condition_inject", "add"), ("condition_bottleneck", None)):
        if not channels and (value := getattr(given, name)) != default:
            rule = "says how a condition enters the network, and there is none: add --condition_from."
            raise UserError(rule, about=name, value=value)
    refuse_condition(config.technique, channels)
    measured = config.evaluation
    if measured.paired_every_steps and not (channels and config.data.holdout):
        rule = "scores what is made of held-out conditions, and there are none: "
        remedy = "add --holdout, such as 0.02." if channels else "add --condition_from, such as downscale:4."
        raise UserError(rule + remedy, about="paired_every_steps", value=measured.paired_every_steps)
    if channels and measured.eval_every_steps:
        rule = "draws images without a condition, and the network is trained with one: use --paired_every_steps, and "
        rule += "python -m jit_accel.evaluate --pairs, which measures distances (--metrics fd) too."
        raise UserError(rule, about="eval_every_steps", value=measured.eval_every_steps)
    if config.objective.path == "bridge" and channels != config.model.in_channels:
        rule = "the path starts at the condition, and there is none: add --condition_from."
        if channels:
            rule = f"the condition has {channels} channels, and the image, to which the path leads from there, "
            rule += f"{config.model.in_channels}: take a condition with as many, or leave the flag out."
        raise UserError(rule, about="path", value="bridge")
    if not channels and not facts.has_vectors and config.sample.guidance_on == "condition":
        rule = "there is no condition: add --condition_from or --vector_column, or leave the flag out."
        raise UserError(rule, about="guidance_on", value="condition")


def _paired_every_steps(config: Config, facts: Facts, plan: Plan) -> int | None:
    """Return how often scores of pairs are measured where that is left open; None without pairs."""
    if not (facts.condition_channels and config.data.holdout):
        return None
    return (config.run.val_every_steps or plan.total_steps) if facts.has_scores else 0


def _num_classes(given: int | None, data_classes: int | None) -> int:
    if given is None and data_classes is None:
        raise UserError(
            "the labels of this stream are not known before it is read: give their number.", about="num_classes"
        )
    if None not in (given, data_classes) and given < data_classes:
        raise UserError(
            f"the data has {data_classes} classes (labels 0 to {data_classes - 1}): leave the flag out, or give at "
            "least that number.",
            about="num_classes",
            value=given,
        )
    return given or data_classes


def _warnings_of_length(config: Config, plan: Plan) -> Iterator[str]:
    """Yield what a run of this length will not achieve with these completed settings, each with its remedy."""
    total = plan.total_steps
    is_from_scratch = config.tune.init_from is None  # else weights and averages start as good as the source
    for decay in config.optim.ema_decays if is_from_scratch else ():
        memory_steps = 0.0 if decay == "auto" else 1 / (1 - float(decay))
        if memory_steps > EMA_SHARE_OF_RUN * total:
            yield (
                f"--ema_decays {decay} averages over {memory_steps:,.0f} steps, but the run has only {total:,}: its "
                "samples will be noise, or far behind the weights. Use auto, or a longer run."
            )
    if plan.refused_warmup_steps:
        yield (
            f"the warm-up that was asked for takes {plan.refused_warmup_steps:,} steps, and the run only {total:,}: it "
            f"is {plan.warmup_steps:,} steps now (--warmup_steps sets another)."
        )
    if plan.warmup_steps > 0.5 * total:
        yield (
            f"the warm-up takes {plan.warmup_steps:,} of the run's {total:,} steps: shorten it (--warmup_steps) "
            "or lengthen the run."
        )
    if config.objective.model_guidance > 1 and config.sample.guidance_scale != 1:
        yield (
            f"--guidance_scale {config.sample.guidance_scale:g} guides samples of a network that has learnt guidance "
            f"(--model_guidance {config.objective.model_guidance:g}), at two passes a step: 1 is what it is for."
        )
    steps = steps_of(config.run.profile_steps or "")
    if steps and steps[0] > total:
        yield f"--profile_steps {config.run.profile_steps}: the run ends with step {total:,}, so nothing is profiled."
    learning_rate = config.optim.learning_rate
    # AdamW moves a weight by about the learning rate a step, so their product bounds the distance travelled;
    # the paper's shortest run travels about 50, our shortest good one 0.3.
    if is_from_scratch and learning_rate * total < 0.3:
        longer = "--epochs" if config.optim.max_steps is None else "--max_steps"
        usual = SHORT_RUN_RATES.get(config.optim.optimizer, 3e-4)
        higher = f", or faster (--learning_rate {usual:g})" if learning_rate < usual else ""
        yield (
            f"{total:,} steps at a learning rate of {learning_rate:.1e} hardly move the weights: expect grey or noisy "
            f"samples. Train longer ({longer}){higher}."
        )


def _warnings_of_device(facts: Facts) -> Iterator[str]:
    """Yield what makes this device slower than it could be, each with its remedy."""
    if facts.precision == "no" and facts.is_good_at_bf16:
        yield "training in float32; --mixed_precision bf16 is faster on this device."
    if facts.precision == "bf16" and not facts.has_bf16:
        yield "this device only emulates bf16, up to a hundred times slower: use --mixed_precision no."
    if facts.threads is not None and facts.threads < facts.cores:
        yield (
            f"training uses {facts.threads} of {facts.cores} cores: set OMP_NUM_THREADS={facts.cores}, which "
            "`accelerate launch` sets to 1 unless --num_cpu_threads_per_process says otherwise."
        )
