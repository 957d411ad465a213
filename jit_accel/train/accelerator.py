"""The accelerator of a run, by its settings and by accelerate's own configuration, of which not all is possible."""

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import MixedPrecisionPolicy

from jit_accel.base.devices import DTYPES, chosen_device, chosen_precision
from jit_accel.base.errors import UserError, lookup, message_of
from jit_accel.config.presets import sides_of
from jit_accel.model.blocks import JiTBlock

# Variables that accelerate's launcher sets for what this training cannot do.
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
PARALLELISMS = {"TP": "tensor", "CP": "context", "SP": "sequence"}
# What accelerate's `fsdp_config` may switch on, and would go wrong or was never tried, with the remedy.
UNTRIED_OF_FSDP = {
    "activation_checkpointing": "gives dropout wrong gradients: leave it out, and add --gradient_checkpointing",
    "offload_params": "is not supported: leave it out, and add --gradient_checkpointing, or processes",
}
LONGEST_WAIT = timedelta(hours=1)  # of a process for another, once all are there
SHARDING = "shard the weights over the processes by FSDP2 instead (accelerate_configs/fsdp2.yaml)"


def build_accelerator(
    mixed_precision: str | None, accumulation: int | None, trackers: list[GeneralTracker], limit_s: float = 0
) -> Accelerator:
    """Return the accelerator of these settings, and of accelerate's configuration where they are None.

    Raises `UserError`: accelerate's configuration asks for what is not supported, or not all processes come within
    `limit_s` (0: an hour).
    """
    refuse_unsupported()
    precision = chosen_precision(mixed_precision) or "no"  # where that is open, `build_trainer` settles it
    configured = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or 1)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier training in this process
    limit = timedelta(seconds=limit_s) if limit_s else LONGEST_WAIT
    with _configuration_errors(), _all_come(limit):
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=trackers or None,
            # As a plugin: the environment of `accelerate launch` overrides the plain argument.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=accumulation or configured, sync_with_dataloader=False
            ),
            fsdp_plugin=build_fsdp_plugin(precision),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),  # it would wrap the network: see `asked_of_dynamo`
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=limit),
            ],
        )
    use_torchs_scaler(accelerator)
    return accelerator


def use_torchs_scaler(accelerator: Accelerator) -> None:
    """Replace the gradient scaler that Accelerate takes for shards, FSDP 1's: fused optimizers cannot step with it."""
    if accelerator.scaler is not None and accelerator.distributed_type == DistributedType.FSDP:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)


@contextlib.contextmanager
def _all_come(limit: timedelta) -> Iterator[None]:
    """Begin the group of processes in the block. Raises `UserError`: some did not come within the limit."""
    try:
        yield
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            if torch.distributed.get_backend() != "gloo":  # NCCL's group waits for nobody before it is used
                torch.distributed.new_group(backend="gloo", timeout=limit)
            # Later others wait while one looks at millions of files, and `Watchdog` looks after them.
            distributed_c10d._set_pg_timeout(LONGEST_WAIT)
    except torch.distributed.DistError as error:
        world, master = (os.environ.get(name, "?") for name in ("WORLD_SIZE", "MASTER_ADDR"))
        problem = UserError(
            f"the {world} processes of this run could not all meet at {master} within {limit.total_seconds() / 60:g} "
            f"minutes (--max_stall_minutes): {error}. Look at what the others print, at their machines and the network."
        )
        problem.everywhere = False
        raise problem from error


@contextlib.contextmanager
def _configuration_errors(*more: type[Exception]) -> Iterator[None]:
    """Raise what accelerate or torch says of a configuration in the block as a `UserError`."""
    try:
        yield
    except (ValueError, KeyError, ImportError, NotImplementedError, *more) as error:
        raise UserError(f"accelerate's configuration cannot be used ({message_of(error)}).") from error


def refuse_unsupported() -> None:
    """Raise `UserError` for what accelerate's configuration asks for, and would be silently or wrongly done."""
    for variable, engine in ENGINES.items():
        if _is_on(variable):
            raise UserError(f"accelerate's configuration asks for {engine}, which is not supported: {SHARDING}.")
    if _is_on("ACCELERATE_USE_SAGEMAKER") and os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO") != "NO":
        raise UserError(
            f"accelerate's configuration asks for SageMaker's parallelism, which is not supported: {SHARDING}."
        )
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _refuse_parallelism()
    if _is_on("ACCELERATE_USE_FSDP") and chosen_device().type == "cpu" and os.environ.get("WORLD_SIZE", "1") != "1":
        rule = "accelerate's configuration asks for FSDP, which it leaves out on CPUs, where each process holds all "
        raise UserError(rule + "weights: start with accelerate_configs/cpu_2_processes.yaml, or where there are GPUs.")
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
    if device and device.partition(":")[0] != chosen_device().type:
        raise UserError(f"ACCELERATE_TORCH_DEVICE {device}: the device here is {chosen_device().type}: leave it out.")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"
    if not steps.isdecimal() or int(steps) < 1:
        raise UserError(f"accelerate's configuration: gradient_accumulation_steps {steps}: must be a number from 1 on.")
    asked_of_dynamo()


def _refuse_parallelism() -> None:
    """Raise `UserError` for sizes in accelerate's `parallelism_config` that are not those of FSDP2 or HSDP."""
    names = {**PARALLELISMS, "DP_REPLICATE": "", "DP_SHARD": ""}
    sizes = {short: os.environ.get(f"PARALLELISM_CONFIG_{short}_SIZE", "1") for short in names}
    for short, size in sizes.items():
        rule = (
            f"accelerate's configuration asks for {names[short]} parallelism (parallelism_config_{short.lower()}_size: "
        )
        if names[short] and size != "1":
            raise UserError(f"{rule}{size}), which is not supported: images are short sequences; {SHARDING}.")
    copies, shards, world = sizes["DP_REPLICATE"], sizes["DP_SHARD"], os.environ.get("WORLD_SIZE", "1")
    asked = (
        f"accelerate's configuration asks for {copies} copies of the model of {shards} parts each (parallelism_config)"
    )
    if not (copies.isdecimal() and shards.isdecimal() and int(copies) * int(shards) in (1, int(world))):
        raise UserError(f"{asked}, and there are {world} processes: their product must be that number.")
    if int(shards) > 1 and not _is_on("ACCELERATE_USE_FSDP"):
        raise UserError(f"{asked}, which FSDP2 alone can: set distributed_type: FSDP (accelerate_configs/hsdp.yaml).")
    if int(copies) > 1 and shards == "1" and _is_on("ACCELERATE_USE_FSDP"):
        raise UserError(f"{asked}, which leaves FSDP2 nothing to do: leave parallelism_config out.")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def asked_of_dynamo() -> dict[str, object]:
    """Return the settings of torch.compile in accelerate's configuration (`dynamo_config`), {} where it asks for none.

    The blocks are compiled with them, in place. Accelerate would wrap the network, and begin its weights' names with
    `_orig_mod.`, so that checkpoints and pipelines would be those of other networks.

    Raises `UserError`: a setting or backend that is not there.
    """
    with _configuration_errors():
        plugin = TorchDynamoPlugin()
    if plugin.backend == DynamoBackend.NO or plugin.disable:
        return {}
    settings = plugin.to_kwargs()
    backends = torch.compiler.list_backends(exclude_tags=())
    lookup(dict.fromkeys(backends), settings["backend"], "dynamo_backend", rule="torch has no such compiler here")
    with _configuration_errors(RuntimeError):
        torch.compile(lambda: None, **settings)  # which compiles nothing before it is called
    return settings


def build_fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """Return FSDP2 where accelerate's configuration asks for it, with sums and outputs in float32.

    Accelerate's own policy reduces gradients in bf16 and casts the inputs, and t in bf16 is wrong. Raises `UserError`:
    FSDP 1, or a setting of it that would go wrong.
    """
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_version 1: accelerate's configuration must say fsdp_version: 2 (FSDP2).")
    for name, why in UNTRIED_OF_FSDP.items():
        if _is_on(f"FSDP_{name.upper()}"):
            raise UserError(f"accelerate's configuration: fsdp_{name} {why}.")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise UserError("accelerate's configuration: fsdp_ignored_modules is not supported: they would drift apart.")
    wrapped = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") or JiTBlock.__name__
    if wrapped != JiTBlock.__name__:
        rule = f"fsdp_transformer_layer_cls_to_wrap: {wrapped}: the layers here are called {JiTBlock.__name__}."
        raise UserError(f"accelerate's configuration: {rule}")
    # Every process begins with the same weights, and accelerate's launcher would send them around unless told not to.
    policy = {"cpu_ram_efficient_loading": False}
    if precision != "no":
        full = {"reduce_dtype": torch.float32, "output_dtype": torch.float32, "cast_forward_inputs": False}
        policy["mixed_precision_policy"] = MixedPrecisionPolicy(DTYPES[precision], **full)
    with _configuration_errors():
        return FullyShardedDataParallelPlugin(**policy)


def settle_buckets(model: torch.nn.Module, batch_size: int, accelerator: Accelerator) -> None:
    """Let DDP lay out its gradients as it does after the first step of a start, by a step whose gradients are dropped.

    Of more than two processes the order of summation depends on that, and a resumed run is to sum as one that was never
    stopped.
    """
    if accelerator.distributed_type == DistributedType.FSDP or accelerator.num_processes <= 2:
        return
    sizes = accelerator.unwrap_model(model).config
    pixels = torch.zeros(batch_size, sizes.in_channels, *sides_of(sizes.img_size), device=accelerator.device)
    model.train()
    model(pixels, pixels[:, 0, 0, 0], pixels[:, 0, 0, 0].long()).sample.sum().backward()
    model.zero_grad(set_to_none=True)
