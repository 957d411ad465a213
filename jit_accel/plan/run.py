"""The answer: what fits, what it takes, what is recommended, and the command that starts it."""

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jit_accel.base.console import in_words, say, two_digits
from jit_accel.base.devices import peak_flops
from jit_accel.base.errors import UserError
from jit_accel.config.checks import model_name
from jit_accel.config.command_line import parse_args
from jit_accel.config.completion import complete
from jit_accel.config.costs import FLOAT32, GIB
from jit_accel.config.facts import Facts
from jit_accel.config.groups import ConditionConfig
from jit_accel.config.presets import forward_macs, in_pixels, parse_model_name, sides_of
from jit_accel.data.batches.degradations import degradation_of
from jit_accel.plan.gpus import GPUS, Gpu
from jit_accel.plan.memory import Division, Memory, Workload, bytes_of_block, bytes_of_checkpoint, in_gib, memory_of
from jit_accel.plan.settings import PlanConfig
from jit_accel.plan.speed import GB, LINK_SHARE, step_seconds

# By what splits the weights, in order of preference; accelerate's configuration for it, on one machine and on several.
SHARDINGS = {
    "ddp": ("accelerate_configs/multi_gpu.yaml", "accelerate_configs/multi_node.yaml"),
    "hsdp": ("", "accelerate_configs/hsdp.yaml"),
    "fsdp2": ("accelerate_configs/fsdp2.yaml", "accelerate_configs/fsdp2.yaml"),
}
# The rest is for what CUDA and NCCL hold, and for holes between tensors.
USABLE_SHARE = 0.92
NO_PATH = "IMAGES"  # stands for a --data_path that is not given
IMAGENET_CLASSES = 1000
OF_CONDITION = ("condition_channels", "condition_bottleneck", "condition_inject")
COLUMNS = ("weights", "moments", "averages", "gradients", "activations", "peak")


@dataclass(frozen=True)
class Case:
    """A division, and what it comes to for a process."""

    layout: Division
    memory: Memory
    products_s: float
    exchanges_s: float

    @property
    def seconds(self) -> float:
        return self.products_s + self.exchanges_s


@dataclass(frozen=True)
class Machines:
    """The GPUs to plan for."""

    gpu: Gpu
    name: str
    count: int
    nodes: int
    flops: float  # that each reaches
    disk: float  # bytes/s

    def fits(self, case: Case) -> bool:
        return case.memory.peak <= USABLE_SHARE * self.gpu.memory_gb * GB


def channels_of(condition: ConditionConfig, in_channels: int) -> int:
    """Return the channels of the condition that the settings name, 3 where only the data could tell; 0 for none."""
    if condition.condition_from:
        return degradation_of(condition.condition_from).channels(in_channels)
    return (condition.condition_channels or 3) if condition.condition_path or condition.condition_column else 0


def plan(settings: PlanConfig, training: Sequence[str]) -> int:
    """Say what a training with these flags takes. Returns the exit code: 0 it fits, also divided otherwise; 1 not."""
    config = parse_args(["--data_path", NO_PATH, "--", *training])
    if model_name(config) is None or config.tune.lora_rank:
        rule = "all weights of a known size are planned for: name --model, and leave --lora_rank out."
        raise UserError(rule, about="init_from", value=config.tune.init_from)
    count, accumulation = settings.num_gpus, config.optim.gradient_accumulation_steps or 1
    global_batch = settings.global_batch_size or config.optim.batch_size * count * accumulation
    if global_batch % count:
        raise UserError(f"must be a multiple of --num_gpus {count}.", about="global_batch_size", value=global_batch)
    share, precision = global_batch // count, config.performance.mixed_precision or "bf16"
    divided = ["--batch_size", str(share), "--gradient_accumulation_steps", "1"]
    classes = config.model.num_classes or IMAGENET_CLASSES
    how = {"condition_channels": channels_of(config.condition, config.model.in_channels), "processes": count}
    facts = Facts(settings.num_images, classes, precision=precision, is_good_at_bf16=True, **how)
    completed, lengths, _ = complete(parse_args(["--data_path", NO_PATH, "--", *training, *divided]), facts)
    optim, model = completed.optim, completed.model
    sizes, patch_size = parse_model_name(model.model)
    condition = {name: getattr(completed.condition, name) for name in OF_CONDITION}
    sizes = replace(sizes, in_channels=model.in_channels, **condition)
    of_work = (
        sizes,
        patch_size,
        completed.data.img_size,
        classes,
        optim.optimizer,
        optim.num_averages,
    )
    work = Workload(*of_work, precision, model.proj_dropout)
    machines = machines_of(settings, precision)
    asked_batch = config.optim.batch_size if share == config.optim.batch_size * accumulation else share
    shardings = shardings_of(machines)
    say_asked(work, machines, model.model, global_batch, lengths.total_steps)
    asked = list(cases_of(work, machines, shardings, share, (asked_batch,)))
    say_memory(asked, machines)
    say_arithmetic(work)
    fitting = [case for case in cases_of(work, machines, shardings, share, divisors(share)) if machines.fits(case)]
    if not fitting:
        say("\nNothing fits, not with one image at a time: more GPUs (--num_gpus), a kind with more memory, fewer")
        say("averages (--ema_decays, --average_snapshots), larger patches, or a smaller model.")
        return 1
    best = min(fitting, key=lambda case: case.seconds)  # the first of equal ones
    had = config.performance.gradient_checkpointing
    say_recommended(best, machines)
    say_time(best, work, machines, global_batch, lengths.total_steps, completed.run.save_every_steps)
    say(f"\n{command(best.layout, machines, [*training, *_path_of(config.data.data_path)], was_recomputed=had)}")
    return 0


def _path_of(data_path: str) -> list[str]:
    return ["--data_path", NO_PATH] if data_path == NO_PATH else []


def machines_of(settings: PlanConfig, precision: str) -> Machines:
    """Return the GPUs that the settings name; products in float32 are counted at a sixteenth of those in bf16."""
    gpu, peak = GPUS[settings.gpu], peak_flops(settings.gpu.removesuffix(" 40GB"), "bf16")
    if settings.network_gbits is not None:
        gpu = replace(gpu, network=settings.network_gbits / 8)
    flops = settings.peak_share * peak / (16 if precision == "no" else 1)
    return Machines(gpu, settings.gpu, settings.num_gpus, settings.nodes, flops, settings.disk_gb_per_s * GB)


def shardings_of(machines: Machines) -> dict[str, int]:
    """Return the ways to hold the weights that these machines have, each with the parts of a copy."""
    per_node = machines.count // machines.nodes
    parts = {"ddp": 1}
    if machines.nodes > 1 and per_node > 1:
        parts["hsdp"] = per_node
    if machines.count > 1:
        parts["fsdp2"] = machines.count
    return parts


def cases_of(
    work: Workload, machines: Machines, shardings: Mapping[str, int], share: int, batches: Iterable[int]
) -> Iterator[Case]:
    """Yield all divisions of a step, of which each process has `share` images, into micro-steps of these sizes."""
    for sharding, shards in shardings.items():
        for recompute in (False, True):
            for batch in batches:
                layout = Division(sharding, recompute, batch, share // batch, machines.count, shards)
                times = step_seconds(work, layout, machines.gpu, machines.nodes, machines.flops)
                yield Case(layout, memory_of(work, layout), *times)


def divisors(number: int) -> list[int]:
    """Return the numbers that divide this one, the largest first."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def say_asked(work: Workload, machines: Machines, model: str, global_batch: int, steps: int) -> None:
    macs = forward_macs(work.sizes, work.patch_size, *sides_of(work.img_size))
    where = f"{machines.count} x {machines.name}" + (f" on {machines.nodes} machines" if machines.nodes > 1 else "")
    say(f"{model} at {in_pixels(work.img_size)} px on {where}: {steps:,} steps of {global_batch:,} images")
    size = f"{work.num_params / 1e6:,.1f} M weights, {work.averages} averages"
    say(f"  {size}, {macs / 1e9:,.1f} G multiply-adds an image")


def say_memory(cases: Iterable[Case], machines: Machines) -> None:
    """Say the parts of the memory, a row for each way to divide the weights and to keep activations."""
    usable = USABLE_SHARE * machines.gpu.memory_gb * GB / GIB
    say(f"\nMemory of a process in GiB, of which {usable:.1f} can be used ({USABLE_SHARE:.0%} of the card's):")
    say(f"  {'':22s}{'batch':>6s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    for case in cases:
        name = case.layout.sharding + (", recomputed" if case.layout.recompute else "")
        parts = "".join(f"{value:12.2f}" for value in in_gib(case.memory))
        say(f"  {name:22s}{case.layout.batch_size:6d}{parts}  {'fits' if machines.fits(case) else 'does not fit'}")


def say_arithmetic(work: Workload) -> None:
    """Say what the parts of the memory are the products of."""
    block, residual = (size / work.length for size in bytes_of_block(work, 1))
    moments = f"{FLOAT32 * work.num_moments / work.num_params:.3g}"
    say(f"  bytes a weight: {FLOAT32}, moments {moments}, averages {work.averages} x {FLOAT32}, gradients {FLOAT32};")
    say("  weights, moments, averages and gradients by the number of parts that hold a copy")
    say(f"  activations: images x {work.length} tokens x {block:,.0f} bytes x ({work.sizes.depth} + 1) blocks;")
    say(f"  recomputed: {residual:,.0f} bytes a block, and one block whole; then weights in bf16, or gathered blocks")


def say_recommended(best: Case, machines: Machines) -> None:
    layout = best.layout
    recomputed = "recomputed blocks" if layout.recompute else "no recomputation"
    step = f"{layout.batch_size} images a process, {layout.accumulation} micro-steps"
    say(f"\nRecommended: {layout.sharding}, {recomputed}, {step}: {best.memory.peak / GIB:.1f} GiB")


def say_time(
    best: Case, work: Workload, machines: Machines, global_batch: int, steps: int, save_every_steps: int
) -> None:
    """Say what the training takes, and what it asks of disks and loaders."""
    rate, total_s = global_batch / best.seconds, steps * best.seconds
    saved = bytes_of_checkpoint(work)
    copy_s = saved / machines.count / (LINK_SHARE * machines.gpu.host * GB)
    write_s, every_s = saved / machines.disk, (save_every_steps or steps) * best.seconds
    waits = f"{best.exchanges_s:.3f} s of it exchanges that nothing hides" if best.exchanges_s else "exchanges hidden"
    say(f"  step          {best.seconds:.3f} s, {rate:,.0f} images/s, {waits}")
    say(f"  in all        {in_words(total_s)}, {total_s * machines.count / 3600:,.0f} GPU hours")
    say(f"  checkpoints   {saved / GB:.1f} GB, held up for at most {copy_s:.2f} s, on the disk after {write_s:.0f} s")
    say(f"                one in {in_words(every_s)}; {saved / machines.count / GB:.1f} GB of host memory a process")
    if write_s > every_s:
        say("                they come faster than the disk takes them: raise --save_every_steps")
    say(f"  loaders       {rate / machines.nodes:,.0f} images/s a machine (benchmarks/loader.py measures yours)")
    share = machines.flops / peak_flops(machines.name.removesuffix(" 40GB"), "bf16")
    say(f"By arithmetic, at {two_digits(100 * share)} % of the peak rate; links at {LINK_SHARE:.0%} of theirs.")


def command(layout: Division, machines: Machines, training: Sequence[str], *, was_recomputed: bool) -> str:
    """Return the command line of a training that is divided so."""
    launch = ["accelerate", "launch", "--config_file", SHARDINGS[layout.sharding][machines.nodes > 1]]
    if machines.count == 1:
        launch[-1] = "accelerate_configs/single_gpu.yaml"
    launch += ["--num_processes", str(machines.count)]
    if machines.nodes > 1:
        launch += ["--num_machines", str(machines.nodes), "--machine_rank", "RANK", "--main_process_ip", "ADDRESS"]
        launch += ["--main_process_port", "29500", "--same_network"]  # files of one machine leave the port to chance
    if layout.sharding == "hsdp":
        launch += ["--parallelism_config_dp_replicate_size", str(machines.nodes)]
        launch += ["--parallelism_config_dp_shard_size", str(layout.shards)]
    divided = ["--batch_size", str(layout.batch_size), "--gradient_accumulation_steps", str(layout.accumulation)]
    if layout.recompute != was_recomputed:
        divided.append("--gradient_checkpointing" if layout.recompute else "--no_gradient_checkpointing")
    return shlex.join([*launch, "-m", "jit_accel.train", *training, *divided])
