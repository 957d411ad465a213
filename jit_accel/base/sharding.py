"""What FSDP2 needs beyond Accelerate."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule


def reshard(network: torch.nn.Module) -> None:
    """Let go of gathered weights, which FSDP2 keeps after a forward until a backward; without FSDP2 do nothing."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
