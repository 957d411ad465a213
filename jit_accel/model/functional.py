"""The network's parts without weights: fixed tables, and the elementwise functions between the matmuls.

Each function is a plain formula for the compiler and for GPUs, and the same formula with its backward
written out for eager CPU runs, where autograd's own backward makes more passes over memory: at the
quickstart's size those passes are a third of the step.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jit_accel.config.presets import LONG_ATTENTION, TIME_FEATURES, Size, sides_of
from jit_accel.model.spaces import in_float32

NORM_EPS = 1e-6


def _grid_angles(dim: int, grid: tuple[int, int], trained_grid: Size) -> tuple[Tensor, Tensor]:
    """Return the angles of each token's row and of its column, each (N, dim), float64."""
    omega = 10000.0 ** (-torch.arange(dim, dtype=torch.float64, device="cpu") / dim)
    # Another image size sees the positions of the training size, spread evenly: nothing is extrapolated.
    pairs = zip(grid, sides_of(trained_grid))
    axes = (torch.arange(n, dtype=torch.float64, device="cpu") * (trained / n) for n, trained in pairs)
    rows, columns = (torch.outer(axis, omega) for axis in axes)
    return rows[:, None].expand(-1, grid[1], -1).flatten(0, 1), columns.repeat(grid[0], 1)


def _constant(table: Tensor, device: torch.device) -> Tensor:
    return table.to(torch.float32).to(device)


def fixed_table(compute):
    """Cache a table that follows from the shape and the device alone.

    Such tables are neither parameters nor buffers: a cast to bf16, a load through the meta device or DDP's
    broadcast cannot touch them. They are made outside inference mode, or the first sampling call would leave
    tensors that training cannot use.
    """
    return lru_cache(maxsize=32)(torch.inference_mode(False)(compute))


@fixed_table
def position_table(dim: int, grid: tuple[int, int], trained_grid: Size, device: torch.device) -> Tensor:
    """Return the fixed 2-D sin-cos embedding (1, N, dim): column index in the first half, row index in the second."""
    rows, columns = _grid_angles(dim // 4, grid, trained_grid)
    return _constant(torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1)[None], device)


@fixed_table
def rope_table(
    head_dim: int,
    grid: tuple[int, int],
    trained_grid: Size,
    prefix: int,
    device: torch.device,
    condition_grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return axial rotary tables (cos, sin), each (prefix + N, 1, head_dim / 2): rows first, columns second.

    The `prefix` in-context tokens get angle 0: they are not rotated. A picture of `condition_grid` between them and the
    image is rotated as an image of that size.
    """
    grids = (grid,) if condition_grid is None else (condition_grid, grid)
    angles = torch.cat([torch.cat(_grid_angles(head_dim // 4, cells, trained_grid), 1) for cells in grids])
    angles = torch.cat([angles.new_zeros(prefix, head_dim // 2), angles])
    return _constant(angles.cos()[:, None], device), _constant(angles.sin()[:, None], device)


def split_tokens(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what stands before the last `count` tokens of x (B, T, D), and these, which are the image's."""
    return x[:, : x.shape[1] - count], x[:, x.shape[1] - count :]


def rope_of_kept(rope: tuple[Tensor, Tensor], count: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tables of a sequence of whose last `count` tokens those of the numbers `kept` (K,) are there."""
    before = len(rope[0]) - count
    cos, sin = (torch.cat([table[:before], table[before:][kept]]) for table in rope)
    return cos, sin


@fixed_table
def time_frequencies(device: torch.device) -> Tensor:
    """Return the (128,) angular frequencies of the timestep embedding."""
    half = TIME_FEATURES // 2
    return _constant(10000.0 ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half), device)


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def modulated_rms_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `RMSNorm(x) (1 + scale) + shift`, with x (B, T, D) and shift, scale (B, 1, D), in the dtype of shift.

    The norm's weight joins the scale, which is there once an image, not once a token.
    """
    x, gain, bias = in_float32(x), in_float32(weight) * (1 + in_float32(scale)), in_float32(shift)
    if _by_hand(x):
        return _ModulatedRMSNorm.apply(x, gain, bias, shift.dtype)
    return torch.addcmul(bias, F.rms_norm(x, x.shape[-1:], eps=NORM_EPS), gain).to(shift.dtype)


def normalised_and_rotated(
    x: Tensor, weight: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Return RMSNorm(x) over each head, each neighbouring pair of channels turned by its token's angle.

    x is (B, T, heads, head_dim); rope is (cos, sin), each (T, 1, head_dim / 2). All is computed in float32, and
    returned in it or in `dtype`.
    """
    weight = in_float32(weight)
    if _by_hand(x):
        return _NormalisedAndRotated.apply(x, weight, _turns(*rope), dtype)
    return rotate_pairs(F.rms_norm(in_float32(x), x.shape[-1:], eps=NORM_EPS) * weight, *rope).to(dtype or weight.dtype)


@fixed_table
def _turns(cos: Tensor, sin: Tensor) -> Tensor:
    return torch.complex(cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each neighbouring pair of channels of x, `(a, b) -> (a cos - b sin, b cos + a sin)`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def suits_bf16_attention(v: Tensor) -> bool:
    """Return whether `attention_in_bf16` is faster than SDPA in float32, for values v (B, T, heads, head_dim)."""
    return v.dtype == torch.bfloat16 and v.shape[1] >= LONG_ATTENTION and _by_hand(v)


def attention_in_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v of bf16 tensors (B, T, heads, head_dim) on a CPU.

    The softmax is in float32. Forward it is PyTorch's kernel, whose backward makes little use of a processor's matrix
    units: that is written as matrix products.
    """
    return _AttentionInBf16.apply(q, k, v)


def gated_silu(x: Tensor) -> Tensor:
    """Return `silu(a) b` of the two halves a, b of the last dimension."""
    if _by_hand(x):
        return _GatedSiLU.apply(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def call_frugally(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `layer(x)`; an x that was made by hand here is not kept for the backward pass, but made again."""
    node = x.grad_fn if _by_hand(x) else None
    if not hasattr(node, "remake"):
        return layer(x)
    address, size, version = x.data_ptr(), x.numel(), x._version

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_x = saved.data_ptr() == address and saved.numel() == size and saved.is_contiguous()
        return saved.shape if is_x and saved._version == version else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else node.remake(node).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer(x)


def _unpacked(ctx) -> tuple[Tensor, ...]:
    """Return `ctx.saved_tensors`, which may be asked for only once below `torch.utils.checkpoint`."""
    ctx.unpacked = ctx.unpacked or ctx.saved_tensors
    return ctx.unpacked


def _inverse_rms(x: Tensor) -> Tensor:
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return mean_square.add_(NORM_EPS).rsqrt_()


class _ModulatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        inverse = _inverse_rms(x)
        normalised = x * inverse
        ctx.save_for_backward(normalised, inverse, gain, bias)
        ctx.dtype, ctx.remake, ctx.unpacked = dtype, _ModulatedRMSNorm.remake, None
        return torch.addcmul(bias, normalised, gain).to(dtype)

    @staticmethod
    def remake(ctx) -> Tensor:
        normalised, _, gain, bias = _unpacked(ctx)
        return torch.addcmul(bias, normalised, gain).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (normalised, inverse, gain, _), ctx.unpacked = _unpacked(ctx), None
        grad = in_float32(grad)
        product = grad * normalised
        along = torch.bmm(product, gain.mT).div_(grad.shape[-1])
        grad_x = (grad * gain).addcmul_(normalised, along, value=-1).mul_(inverse)
        return grad_x, product.sum(1, keepdim=True), grad.sum(1, keepdim=True), None


class _NormalisedAndRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, turns: Tensor, dtype: torch.dtype | None) -> Tensor:
        wide = in_float32(x)
        inverse = _inverse_rms(wide)
        ctx.save_for_backward(x, inverse, weight, turns)
        return _turned((wide * inverse).mul_(weight), turns).to(dtype or wide.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, inverse, weight, turns = ctx.saved_tensors
        normalised = in_float32(x) * inverse
        grad = grad.to(normalised.dtype, copy=True, memory_format=torch.contiguous_format)
        grad = _turned(grad, turns.conj())
        product = grad * normalised
        along = torch.matmul(product, weight[:, None]).div_(x.shape[-1])
        grad_x = grad.mul_(weight).addcmul_(normalised, along, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), product.sum((0, 1, 2)), None, None


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring channels of x, in place, as complex numbers."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
    return x


class _AttentionInBf16(torch.autograd.Function):
    MOST_SCORES = 2**22  # at once: 16 MiB of float32, which large processors keep in their caches

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        *qkv, out, log_sum = ctx.saved_tensors
        batch, length, heads, width = qkv[0].shape
        q, k, v, grad = (x.transpose(1, 2).reshape(-1, length, width) for x in (*qkv, grad))
        along = (grad * out.reshape(grad.shape)).sum(-1, keepdim=True, dtype=torch.float32)
        log_sum, scale = log_sum.reshape(-1, length, 1), width**-0.5
        grads = [torch.empty_like(x) for x in (q, k, v)]
        step = max(1, _AttentionInBf16.MOST_SCORES // length**2)
        for some in (slice(first, first + step) for first in range(0, len(q), step)):
            scores = torch.baddbmm(log_sum[some], q[some].float(), k[some].float().mT, beta=-1, alpha=scale)
            weights = scores.exp_()
            torch.bmm(weights.to(grad.dtype).mT, grad[some], out=grads[2][some])
            grad_weights = torch.bmm(grad[some], v[some].mT).float()
            grad_scores = grad_weights.sub_(along[some]).mul_(weights).to(grad.dtype)
            torch.bmm(grad_scores, k[some], out=grads[0][some]).mul_(scale)
            torch.bmm(grad_scores.mT, q[some], out=grads[1][some]).mul_(scale)
        return tuple(x.view(batch, heads, length, width).transpose(1, 2) for x in grads)


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.remake, ctx.unpacked, ctx.silu = _GatedSiLU.remake, None, None
        a, b = x.chunk(2, dim=-1)
        return F.silu(a).mul_(b)

    @staticmethod
    def remake(ctx) -> Tensor:
        (x,) = _unpacked(ctx)
        a, b = x.chunk(2, dim=-1)
        ctx.silu = F.silu(a)  # which the backward pass takes next
        return ctx.silu * b

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,), ctx.unpacked = _unpacked(ctx), None
        a, b = x.chunk(2, dim=-1)
        silu, ctx.silu = ctx.silu, None
        grad_x = torch.empty_like(x)
        grad_a, grad_b = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * b, a, grad_input=grad_a)
        torch.mul(F.silu(a) if silu is None else silu, grad, out=grad_b)
        return grad_x
