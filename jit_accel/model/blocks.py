"""The blocks that the JiT transformer is made of: attention and SwiGLU, modulated by the time and the class."""

import contextlib
import functools

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from jit_accel.config.presets import swiglu_width
from jit_accel.model.functional import (
    attention_in_bf16,
    call_frugally,
    gated_silu,
    modulated_rms_norm,
    normalised_and_rotated,
    suits_bf16_attention,
)


class RMSNorm(nn.Module):
    """A norm, fused with the modulation behind it.

    The weight is used inside a call alone: hooks bring it to the device for the time of a call (offloading).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_rms_norm(x, self.weight, shift, scale)


class RotatedRMSNorm(RMSNorm):
    """A norm of queries or keys, fused with their rotation."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        return normalised_and_rotated(x, self.weight, rope, dtype)


class AttentionProcessor:
    """The computation of an `Attention`, by the kernel that diffusers' `set_attention_backend` names here."""

    _attention_backend = None  # PyTorch's SDPA, or what diffusers is set to

    def __call__(self, attn: "Attention", x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = call_frugally(attn.qkv, x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        dropout = attn.attn_dropout if attn.training else 0.0
        attend = functools.partial(dispatch_attention_fn, dropout_p=dropout, backend=self._attention_backend)
        is_cpu, dtype = v.device.type == "cpu", v.dtype
        if suits_bf16_attention(v) and not dropout and self._uses_sdpa():
            attend = attention_in_bf16
        elif is_cpu:  # where SDPA is faster in float32, and autocast would choose bf16
            dtype = torch.float32
        q, k = attn.q_norm(q, rope, dtype), attn.k_norm(k, rope, dtype)
        with torch.autocast("cpu", enabled=False) if is_cpu else contextlib.nullcontext():
            out = attend(q, k, v.to(dtype))
        return attn.proj_dropout(attn.proj(out.flatten(2).to(x.dtype)))

    def _uses_sdpa(self) -> bool:
        """Return whether nobody has named another kernel, here or for all of diffusers."""
        named = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        return named == AttentionBackendName.NATIVE


class Attention(nn.Module, AttentionModuleMixin):
    _supports_qkv_fusion = False  # it is one matrix already

    def __init__(self, hidden_size: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.q_norm = RotatedRMSNorm(hidden_size // num_heads)
        self.k_norm = RotatedRMSNorm(hidden_size // num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_dropout = nn.Dropout(proj_dropout)
        self.set_processor(AttentionProcessor())

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.processor(self, x, rope)


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float, dropout: float):
        super().__init__()
        inner = swiglu_width(hidden_size, mlp_ratio)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return call_frugally(self.w3, self.dropout(gated_silu(call_frugally(self.w12, x))))


class JiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, attn_dropout, proj_dropout)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_ratio, proj_dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, T, D) float32 from x (B, T, D) float32 and the condition c (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attended = self.attn(self.norm1(x, shift1, scale1), rope)
        x = torch.addcmul(x, gate1, attended)
        mixed = self.mlp(self.norm2(x, shift2, scale2))
        return torch.addcmul(x, gate2, mixed)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))
