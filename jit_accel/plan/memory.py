"""The memory of a process, of any training and any division of it, by arithmetic."""

import math
from dataclasses import astuple, dataclass

from jit_accel.config.costs import (
    FLOAT32,
    activation_bytes,
    block_matrices,
    block_params,
    bytes_at_peak,
    checkpoint_bytes,
    moments_of,
    num_params,
)
from jit_accel.config.presets import LONG_ATTENTION, Preset, Size, block_tokens, grid_of, swiglu_width

# What a block keeps of a token, bytes: per channel of the residual stream, and per channel inside of SwiGLU. GPUs run
# the plain formulas, CPUs those by hand, which make some of it again; q, k, norms and the residual stream are float32
# always, in fp16 as in bf16, but for q and k of many tokens on a CPU. tests/plan holds the rows to what autograd keeps.
# --compile keeps less: not counted.
KEPT_BYTES = {("cuda", "bf16"): (52, 8), ("cuda", "no"): (64, 16), ("cpu", "bf16"): (36, 4), ("cpu", "no"): (40, 8)}
LESS_OF_LONG = 12  # where q, k and what attention returns are bf16, and v is no copy
# Of a sharded block: two gathered in bf16, a gradient in bf16, and two in float32 on their way, for each weight.
GATHERED_BYTES = 2 * 2 + 2 + 2 * 4
HEAP_BYTES = 0.3 * 2**30  # of holes in a CPU's heap, which a training keeps (measured: benchmarks/plan.py)
MUON_BUCKET_BYTES = 2**25  # of float32, in train/muon.py, for each process that shares the matrices


@dataclass(frozen=True)
class Workload:
    """The training, however it is divided."""

    sizes: Preset
    patch_size: int
    img_size: Size
    num_classes: int
    optimizer: str = "adamw"
    averages: int = 1
    precision: str = "bf16"
    proj_dropout: float = 0.0

    @property
    def num_params(self) -> int:
        return num_params(self.sizes, self.patch_size, self.num_classes)

    @property
    def muon_params(self) -> int:
        """Weights that Muon trains."""
        return self.sizes.depth * block_matrices(self.sizes) if self.optimizer == "muon" else 0

    @property
    def num_moments(self) -> int:
        muon = self.muon_params
        return moments_of(muon, is_muon=True) + moments_of(self.num_params - muon, is_muon=False)

    @property
    def length(self) -> int:
        """Tokens of an image, with those of its class."""
        return block_tokens(self.sizes, math.prod(grid_of(self.img_size, self.patch_size))) + self.sizes.in_context_len


@dataclass(frozen=True)
class Division:
    """A division of a step's images and of the weights over processes."""

    sharding: str  # a row of `SHARDINGS`
    recompute: bool
    batch_size: int
    accumulation: int
    processes: int = 1
    shards: int = 1  # parts of each copy of the weights


@dataclass(frozen=True)
class Memory:
    """The memory of a process, bytes; `work` is the most that comes on top of the first three."""

    weights: float
    moments: float
    averages: float
    gradients: float
    activations: float
    work: float

    @property
    def peak(self) -> float:
        return self.weights + self.moments + self.averages + self.work


def memory_of(work: Workload, layout: Division, device: str = "cuda") -> Memory:
    """Return the memory of a process, without what the program itself takes."""
    share = FLOAT32 * work.num_params / layout.shards
    moments, averages = FLOAT32 * work.num_moments / layout.shards, work.averages * share
    # FSDP2 adds up gradients of several micro-steps unsharded.
    gradients = share * (layout.shards if layout.accumulation > 1 else 1)
    block, residual = bytes_of_block(work, layout.batch_size, device)
    casts = 2 * (block_params(work.sizes) if work.precision != "no" else 0)
    gathered = 0.0
    if layout.shards > 1:
        gathered, casts = GATHERED_BYTES * block_params(work.sizes), 0
    activations = activation_bytes(work.sizes.depth, block + casts, residual, recompute=layout.recompute)
    if layout.recompute:
        activations += work.sizes.depth * casts  # autocast keeps them until the forward pass ends
    else:
        activations += dropout_bytes(work, layout.batch_size, device)
    stay = layout.accumulation * layout.processes > 1
    at_peak = bytes_at_peak(gathered, activations, gradients, stay=stay)
    at_update = gradients + muon_bytes(work, layout, device)
    holes = HEAP_BYTES if device == "cpu" else 0
    return Memory(share, moments, averages, gradients, activations, max(at_peak, at_update) + holes)


def bytes_of_block(work: Workload, images: int, device: str = "cuda") -> tuple[float, float]:
    """Return the bytes that a block keeps of so many images, and those of its input."""
    dim, tokens = work.sizes.hidden_size, images * work.length
    of_stream, of_inner = KEPT_BYTES[device, "no" if work.precision == "no" else "bf16"]
    if device == "cpu" and work.precision == "bf16" and work.length >= LONG_ATTENTION:
        of_stream -= LESS_OF_LONG
    inner = swiglu_width(dim, work.sizes.mlp_ratio)
    of_norms = FLOAT32 * (3 * work.sizes.num_heads + 2)  # of two norms, of those of q and k, and attention's sums
    return tokens * (of_stream * dim + of_inner * inner + of_norms), FLOAT32 * tokens * dim


def muon_bytes(work: Workload, layout: Division, device: str = "cuda") -> float:
    """Return the bytes that a step of Muon works with: all updates, and the maps that are iterated at once.

    Maps of one shape are a bucket, or, of shared ones, as many as fit in; while one is iterated, the next is gathered
    and the one before has its results. The iteration holds its maps and their Gram matrices twice, in bf16 on a GPU.
    """
    if not work.muon_params:
        return 0.0
    dim, inner = work.sizes.hidden_size, swiglu_width(work.sizes.hidden_size, work.sizes.mlp_ratio)
    size = 2 if device == "cuda" else FLOAT32
    at_once = results = 0.0
    for rows, columns, maps in ((dim, dim, 4), (inner, dim, 2), (dim, inner, 1)):  # of a block
        count, one = maps * work.sizes.depth, rows * columns
        if layout.shards > 1:
            count = min(max(1, MUON_BUCKET_BYTES // (FLOAT32 * one)), math.ceil(count / layout.shards))
        grams = 2 * size * count * min(rows, columns) ** 2
        if layout.shards > 1:  # gathered rows, maps of them, two states; rows of the next, and of the one before
            travelling = 2 * (2 * size + FLOAT32)
            at_once = max(at_once, count * one * (4 * size + travelling) + grams)
        else:
            at_once = max(at_once, results + count * one * (FLOAT32 + 2 * size) + grams)
            results = size * count * one
    return FLOAT32 * work.muon_params / layout.shards + at_once


def dropout_bytes(work: Workload, images: int, device: str = "cuda") -> float:
    """Return the bytes of dropout's masks in the middle half of the blocks."""
    dim = work.sizes.hidden_size
    channels = 2 * dim + swiglu_width(dim, work.sizes.mlp_ratio)
    blocks = work.sizes.depth // 4 * 2 if work.proj_dropout else 0
    return blocks * images * work.length * channels * (1 if device == "cuda" else FLOAT32)


def bytes_of_checkpoint(work: Workload) -> int:
    """Return the bytes of a checkpoint, of all processes together."""
    return checkpoint_bytes(work.num_params, work.num_moments, work.averages)


def in_gib(memory: Memory) -> list[float]:
    """Return its parts, and its peak, in GiB."""
    return [value / 2**30 for value in (*astuple(memory)[:-1], memory.peak)]
