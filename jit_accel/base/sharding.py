"""Sharded weights (FSDP2), beyond what Accelerate does for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def reshard(network: torch.nn.Module) -> None:
    """Let go of gathered weights, which FSDP2 keeps after a forward until a backward; without FSDP2 do nothing."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensors(named: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor | None]:
    """Gather sharded tensors; all processes take part, those that `keep` get the values, on the CPU."""
    return {name: _whole(tensor, keep) for name, tensor in named.items()}


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous() if keep else None


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor on the device of `reference`, sharded as that is."""
    if hasattr(reference, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value.to(reference.device)
