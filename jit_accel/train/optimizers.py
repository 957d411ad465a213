"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from jit_accel.base.errors import lookup
from jit_accel.config.completion import Plan
from jit_accel.config.settings import OptimConfig


def lr_at(step: int, optim: OptimConfig, plan: Plan) -> float:
    """Return the learning rate of optimizer step number `step` (from 0): linear from 0, then `cosine` or `constant`."""
    if step < plan.warmup_steps:
        return optim.learning_rate * step / plan.warmup_steps
    if optim.lr_schedule == "constant":
        return optim.learning_rate
    progress = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return optim.min_learning_rate + (optim.learning_rate - optim.min_learning_rate) * height


def set_lr(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give all parameters this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Return True for matrices, which decay: not for biases, norms, or tables of embeddings."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embedding_table", "in_context_posemb"))


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Return True for the matrices of attention and SwiGLU, whose updates Muon orthogonalises."""
    return parameter.ndim == 2 and name.startswith("blocks.") and (".attn." in name or ".mlp." in name)


def build_optimizers(model: nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return optimizers that together hold each trainable parameter once; `UserError` if the name is unknown."""
    return lookup(OPTIMIZERS, optim.optimizer, "optimizer")(trainable(model), optim)


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters that are trained, by name."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _adamw(params: list[tuple[str, Tensor]], optim: OptimConfig) -> list[torch.optim.Optimizer]:
    groups = [
        {"params": [p for n, p in params if is_decayed(n, p) == decayed], "weight_decay": optim.weight_decay * decayed}
        for decayed in (True, False)
    ]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=tuple(optim.adam_betas), fused=True)]


def _muon_and_adamw(params: list[tuple[str, Tensor]], optim: OptimConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in params if is_block_matrix(n, p)]
    rest = [(n, p) for n, p in params if not is_block_matrix(n, p)]
    return [Muon(matrices, weight_decay=optim.weight_decay), *_adamw(rest, optim)]


OPTIMIZERS = {"adamw": _adamw, "muon": _muon_and_adamw}


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024).

    Differs from `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` in two ways: all matrices of one shape
    go through the iteration as a single batch, and a matrix that stacks several square or wide maps (the fused
    qkv, the two halves of SwiGLU) is orthogonalised map by map. The iteration runs in bf16 on a GPU only, since
    a CPU without bf16 units takes a hundred times longer with it.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.95, ns_steps: int = 5):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(momentum, group["momentum"])
                for target, update in zip(split_stacked(p), split_stacked(nesterov)):
                    by_shape.setdefault(update.shape, []).append((target, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]), group["ns_steps"])
                # RMS of an AdamW step is about 0.2 (Liu et al., arXiv 2502.16982).
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                targets = [target for target, _ in pairs]
                if group["weight_decay"]:
                    torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(targets, list(updates.to(targets[0].dtype).unbind()), alpha=-rate)
        return loss


def split_stacked(matrix: Tensor) -> list[Tensor]:
    """Return the maps that a tall (out, in) weight stacks: qkv's three, SwiGLU's two; else the matrix itself."""
    rows, columns = matrix.shape
    if rows == 3 * columns:
        return list(matrix.chunk(3))
    return list(matrix.chunk(2)) if rows > 3 * columns and rows % 2 == 0 else [matrix]


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of (N, rows, columns) by about 1 (between 0.7 and 1.2)."""
    # Coefficients of the quintic by Jordan et al., which trades exactness for slope at 0.
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
