"""The time that a run will take and the memory it needs, said before it: a block is tried, the rest is arithmetic."""

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from torch import nn

from jit_accel.base.console import in_words, say, two_digits, warn
from jit_accel.base.devices import device_name
from jit_accel.base.processes import grace_s
from jit_accel.config.costs import (
    FLOAT32,
    GIB,
    activation_bytes,
    bytes_at_peak,
    checkpoint_bytes,
    moments_of,
    passes_of_step,
)
from jit_accel.config.facts import Plan
from jit_accel.config.groups import OptimConfig
from jit_accel.config.presets import block_macs, block_tokens, forward_macs, grid_of, sides_of
from jit_accel.model.functional import rope_table
from jit_accel.model.precision import constant_block
from jit_accel.monitor.metrics import local_part, now
from jit_accel.train.averages import Ema
from jit_accel.train.optimizers import build_optimizers, is_block_matrix, trainable

TRIAL_S = 0.2  # of a block, to be believed
# What is longer is warned of: on a CPU more than a night, elsewhere more than a month, since long runs are meant there.
LONG_S, LONG_ELSEWHERE_S = {"cpu": 12 * 3600.0}, 30 * 86400.0


@dataclass(frozen=True)
class BlockTrial:
    """The cost of a block: forward and backward of an image, what is kept between them, an update of the weights."""

    image_s: float
    update_s: float
    image_bytes: float
    fixed_bytes: float  # kept whatever the number of images, such as weights in bf16
    num_params: int


@dataclass(frozen=True)
class StepCost:
    """The cost of a step to a process."""

    seconds: float
    forward_s: float  # of one image, as samples and measurements need it
    memory_gib: float  # at the peak
    missing_gib: float = 0.0  # of it, where that much is not free


def try_block(sizes, most_images: int, device: torch.device, autocast, optim: OptimConfig) -> BlockTrial:
    """Try a block of a network of these `sizes` (its config) for a moment, on few images; `autocast()` is its context.

    It has weights of its own and draws nothing at random: no run is changed by it.
    """
    block = constant_block(sizes, device)
    grid, dim = grid_of(sizes.img_size, sizes.patch_size), sizes.hidden_size
    tokens = math.prod(grid)
    length = block_tokens(sizes, tokens) + sizes.in_context_len
    rope = rope_table(dim // sizes.num_heads, grid, grid, length - tokens, device)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def run(images: int) -> tuple[float, int]:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.ones(images, length, dim, device=device, requires_grad=True)
        began = now(device)
        with autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = block(x, x[:, 0], rope).sum()
        total.backward()
        return now(device) - began, sum(size for place, size in kept.items() if place not in weights)

    runs = {1: run(1)}  # which also warms up
    while len(runs) == 1 or (max(runs) < most_images and sum(seconds for seconds, _ in runs.values()) < TRIAL_S):
        images = max(2, min(2 * max(runs), most_images))
        runs[images] = run(images)
    *_, (before, (_, bytes_before)), (images, (_, kept_bytes)) = runs.items()
    image_s = min(seconds / images for images, (seconds, _) in runs.items())
    image_bytes = (kept_bytes - bytes_before) / (images - before)
    optimizers = build_optimizers(nn.ModuleDict({"blocks": nn.ModuleList([block])}), optim)
    averages = Ema(block, optim.ema_decays, optim.tracked_widths)
    for _ in range(2):  # the first one makes the optimizer's state
        began = now(device)
        for optimizer in optimizers:
            optimizer.step()
        averages.update(1)
        update_s = now(device) - began
    num_params = sum(p.numel() for p in block.parameters())
    return BlockTrial(image_s, update_s, image_bytes, kept_bytes - images * image_bytes, num_params)


def cost_of_step(
    trial: BlockTrial, network: nn.Module, optim: OptimConfig, micro_steps: int, *, stay: bool, has_state: bool = False
) -> StepCost:
    """Return the cost of a step by that of a block; its memory is what comes on top of that before the first step.

    Gradients take the place that activations leave, unless they `stay` between backward passes; an optimizer that
    `has_state` has it already.
    """
    sizes, batch, params = network.config, optim.batch_size, trainable(network)
    counts = [(local_part(p).numel(), optim.optimizer == "muon" and is_block_matrix(name, p)) for name, p in params]
    trained = sum(count for count, _ in counts)
    length = block_tokens(sizes, math.prod(grid_of(sizes.img_size, sizes.patch_size))) + sizes.in_context_len
    blocks = forward_macs(sizes, sizes.patch_size, *sides_of(sizes.img_size)) / block_macs(sizes, length)
    recompute, is_all_trained = network.gradient_checkpointing, len(params) == len(list(network.parameters()))
    passes = passes_of_step(is_all_trained=is_all_trained, recompute=recompute)
    residual = FLOAT32 * batch * length * sizes.hidden_size
    one_block = trial.fixed_bytes + batch * trial.image_bytes
    activations = activation_bytes(sizes.depth, one_block, residual, recompute=recompute)
    forward_s = trial.image_s * blocks / 3
    seconds = micro_steps * batch * forward_s * passes + trial.update_s * trained / trial.num_params
    moments = 0 if has_state else sum(moments_of(count, is_muon=is_muon) for count, is_muon in counts)
    at_peak = bytes_at_peak(FLOAT32 * moments, activations, FLOAT32 * trained, stay=stay)
    return StepCost(seconds, forward_s, at_peak / GIB)


def copies_gib(network: nn.Module, optim: OptimConfig, accelerator) -> float:
    """Return the memory, beside a step's, of the copies that this process writes a checkpoint from; of a GPU's 0."""
    if accelerator.device.type != "cpu":
        return 0.0
    params = trainable(network)
    moments = sum(
        moments_of(p.numel(), is_muon=optim.optimizer == "muon" and is_block_matrix(name, p)) for name, p in params
    )
    weights = sum(p.numel() for _, p in params)
    return checkpoint_bytes(weights, moments, optim.num_averages) / accelerator.num_processes / GIB


def expected_cost(
    network: nn.Module, optimizers: Iterable, optim: OptimConfig, accelerator, is_guided: bool = False
) -> StepCost:
    """Return what a step should cost the process that it costs most; all together, with weights and averages there.

    is_guided: by the objective, which passes each image forward once more.
    """
    device, micro_steps = accelerator.device, accelerator.gradient_accumulation_steps
    used, free = used_gib(device), free_gib(device)
    trial = try_block(network.config, optim.batch_size, device, accelerator.autocast, optim)
    how = {"stay": micro_steps * accelerator.num_processes > 1, "has_state": any(each.state for each in optimizers)}
    cost = cost_of_step(trial, network, optim, micro_steps, **how)
    if is_guided:
        cost = replace(cost, seconds=cost.seconds + micro_steps * optim.batch_size * cost.forward_s)
    more = cost.memory_gib + copies_gib(network, optim, accelerator)
    return highest(replace(cost, memory_gib=used + more, missing_gib=more - free))


def highest(cost: StepCost) -> StepCost:
    """Return the most that a step costs any process; all together."""
    return StepCost(*map(max, zip(*gather_object([astuple(cost)]))))


def used_gib(device: torch.device) -> float:
    """Return the memory in use: of a GPU's allocator, elsewhere of this process."""
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / GIB


def free_gib(device: torch.device) -> float:
    """Return how much more memory this process can have, also by a container's limit; inf where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    free = psutil.virtual_memory().available / GIB if device.type in ("cpu", "mps") else math.inf
    with suppress(OSError, ValueError):  # no container, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIB - used_gib(device))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def times_due(every: int, step: int, last_step: int) -> int:
    """Return how often something happens from here on that is due every so many steps (0: never), and at the end."""
    return (last_step // every - step // every + (last_step % every > 0)) if every else 1


def outlook(
    cost: StepCost, steps: int, forwards: float, model: str, device: torch.device, processes: int
) -> tuple[str, list[str]]:
    """Return a line on the `steps` ahead, and warnings, each with its remedy.

    forwards: images that a process passes forward besides, to sample and to measure.
    """
    beside_s = forwards * cost.forward_s
    total_s = steps * cost.seconds + beside_s
    beside = f", {in_words(beside_s)} of it to sample and measure" if beside_s > 0.05 * total_s else ""
    memory = f"about {two_digits(cost.memory_gib)} GiB of memory" + " in each process" * (processes > 1)
    warnings = []
    if total_s > LONG_S.get(device.type, LONG_ELSEWHERE_S):
        is_cpu = device.type == "cpu"
        count = processes * (torch.get_num_threads() if is_cpu else 1)
        name = "core" if is_cpu else device_name(device)
        where = f"this {name}" if count == 1 else f"these {count} {name}s"
        rarer = "a larger --sample_every_steps, fewer --num_inference_steps, " if beside_s > total_s / 2 else ""
        recipe = "; launch/recipes/my_images_cpu.yaml is made for a CPU" if is_cpu else ""
        warnings.append(
            f"{steps:,} steps of {model} on {where}: {in_words(total_s)}{beside}. Choose {rarer}fewer --max_steps, a "
            f"smaller --model, or larger patches{recipe}."
        )
    if cost.missing_gib > 0:
        warnings.append(
            f"{memory} are needed, {two_digits(cost.missing_gib)} GiB more than are free: halve --batch_size and "
            "double --gradient_accumulation_steps, add --gradient_checkpointing, or choose a smaller --model."
        )
    return f"{in_words(total_s)}: {steps:,} steps of {two_digits(cost.seconds)} s{beside}; {memory}", warnings


def say_outlook(cost: StepCost, accelerator, steps: int, forwards: float, model: str) -> None:
    """Say the outlook on the main process."""
    line, warnings = outlook(cost, steps, forwards, model, accelerator.device, accelerator.num_processes)
    if accelerator.is_main_process:
        say(f"Ahead:  {line}")
        for warning in warnings:
            warn(warning)


def nothing_is_left(output_dir: Path, step: int, plan: Plan, optim: OptimConfig) -> str:
    """Return in words that a run is at its end, and what would train on."""
    epochs = 2 * max(optim.epochs or 0, int(plan.epoch_of(step)))
    longer = f"--max_steps {2 * step}" if optim.max_steps else f"--epochs {epochs:g}"
    at = f"{output_dir} is at step {step:,} of {plan.total_steps:,}"
    return f"Nothing is left to train: {at}. {longer}, say, would train on."


class Grace:
    """The time that a launcher leaves a run for its end, held against what that takes; warned of once, if too short."""

    def __init__(self, is_main: bool):
        self.is_open = is_main

    def look(self, step_s: float, save_s: float | None) -> None:
        """Warn where two steps, and a checkpoint as the last one, of `save_s` (None: not known), take longer."""
        grace, needed_s = grace_s(), 2 * step_s + (save_s or 0)
        if self.is_open and grace is not None and save_s is not None and needed_s > grace:
            self.is_open = False
            warn(
                f"a stop takes about {in_words(needed_s)} (two steps, and a checkpoint of {two_digits(save_s)} s), and "
                f"the launcher kills {grace:g} s after SIGTERM, which would cost the steps since the last checkpoint: "
                f"set PET_SHUTDOWN_TIMEOUT={10 * math.ceil(needed_s / 5)} before it starts."
            )
