"""The time of a step, by arithmetic: matrix products at a share of the peak, and what travels between processes."""

from jit_accel.config.costs import FLOAT32, passes_of_step
from jit_accel.config.presets import forward_macs, sides_of
from jit_accel.plan.gpus import Gpu
from jit_accel.plan.memory import Division, Workload

LINK_SHARE = 0.7  # of a link's rate, reached by collectives of large tensors
GB = 1e9


def step_seconds(work: Workload, layout: Division, gpu: Gpu, nodes: int, flops: float) -> tuple[float, float]:
    """Return the seconds of a step's products, and those of its exchanges that do not go on beside them.

    flops: FLOP/s that a GPU reaches.
    """
    passes = passes_of_step(is_all_trained=True, recompute=layout.recompute)
    macs = forward_macs(work.sizes, work.patch_size, *sides_of(work.img_size))
    products = 2 * macs * passes * layout.batch_size * layout.accumulation / flops
    # Weights that are gathered for the forward pass travel beside it, all else beside the backward pass, and gradients
    # that are not sharded beside the last one alone.
    forward = products / passes
    gathers, rest = exchange_seconds(work, layout, gpu, nodes)
    backward = (products - forward) / (layout.accumulation if layout.shards == 1 else 1)
    return products, max(0.0, gathers - forward) + max(0.0, rest - backward)


def exchange_seconds(work: Workload, layout: Division, gpu: Gpu, nodes: int) -> tuple[float, float]:
    """Return the seconds in which weights travel for the forward passes of a step, and those of what else travels."""
    per_node, gradients = layout.processes // nodes, FLOAT32 * work.num_params
    cast = (FLOAT32 if work.precision == "no" else 2) * work.num_params
    if layout.sharding == "ddp":
        return 0.0, 2 * gather_seconds(gradients, gpu, per_node, nodes)
    apart = nodes if layout.sharding == "fsdp2" else 1  # machines that share a copy
    # The backward pass gathers anew, and recomputes with what it has.
    gathers = layout.accumulation * gather_seconds(cast, gpu, per_node, apart)
    sums = gather_seconds(gradients, gpu, per_node, apart)
    if layout.sharding == "hsdp":
        sums += 2 * gradients / per_node * (nodes - 1) / nodes / (LINK_SHARE * gpu.network * GB)
    return gathers, gathers + sums


def gather_seconds(size: float, gpu: Gpu, per_node: int, nodes: int) -> float:
    """Return the seconds of an all-gather (or a reduce-scatter) of so many bytes, of the slower of the two links."""
    within = size * (per_node - 1) / per_node / gpu.link
    between = size * (nodes - 1) / nodes / per_node / gpu.network  # each GPU receives its part of the node's
    return max(within, between) / (LINK_SHARE * GB)
