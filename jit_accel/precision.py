"""Which precision suits a device."""

from __future__ import annotations

import os

import torch


def default_precision() -> str:
    """What accelerate's configuration says, else bf16 where the device is good at it."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if configured in ("no", "fp16", "bf16"):
        return configured
    return "bf16" if is_good_at_bf16(chosen_device()) else "no"


def chosen_device() -> torch.device:
    """The device that Accelerate will choose."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def is_good_at_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without these units a CPU emulates bf16 and takes up to a hundred times longer.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    return device.type in ("xpu", "hpu")
