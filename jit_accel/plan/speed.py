"""The time of a step, by arithmetic: matrix products at a share of the peak, and what travels between processes."""

from jit_accel.config.costs import FLOAT32, passes_of_step
from jit_accel.config.presets import forward_macs
from jit_accel.plan.gpus import Gpu
from jit_accel.plan.memory import Division, Workload

LINK_SHARE = 0.7  # of a link's rate, reached by collectives of large tensors
GB = 1e9


def step_seconds(work: Workload, layout: Division, gpu: Gpu, nodes: int, flops: float) -> tuple[float, float]:
    """Return the seconds of a step's products, and those of its exchanges that do not go on beside them.

    flops: FLOP/s that a GPU reaches.
    """
    passes = passes_of_step(is_all_trained=True, recompute=layout.recompute)
    macs = forward_macs(work.sizes, work.patch_size, work.img_size, work.img_size)
    products = 2 * macs * passes * layout.batch_size * layout.accumulation / flops
    exchanges = exchange_seconds(work, layout, gpu, nodes)
    # DDP sends gradients in the last backward pass alone; sharded weights travel in all passes.
    beside = products if layout.shards > 1 else products * 2 / passes / layout.accumulation
    return products, max(0.0, exchanges - beside)


def exchange_seconds(work: Workload, layout: Division, gpu: Gpu, nodes: int) -> float:
    """Return the seconds in which weights and gradients travel in a step."""
    per_node, gradients = layout.processes // nodes, FLOAT32 * work.num_params
    cast = (FLOAT32 if work.precision == "no" else 2) * work.num_params
    if layout.sharding == "ddp":
        return 2 * gather_seconds(gradients, gpu, per_node, nodes)
    gathers = 2 * layout.accumulation  # for the forward and the backward pass, which recomputes with what it has
    if layout.sharding == "fsdp2":
        return gathers * gather_seconds(cast, gpu, per_node, nodes) + gather_seconds(gradients, gpu, per_node, nodes)
    within = gathers * gather_seconds(cast, gpu, per_node, 1) + gather_seconds(gradients, gpu, per_node, 1)
    return within + 2 * gradients / per_node * (nodes - 1) / nodes / (LINK_SHARE * gpu.network * GB)


def gather_seconds(size: float, gpu: Gpu, per_node: int, nodes: int) -> float:
    """Return the seconds of an all-gather (or a reduce-scatter) of so many bytes, of the slower of the two links."""
    within = size * (per_node - 1) / per_node / gpu.link
    between = size * (nodes - 1) / nodes / per_node / gpu.network  # each GPU receives its part of the node's
    return max(within, between) / (LINK_SHARE * GB)
