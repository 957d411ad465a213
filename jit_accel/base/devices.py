"""The device of a run, and the precision that suits it."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jit_accel.base.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast; "no" has none


def chosen_precision(mixed_precision: str | None = None) -> str | None:
    """Return `--mixed_precision`, accelerate's, or what the device is good at; `UserError`: fp8, CPU's fp16.

    None: of a CPU with units for bf16 only measuring shows what is faster (`model/precision.py`).
    """
    device, default = chosen_device(), os.environ.get("ACCELERATE_MIXED_PRECISION")
    if default == "fp8" and not mixed_precision:
        raise UserError(
            "of accelerate's configuration is not supported: use bf16.", about="mixed_precision", value="fp8"
        )
    if default not in (None, "", "no", *DTYPES) and not mixed_precision:
        rule = "of accelerate's configuration is none: give bf16, fp16 or no."
        raise UserError(rule, about="mixed_precision", value=default)
    precision = mixed_precision or default
    if precision == "fp16" and device.type == "cpu":
        raise UserError("needs a GPU: use bf16 or no.", about="mixed_precision", value="fp16")
    if precision or (device.type == "cpu" and has_bf16(device)):
        return precision or None
    return "bf16" if has_bf16(device) else "no"


def chosen_device() -> torch.device:
    """Return the device that Accelerate will choose."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has units for products in bf16; others emulate them, up to a hundred times slower.

    On GPUs such products are faster than those in float32; on CPUs they need not be.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_bf16_units()) if device.type == "cpu" else device.type in ("xpu", "hpu")


def capabilities() -> dict:
    """Return what torch knows of this machine's processor; {} in versions that do not say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _bf16_units() -> list[str]:
    found = capabilities()
    return [name for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16") if found.get(name)]


def kind_of(device: torch.device) -> str:
    """Return the kind of a device: of a processor its name, as far as it is known, and its units for bf16."""
    if device.type != "cpu":
        return device_name(device)
    name = capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return " ".join([name, *_bf16_units()])


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep all bits of float32 products and convolutions in the block, whatever the program allows elsewhere (TF32)."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    names = ("enabled", "benchmark", "benchmark_limit", "deterministic")  # `flags` has other defaults
    with cudnn.flags(**{name: getattr(cudnn, name) for name in names}, allow_tf32=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


# Dense peak of bf16 and fp16 matrix products with float32 sums, FLOP/s, of what torch shows as one device. What they
# were held against stands in `plan/gpus.py`; V100, T4 and MI250X are from memory.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 4080": 97e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}
FP16_ONLY = ("V100", "T4")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the most that a device can do in bf16 or fp16, FLOP/s; None where that is not known."""
    if precision not in ("bf16", "fp16"):
        return None
    for name, peak in PEAK_FLOPS.items():
        # The whole name, and not that of a slower or faster card behind it.
        if re.search(rf"(?<!\w){name}(?!\w)(?! (?:D|Ti|SUPER|Laptop)\b)", device_name):
            return peak if precision == "fp16" or name not in FP16_ONLY else None
    return None
