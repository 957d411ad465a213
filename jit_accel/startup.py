"""From settings to a trainer: device, data, resolved configuration, output folder, checkpoint to continue."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, broadcast_object_list

from jit_accel.checkpoint import complete_checkpoints
from jit_accel.config import Config
from jit_accel.data.sources import Source, open_source
from jit_accel.errors import UserError
from jit_accel.resolve import default_output_dir, plan_run, resolve, warnings_for
from jit_accel.tracking import wandb_installed, warn
from jit_accel.trainer import Trainer, describe_data, device_name


def start(config: Config) -> int:
    """Build everything and train. Returns the exit code."""
    config = config.updated(output_dir=config.run.output_dir or default_output_dir(config))
    resuming = check_output_dir(config)
    accumulation = config.optim.gradient_accumulation_steps or env_int("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    precision = config.performance.mixed_precision or default_precision()
    accelerator = build_accelerator(config, accumulation, precision)
    try:
        with accelerator.main_process_first():
            source = open_source(
                config.data.data_path,
                data_format=config.data.data_format,
                image_column=config.data.image_column,
                label_column=config.data.label_column,
                streaming=config.data.streaming,
            )
        trainer = build_trainer(config, source, accelerator, accumulation, precision)
        with contextlib.closing(trainer.loader):
            if resuming:
                continue_from_checkpoint(trainer)
            return dry_run(trainer) if config.run.dry_run else trainer.run()
    finally:
        accelerator.end_training()


def build_trainer(
    config: Config, source: Source, accelerator: Accelerator, accumulation: int, precision: str
) -> Trainer:
    """Resolve the settings against data and devices, say what will happen, and build the trainer."""
    optim = replace(config.optim, gradient_accumulation_steps=accumulation)
    plan = plan_run(optim, num_images=source.num_images, world_size=accelerator.num_processes)
    config = resolve(
        config,
        plan,
        data_classes=max(source.num_classes or 0, len(source.class_names)) or None,
        gradient_accumulation_steps=accumulation,
        mixed_precision=precision,
        num_workers=default_num_workers() if config.data.num_workers is None else config.data.num_workers,
    )
    if config.optim.optimizer == "muon" and accelerator.distributed_type.value == "FSDP":
        raise UserError("--optimizer muon: needs whole matrices, which FSDP splits: use --optimizer adamw.")
    trainer = Trainer(config, plan, source, accelerator)
    if accelerator.is_main_process:
        introduce(trainer)
    return trainer


def introduce(trainer: Trainer) -> None:
    """Say in a few lines what is about to run, and what of it will not work."""
    config, plan, accelerator = trainer.config, trainer.plan, trainer.accelerator
    parameters = sum(p.numel() for p in trainer.network.parameters())
    epochs = f" ({plan.epoch_of(plan.total_steps):.4g} epochs)" if plan.num_images else ""
    print(
        f"Data:   {describe_data(trainer.source)}, {config.data.img_size} px\n"
        f"Model:  {config.model.model}, {parameters:,} parameters, predicts {config.objective.prediction}, "
        f"loss in {config.objective.loss_space}\n"
        f"Device: {accelerator.num_processes} x {device_name(accelerator.device)}, "
        f"precision {config.performance.mixed_precision}\n"
        f"Run:    {plan.total_steps:,} steps{epochs} of {plan.global_batch_size} images, "
        f"learning rate {config.optim.learning_rate:.3g}, {config.optim.optimizer}, "
        f"ema {' '.join(config.optim.ema_decays)} → {config.run.output_dir}",
        flush=True,
    )
    for message in warnings_for(config, plan):
        warn(message)
    if config.performance.mixed_precision == "no" and is_good_at_bf16(accelerator.device):
        warn("float32, as accelerate's configuration says; --mixed_precision bf16 is faster on this device.")


def check_output_dir(config: Config) -> bool:
    """Make sure that the run can write, and that it overwrites nobody's work. Returns whether to look for a checkpoint.

    Raises:
        UserError: not writable, or it holds another run.
    """
    folder, resume = Path(config.run.output_dir), config.run.resume
    held = [*complete_checkpoints(folder / "checkpoints"), *folder.glob("pipeline/model_index.json")]
    continues_here = resume == "auto" or (resume != "none" and folder.resolve() in Path(resume).resolve().parents)
    if resume not in ("none", "auto") and Path(resume).resolve() == folder.resolve():
        continues_here = True
    if held and not continues_here:
        raise UserError(
            f"--output_dir {folder}: holds another run ({held[-1].relative_to(folder)}): add --resume auto to "
            "continue it, or give another folder."
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: {existing} is not a folder that can be written to: give another.")
    if not config.run.dry_run:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable_{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--output_dir {folder}: cannot be written to ({error.strerror}): give another.") from None
    return resume != "none"


def continue_from_checkpoint(trainer: Trainer) -> None:
    """Load the checkpoint that `--resume` means; the main process chooses, so that all load the same."""
    resume = trainer.config.run.resume
    # Every process looks, so that a wrong path fails on all of them alike.
    choice = [trainer.checkpointer.find(resume)]
    broadcast_object_list(choice)
    if choice[0]:
        trainer.resume(choice[0])
    else:
        trainer.say(f"--resume auto: no checkpoint in {trainer.output_dir} yet, starting anew.")


def dry_run(trainer: Trainer) -> int:
    """One forward and backward; nothing is written."""
    loss = trainer.loss(next(trainer.loader)).mean()
    trainer.accelerator.backward(loss)
    trainer.say(f"Dry run: loss {loss.item():.4f} after one forward and backward. Everything is in place.")
    return 0


def build_accelerator(config: Config, accumulation: int, precision: str) -> Accelerator:
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    use_wandb = config.tracking.use_wandb and wandb_installed() and not config.run.dry_run
    return Accelerator(
        mixed_precision=precision,
        # As a plugin: the environment of `accelerate launch` overrides the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        log_with="wandb" if use_wandb else None,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def env_int(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() and int(value) > 0 else default


def default_precision() -> str:
    """What accelerate's configuration says, else bf16 where the device is good at it."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if configured in ("no", "fp16", "bf16"):
        return configured
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = (
        torch.device("cpu")
        if use_cpu or not torch.accelerator.is_available()
        else torch.accelerator.current_accelerator()
    )
    return "bf16" if is_good_at_bf16(device) else "no"


def is_good_at_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without these units a CPU emulates bf16 and takes up to a hundred times longer.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    return device.type in ("xpu", "hpu")


def default_num_workers() -> int:
    """One core of each process's share is left to the training itself; more than eight rarely help."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // env_int("LOCAL_WORLD_SIZE", 1) - 1))
