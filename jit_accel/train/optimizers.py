"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jit_accel.base.errors import lookup
from jit_accel.base.spans import span
from jit_accel.config.facts import Plan
from jit_accel.config.groups import OptimConfig
from jit_accel.train.muon import Muon


def lr_at(step: int, optim: OptimConfig, plan: Plan) -> float:
    """Return the learning rate of optimizer step number `step` (from 0): linear from 0, then as `lr_schedule` says.

    `wsd` stays at the peak until the last `decay_fraction` of the steps, and falls there by 1 - sqrt (2405.18392).
    """
    if step < plan.warmup_steps:
        return optim.learning_rate * step / plan.warmup_steps
    if optim.lr_schedule == "constant":
        return optim.learning_rate
    falls_from = plan.warmup_steps
    if optim.lr_schedule == "wsd":
        falls_from = max(falls_from, plan.total_steps - round(optim.decay_fraction * plan.total_steps))
    progress = min(1, max(0, step - falls_from) / max(1, plan.total_steps - falls_from))
    is_cosine = optim.lr_schedule == "cosine"
    height = 0.5 * (1 + math.cos(math.pi * progress)) if is_cosine else 1 - math.sqrt(progress)
    return optim.min_learning_rate + (optim.learning_rate - optim.min_learning_rate) * height


def set_lr(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give all parameters this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


@span("optimizer")
def take_step(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Move all parameters by their gradients, which are dropped."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return True for matrices, which decay: not for biases, norms, or tables of embeddings."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embedding_table", "in_context_posemb"))


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Return True for the matrices of attention and SwiGLU, whose updates Muon orthogonalises."""
    return parameter.ndim == 2 and name.startswith("blocks.") and (".attn." in name or ".mlp." in name)


def build_optimizers(
    model: nn.Module, optim: OptimConfig, copies: ProcessGroup | None = None
) -> list[torch.optim.Optimizer]:
    """Return optimizers that together hold each trainable parameter once; `UserError` if the name is unknown.

    copies: processes that train the same weights, and may share the work of a step.
    """
    return lookup(OPTIMIZERS, optim.optimizer, "optimizer")(trainable(model), optim, copies)


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters that are trained, by name."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@torch.no_grad()
def make_moments(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Make all that the optimizers keep of each parameter, as their first step would.

    Made amid a step it would lie where activations were, and the next ones would no longer fit between: a quarter more
    memory on a CPU.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if "momentum" in group:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
                else:
                    state = {"step": torch.zeros((), device=p.device)}
                    state |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[p] |= state


def _adamw(params: list[tuple[str, Tensor]], optim: OptimConfig, *_) -> list[torch.optim.Optimizer]:
    groups = [
        {"params": [p for n, p in params if is_decayed(n, p) == decayed], "weight_decay": optim.weight_decay * decayed}
        for decayed in (True, False)
    ]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=tuple(optim.adam_betas), fused=True)]


def _muon_and_adamw(
    params: list[tuple[str, Tensor]], optim: OptimConfig, copies: ProcessGroup | None
) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in params if is_block_matrix(n, p)]
    rest = [(n, p) for n, p in params if not is_block_matrix(n, p)]
    muon = Muon(matrices, weight_decay=optim.weight_decay, copies=copies, scale=optim.muon_scale)
    return [muon, *_adamw(rest, optim)]


OPTIMIZERS = {"adamw": _adamw, "muon": _muon_and_adamw}
