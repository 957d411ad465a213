"""The settings of `jit_accel.plan`; imports no torch, so that `--help` answers at once."""

import sys
from dataclasses import dataclass, fields

from jit_accel.base.errors import UserError, check_ranges, lookup
from jit_accel.config.command_line import read_flags
from jit_accel.config.settings import SETTINGS
from jit_accel.plan.gpus import GPUS


@dataclass(frozen=True)
class PlanConfig:
    """Say what memory and time a training would take on GPUs that need not be here, and how to start it there.

    All settings of jit_accel.train are taken as well, also --config FILE. Nothing is read but that file.
    """

    gpu: str
    """Kind of GPU, such as H100 or "A100 40GB"; a wrong name lists them all."""
    num_gpus: int = 8
    """GPUs, on all machines together."""
    nodes: int = 1
    """Machines that these are divided over."""
    num_images: int = 1_281_167
    """Images of the data set (default: those of ImageNet)."""
    global_batch_size: int | None = None
    """Images of an optimizer step (default: batch_size x num_gpus x gradient_accumulation_steps)."""
    peak_share: float = 0.4
    """Share of the GPUs' peak rate that the matrix products reach (perf/mfu of a training that you have seen)."""
    network_gbits: float | None = None
    """Network of each GPU to other machines in Gbit/s (default: that of the vendor's own machines, else 25)."""
    disk_gb_per_s: float = 1.0
    """Rate at which checkpoints are written, by all processes together, in GB/s."""


RANGES = [
    *((name, lambda v: v >= 1, "at least 1") for name in ("num_gpus", "nodes", "num_images", "global_batch_size")),
    ("peak_share", lambda v: 0 < v <= 1, "a share above 0, and at most 1"),
    *((name, lambda v: v > 0, "positive") for name in ("network_gbits", "disk_gb_per_s")),
    ("num_gpus", lambda v: v <= 100_000, "at most 100,000"),
]


def check(settings: PlanConfig) -> None:
    """Raise `UserError` for settings that are out of range or contradict each other."""
    lookup(GPUS, settings.gpu, "gpu")
    check_ranges(vars(settings), RANGES)
    if settings.num_gpus % settings.nodes:
        rule = f"must be a multiple of --nodes {settings.nodes}: each machine has as many."
        raise UserError(rule, about="num_gpus", value=settings.num_gpus)


def split_flags(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """Return the planner's own flags, and the training's as they were given; `UserError`: a flag of neither."""
    argv = sys.argv[1:] if argv is None else argv
    names = {field.name: field for field in fields(PlanConfig)}
    read_flags(argv, {"config": None} | SETTINGS | names)
    parts: tuple[list[str], list[str]] = ([], [])
    part = parts[1]
    for argument in argv:
        name = argument[2:].partition("=")[0].replace("-", "_")
        if argument in ("-h", "--help") or (argument.startswith("--") and name in names):
            part = parts[0]
        elif (argument.startswith("--") and argument[2:3].isalpha()) or argument == "--":
            part = parts[1]
        part.append(argument)
    return parts
