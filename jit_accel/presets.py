"""The sizes of JiT. A new size is a row here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jit_accel.errors import UserError, lookup


@dataclass(frozen=True)
class Preset:
    depth: int
    hidden_size: int
    num_heads: int
    bottleneck_dim: int
    in_context_start: int
    in_context_len: int = 32
    proj_dropout: float = 0.0  # 2511.13720: 0.2 for H and G


PRESETS = {
    "JiT-Ti": Preset(4, 192, 3, 64, 1, in_context_len=4),  # ours, for laptops
    "JiT-S": Preset(12, 384, 6, 96, 4, in_context_len=16),  # ours
    "JiT-B": Preset(12, 768, 12, 128, 4),
    "JiT-L": Preset(24, 1024, 16, 128, 8),
    "JiT-H": Preset(32, 1280, 16, 256, 10, proj_dropout=0.2),
    "JiT-G": Preset(40, 1664, 16, 256, 10, proj_dropout=0.2),
}


def parse_model_name(name: str) -> tuple[Preset, int]:
    """Split `JiT-B/16` into its preset and patch size.

    Raises:
        UserError: unknown size, or no patch size behind the slash.
    """
    size, _, patch = name.partition("/")
    preset = lookup(PRESETS, size, "--model")
    if not re.fullmatch(r"[1-9]\d*", patch):
        raise UserError(f"--model {name}: the name is SIZE/PATCH, as in {size}/4: add the patch size in pixels.")
    return preset, int(patch)
