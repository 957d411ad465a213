"""Sharded weights (FSDP2), beyond what Accelerate does for them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def reshard(network: torch.nn.Module) -> None:
    """Let go of gathered weights, which FSDP2 keeps after a forward until a backward; without FSDP2 do nothing."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensors(named: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor | None]:
    """Gather sharded tensors; all processes take part, those that `keep` get the values, on the CPU."""
    found = {}
    for name, tensor in named.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = tensor.cpu().contiguous() if keep else None
    return found


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor on the device of `reference`, sharded as that is."""
    value = value.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(value, reference.device_mesh, reference.placements)
    return value
