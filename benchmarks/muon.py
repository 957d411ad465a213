"""What Muon costs where processes share the matrices (FSDP2), against the training step and against whole matrices.

    python benchmarks/muon.py                                            two processes on the CPU, a few minutes
    torchrun --nproc_per_node 8 benchmarks/muon.py --device cuda --models JiT-B/16 JiT-H/16 --batch_size 64

Alternating in one run: forward and backward, the step of Muon and that of AdamW, Muon's where nothing travels between
the processes, and Muon's of whole matrices, as one process alone takes it. Times are those of the slowest process;
with --cpu_time those that it computes, on a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from jit_accel.config.groups import OptimConfig
from jit_accel.config.presets import parse_model_name
from jit_accel.model.transformer import JiTTransformer2DModel
from jit_accel.train import muon
from jit_accel.train.muon import Muon
from jit_accel.train.optimizers import build_optimizers


class Training:
    """A network of 256 px whose weights the processes share, and whole matrices beside it."""

    def __init__(self, model: str, batch_size: int, depth: int | None, device: torch.device):
        torch.manual_seed(0)
        sizes, patch_size = parse_model_name(model)
        sizes = asdict(replace(sizes, depth=depth or sizes.depth)) | {"proj_dropout": 0.0, "attn_dropout": 0.0}
        self.network = JiTTransformer2DModel(256, patch_size, num_classes=1000, **sizes).to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in self.network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        self.muon, *self.others = build_optimizers(self.network, OptimConfig(optimizer="muon", weight_decay=0.0))
        shapes = [p.shape for group in self.muon.param_groups for p in group["params"]]
        whole = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for each in whole:
            each.grad = torch.randn_like(each)
        self.whole = Muon(whole)
        self.inputs = [torch.randn(batch_size, 3, 256, 256), torch.rand(batch_size), torch.zeros(batch_size).long()]
        self.inputs = [each.to(device) for each in self.inputs]

    def compute(self) -> None:
        self.network.zero_grad()
        self.network(*self.inputs).sample.square().mean().backward()

    def update_others(self) -> None:
        for optimizer in self.others:
            optimizer.step()

    def step_at_home(self) -> None:
        with mock.patch.object(muon, "all_to_all_single", stay):
            self.muon.step()


def stay(taken: torch.Tensor, *_, **__) -> mock.Mock:
    """Give numbers in place of those of other processes."""
    taken.fill_(0.01)
    return mock.Mock()


def timed(action, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of the process that takes longest."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    dist.barrier()
    began = clock()
    action()
    wait()
    seconds = torch.tensor(clock() - began, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def measure(
    model: str, batch_size: int, depth: int | None, rounds: int, device: torch.device, clock: Callable[[], float]
) -> str:
    training = Training(model, batch_size, depth, device)
    actions = {
        "compute": training.compute,
        "muon": training.muon.step,
        "home": training.step_at_home,
        "others": training.update_others,
        "whole": training.whole.step,
    }
    found = [{name: timed(action, device, clock) for name, action in actions.items()} for _ in range(rounds + 1)]
    times = {name: statistics.median(each[name] for each in found[1:]) for name in actions}  # the first makes the state
    step_s = times["compute"] + times["muon"] + times["others"]
    travel = statistics.median(each["muon"] - each["home"] for each in found[1:])
    ratio = statistics.median(each["muon"] / each["whole"] for each in found[1:])
    return (
        f"| {model} | {batch_size} | {step_s:.2f} | {times['muon']:.3f} ({times['muon'] / step_s:.0%}) "
        f"| {travel:.3f} ({travel / step_s:.1%}) | {times['whole']:.3f} | {ratio:.2f} |"
    )


def run(rank: int, args: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.port}
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", rank)) if args.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    is_main = dist.get_rank() == 0
    if is_main:
        print(
            "| model | batch | step, s | Muon, s | travel, s | whole, s | of whole |\n" + "| --- " * 7 + "|", flush=True
        )
    for model in args.models:
        clock = time.process_time if args.cpu_time else time.perf_counter
        row = measure(model, args.batch_size, args.depth, args.rounds, device, clock)
        if is_main:
            print(row, flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["JiT-Ti/16", "JiT-S/16"])
    parser.add_argument("--batch_size", type=int, default=16, help="of each process")
    parser.add_argument("--depth", type=int, help="blocks of the network, if not all: the shares are about the same")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cpu_time", action="store_true")
    args = parser.parse_args()
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), args)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args.port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(run, (args,), 2)


if __name__ == "__main__":
    main()
