"""A run in words and numbers: for the terminal, the trackers and the model card."""

from __future__ import annotations

import torch

from jit_accel import __version__
from jit_accel.data.sources import Source


def describe_data(source: Source) -> str:
    images = "unknown number of" if source.num_images is None else f"{source.num_images:,}"
    classes = f"{source.num_classes or 'unknown number of'} classes" if source.is_labelled else "unlabelled"
    return f"{source.name} ({images} images, {classes})"


def changed_settings(saved: dict, now: dict) -> str:
    """What a resumed run does otherwise than the checkpoint's, in words."""
    return ", ".join(
        f"{name} {saved.get(name)} → {value}"
        for name, value in now.items()
        if name not in ("resume", "output_dir") and saved.get(name) != value
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def record_run(trainer) -> dict:
    """All settings of a `Trainer`, and what they run on."""
    return {
        **trainer.config.flat(),
        "global_batch_size": trainer.plan.global_batch_size,
        "total_steps": trainer.plan.total_steps,
        "num_parameters": sum(p.numel() for p in trainer.network.parameters()),
        "num_images": trainer.plan.num_images,
        "num_processes": trainer.accelerator.num_processes,
        "device": device_name(trainer.accelerator.device),
        "torch_version": torch.__version__,
        "jit_accel_version": __version__,
    }
