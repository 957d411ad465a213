"""Vectors of what the network is given: patches of pixels, the time, labels, and conditions: a picture, numbers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jit_accel.config.presets import TIME_FEATURES, vector_outputs
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
        """Return (B, D) of the classes (B,); of several, (B, k), the sum of those that are none of "no class" and -1.

        A sum, so that what a class adds does not depend on which others an image has.
        """
        if labels.ndim == 1:
            return self.embedding_table(labels)
        no_class = self.embedding_table.num_embeddings - 1
        are_given = (labels >= 0) & (labels < no_class)
        rows = self.embedding_table(labels.where(are_given, no_class))
        is_first = torch.arange(labels.shape[1], device=labels.device) == 0
        return (rows * (are_given | (is_first & ~are_given.any(1, keepdim=True)))[..., None]).sum(1)


class VectorEmbedding(nn.Module):
    """An MLP from columns of numbers (B, n) to summands of the vector c that modulates the blocks, and of the tokens in
    context: one for each column, which go round these. Zero at the start; learned ones stand for numbers left out.

    They are added, since tokens of their own would take part in attention even where they are zero.
    """

    def __init__(self, sizes: Sequence[int], hidden_size: int, in_context_len: int):
        super().__init__()
        self.num_numbers, self.in_context_len = sum(sizes), in_context_len
        outputs = vector_outputs(sizes, in_context_len) * hidden_size
        self.mlp = nn.Sequential(nn.Linear(sum(sizes), hidden_size), nn.SiLU(), nn.Linear(hidden_size, outputs))
        self.none = nn.Parameter(torch.zeros(outputs))

    def forward(self, c: Tensor, tokens: Tensor, vectors: Tensor | None, are_given: Tensor | None):
        """Return c (B, D), and tokens (B, 1, D) as (B, in_context_len, D), with what the numbers add to them."""
        if vectors is None:
            vectors, are_given = c.new_zeros(len(c), self.num_numbers), c.new_zeros(len(c), dtype=torch.bool)
        if vectors.shape != (len(c), self.num_numbers):
            raise ValueError(f"vectors have the shape {tuple(vectors.shape)}: give {(len(c), self.num_numbers)}")
        found = self.mlp(vectors.to(tokens.dtype))
        if are_given is not None:
            found = torch.where(are_given[:, None], found, self.none.to(found.dtype))
        of_c, of_columns = found.unflatten(1, (-1, c.shape[1])).tensor_split([1], dim=1)
        if not self.in_context_len:
            return c + of_c[:, 0], tokens
        rounds = F.pad(of_columns, (0, 0, 0, -of_columns.shape[1] % self.in_context_len))
        return c + of_c[:, 0], tokens + rounds.unflatten(1, (-1, self.in_context_len)).sum(1)
