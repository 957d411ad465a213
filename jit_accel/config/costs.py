"""The arithmetic of what a training costs, in weights, bytes and passes: no device, no measurement."""

from jit_accel.config.presets import TIME_FEATURES, Preset, swiglu_width, vector_outputs

GIB = 2**30
FLOAT32 = 4  # bytes


def num_params(sizes: Preset, patch_size: int, num_classes: int) -> int:
    """Return the number of a network's weights."""
    dim, pixels = sizes.hidden_size, patch_size * patch_size * sizes.in_channels
    time = TIME_FEATURES * dim + dim + dim * dim + dim
    labels = (num_classes + 1 + sizes.in_context_len) * dim
    patches = pixels * sizes.bottleneck_dim + sizes.bottleneck_dim * dim + dim
    if sizes.condition_channels:
        given, narrow = patch_size * patch_size * sizes.condition_channels, sizes.condition_bottleneck
        patches += (narrow * (given + dim) if narrow else given * dim) + 2 * dim  # bias, and "none"
    if sizes.vector_sizes:
        outputs = vector_outputs(sizes.vector_sizes, sizes.in_context_len) * dim
        labels += (sum(sizes.vector_sizes) + 1) * dim + (dim + 2) * outputs
    last = dim + 2 * dim * dim + 2 * dim + dim * pixels + pixels
    return time + labels + patches + sizes.depth * block_params(sizes) + last


def block_params(sizes: Preset) -> int:
    """Return the number of a block's weights."""
    dim, inner = sizes.hidden_size, swiglu_width(sizes.hidden_size, sizes.mlp_ratio)
    norms, biases = 2 * dim + 2 * (dim // sizes.num_heads), 3 * dim + dim + 2 * inner + dim
    return norms + biases + block_matrices(sizes) + 6 * dim * dim + 6 * dim


def block_matrices(sizes: Preset) -> int:
    """Return the number of weights in the matrices of a block's attention and SwiGLU, which Muon trains."""
    dim = sizes.hidden_size
    return 4 * dim * dim + 3 * dim * swiglu_width(dim, sizes.mlp_ratio)


def moments_of(weights: int, *, is_muon: bool) -> int:
    """Return how many numbers an optimizer keeps of these weights: Muon a momentum, AdamW two moments."""
    return weights if is_muon else 2 * weights


def passes_of_step(*, is_all_trained: bool, recompute: bool) -> int:
    """Return the cost of a step's forward and backward pass, in forward passes; frozen weights have no gradient."""
    return (3 if is_all_trained else 2) + recompute


def activation_bytes(depth: int, one_block: float, residual: float, *, recompute: bool) -> float:
    """Return the bytes that a forward pass keeps for the backward one.

    What lies around the blocks, and what a block's backward works with, counts as one more block.

    Args:
        one_block: bytes that a block keeps.
        residual: bytes of the input of a block, which alone is kept of those that are recomputed.
    """
    return one_block + depth * residual if recompute else (depth + 1) * one_block


def bytes_at_peak(state: float, activations: float, gradients: float, *, stay: bool) -> float:
    """Return the most that a step needs beside weights and averages.

    Gradients take the place that activations leave, unless they `stay` between backward passes.
    """
    return state + (activations + gradients if stay else max(activations, gradients))


def checkpoint_bytes(weights: int, moments: int, averages: int) -> int:
    """Return the bytes of a checkpoint: weights, their moments, and this many averages of them."""
    return FLOAT32 * (moments + weights * (1 + averages))
