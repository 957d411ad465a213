"""Vectors of what the network is given: patches of pixels, the time, labels, and a picture that is a condition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jit_accel.config.presets import TIME_FEATURES
from jit_accel.model.functional import time_frequencies


def cut_patches(pixels: Tensor, size: int) -> Tensor:
    """Cut (B, C, H, W) into patches (B, N, C * size * size), row by row."""
    patches = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, applied to cut patches (..., in): one matmul.

    It is no `nn.Conv2d`: quantisers and adapters put convolutions of their own in the place of those.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True):
        super().__init__()
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbedding(nn.Module):
    """The layers from pixels (B, C, H, W) to tokens (B, N, D) through a bottleneck."""

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj1 = PatchProjection(in_channels, bottleneck_dim, patch_size, bias=False)
        self.proj2 = PatchProjection(bottleneck_dim, hidden_size, 1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.proj2(self.proj1(cut_patches(sample, self.patch_size)))


class ConditionEmbedding(nn.Module):
    """The layers from a picture that is a condition (B, C, H, W) to tokens (B, N, D), zero at the start.

    By default there is no bottleneck, since nothing of a condition is to be lost. Where none is given, a learned vector
    stands for it.
    """

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int | None, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        if bottleneck_dim:
            self.proj1 = PatchProjection(in_channels, bottleneck_dim, patch_size, bias=False)
            self.proj2 = PatchProjection(bottleneck_dim, hidden_size, 1)
        else:
            self.proj1, self.proj2 = nn.Identity(), PatchProjection(in_channels, hidden_size, patch_size)
        self.none = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, condition: Tensor, is_given: Tensor) -> Tensor:
        tokens = self.proj2(self.proj1(cut_patches(condition, self.patch_size)))
        return torch.where(is_given[:, None, None], tokens, self.none.to(tokens.dtype))


class TimestepEmbedding(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        angles = t.float()[:, None] * time_frequencies(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(dtype))


class LabelEmbedding(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)  # the last row is "no class"

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
