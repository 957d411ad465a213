"""The formulation of the paper's public code, from plain PyTorch modules: what `step.py --reference` compares with.

Names of parameters are the reference's, so that it takes the weights of `JiTTransformer2DModel`, and gives the same
outputs. Nothing is fused: norms in float32 apart from their modulation, rotation by halves that are put together again,
attention by an explicit softmax, AdamW tensor by tensor, one loop for each average, and the loss is read each step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jit_accel.config.presets import TIME_FEATURES, swiglu_width
from jit_accel.model.functional import position_table, rope_table


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of x (B, heads, T, C) by tables (T, C) that have each angle twice."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        weights = q.float() @ k.float().transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]))
    weights = torch.softmax(weights, dim=-1)
    return torch.dropout(weights, dropout, train=True) @ v


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = rotated(self.q_norm(q), *rope), rotated(self.k_norm(k), *rope)
        return self.proj(attention(q, k, v, 0.0).transpose(1, 2).reshape(batch, length, dim))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        inner = swiglu_width(dim, mlp_ratio)
        self.w12, self.w3 = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.attn = RMSNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = RMSNorm(dim), SwiGLU(dim, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.norm_final, self.linear = RMSNorm(dim), nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * omega[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    def __init__(self, patch_size: int, channels: int, bottleneck: int, dim: int):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class ReferenceJiT(nn.Module):
    """The network of a `JiTTransformer2DModel` with this `config`, without dropout."""

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.hidden_size
        self.t_embedder, self.y_embedder = TimestepEmbedder(dim), LabelEmbedder(config.num_classes, dim)
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, config.bottleneck_dim, dim)
        self.in_context_posemb = nn.Parameter(torch.zeros(1, config.in_context_len, dim))
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, config.patch_size**2 * config.in_channels)
        grid = (config.img_size // config.patch_size,) * 2
        self.positions = position_table(dim, grid, grid[0], torch.device("cpu"))
        self.ropes = [
            tuple(part.repeat_interleave(2, dim=-1)[:, 0] for part in rope_table(dim // config.num_heads, *at))
            for at in ((grid, grid[0], length, torch.device("cpu")) for length in (0, config.in_context_len))
        ]

    def to(self, device):
        self.positions = self.positions.to(device)
        self.ropes = [tuple(part.to(device) for part in rope) for rope in self.ropes]
        return super().to(device)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        y_emb, length = self.y_embedder(labels), self.config.in_context_len
        c = self.t_embedder(t) + y_emb
        x = self.x_embedder(x) + self.positions
        for i, block in enumerate(self.blocks):
            if i == self.config.in_context_start:
                x = torch.cat([y_emb.unsqueeze(1).repeat(1, length, 1) + self.in_context_posemb, x], dim=1)
            x = block(x, c, self.ropes[i >= self.config.in_context_start])
        x = self.final_layer(x[:, length:], c)
        side, p = self.config.img_size // self.config.patch_size, self.config.patch_size
        x = x.reshape(len(x), side, side, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, side * p, side * p)


class ReferenceStep:
    """One step of the paper's training loop, of images (B, 3, H, W) in [-1, 1] and labels (B,)."""

    def __init__(
        self, network: nn.Module, lr: float, decays: tuple[float, ...], precision: str, compiled: bool = False
    ):
        device = next(network.parameters()).device
        self.model = ReferenceJiT(network.config)
        self.model.load_state_dict(network.state_dict())
        self.model.to(device)
        if compiled:
            for part in (*self.model.blocks, self.model.final_layer):
                part.compile()
        self.autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        decayed, others = [], []
        for p in self.model.parameters():
            (decayed if p.ndim >= 2 else others).append(p)
        groups = [{"params": decayed, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        self.averages = [(decay, [p.detach().clone() for p in self.model.parameters()]) for decay in decays]

    def __call__(self, x: Tensor, labels: Tensor) -> float:
        dropped = torch.rand(len(x), device=x.device) < 0.1
        labels = torch.where(dropped, torch.full_like(labels, self.model.config.num_classes), labels)
        with self.autocast:
            t = torch.sigmoid(torch.randn(len(x), device=x.device) * 0.8 - 0.8).view(-1, 1, 1, 1)
            z = t * x + (1 - t) * torch.randn_like(x)
            away = (1 - t).clamp_min(0.05)
            predicted = self.model(z, t.flatten(), labels)
            loss = ((x - z) / away - (predicted - z) / away).pow(2).mean(dim=(1, 2, 3)).mean()
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for decay, average in self.averages:
            self.update(average, decay)
        return value

    @torch.no_grad()
    def update(self, average: list[Tensor], decay: float) -> None:
        for kept, weight in zip(average, self.model.parameters()):
            kept.mul_(decay).add_(weight.detach(), alpha=1 - decay)
