"""How much of two processes' speed is left where they train together (DDP over gloo), with one thread each.

    python benchmarks/processes.py                      a few minutes on two cores
    python benchmarks/processes.py quick --ddp bucket_cap_mb=100 --ddp static_graph=True
    python benchmarks/processes.py b4 --cpu_time        of computing alone, where other programs run beside

By turns in one run: one process alone, two that know nothing of each other, which share the machine's memory and its
caches, and two that train together, also with other settings of DDP. The ideal is twice the images of one.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from unittest import mock

from step import REPO, flags, training


@dataclass(frozen=True)
class Case:
    what: str
    flags: tuple[str, ...]
    steps: int  # of a measurement, after which the metrics are read
    rounds: int


CASES = {
    "quick": Case("the quickstart", ("--config", str(REPO / "launch/recipes/quickstart.yaml")), 10, 8),
    "s4": Case("JiT-S/4, 32 px, batch 16", flags("JiT-S/4", 32, 16), 2, 5),
    "b4": Case("JiT-B/4, 64 px, batch 4", flags("JiT-B/4", 64, 4), 1, 4),
}


class Team:
    """Processes that train when they are asked to: as one group, or each for itself."""

    def __init__(self, case: Case, is_group: bool, settings: dict, cpu_time: bool):
        context, self.steps = multiprocessing.get_context("spawn"), case.steps
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.pipes, self.processes = [], []
        for rank in range(2):
            pipe, theirs = context.Pipe()
            places = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if is_group else {}
            process = context.Process(target=work, args=(case.flags, places, settings, cpu_time, theirs), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)
        self.images = [pipe.recv() for pipe in self.pipes]  # of a step and process; now both are warm

    def rate(self, size: int = 2) -> float:
        """Return the images a second of the first `size` processes, which work at once."""
        for pipe in self.pipes[:size]:
            pipe.send(self.steps)
        return sum(self.steps * images / pipe.recv() for pipe, images in zip(self.pipes[:size], self.images))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join()


def work(flags: tuple[str, ...], places: dict, settings: dict, cpu_time: bool, pipe: Connection) -> None:
    """Train in this process as many steps as `pipe` asks for, and answer with their seconds, until that is 0."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | places
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what each run says
    import torch

    from jit_accel.base.processes import process_group
    from jit_accel.train import accelerator

    torch.set_num_threads(1)
    clock, ddp = time.process_time if cpu_time else time.perf_counter, accelerator.DistributedDataParallelKwargs
    with (
        mock.patch.object(accelerator, "DistributedDataParallelKwargs", lambda **ours: ddp(**(ours | settings))),
        training(*flags) as trainer,
        process_group(trainer.accelerator),
    ):
        pipe.send(trainer.optim.batch_size)
        while steps := pipe.recv():
            began = clock()
            for _ in range(steps):
                trainer.stops.look()
                trainer.train_step()
            trainer.flush()
            pipe.send(clock() - began)
        trainer.stops.close()


def measure(case: Case, variants: dict[str, dict], cpu_time: bool) -> None:
    """Print a row for each way of training."""
    apart = Team(case, False, {}, cpu_time)
    together = {name: Team(case, True, settings, cpu_time) for name, settings in variants.items()}
    ways = {"one alone": lambda: apart.rate(1), "two apart": apart.rate}
    ways |= {name: team.rate for name, team in together.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(case.rounds):
        for name, rate in ways.items():
            rates[name].append(rate())
    for team in (apart, *together.values()):
        team.close()
    for name, found in rates.items():
        shares = {other: statistics.median(a / b for a, b in zip(found, rates[other])) for other in list(ways)[:2]}
        ideal, apart_share = f"{shares['one alone'] / 2:.3f}", f"{shares['two apart']:.3f}"
        if name == "one alone":
            ideal = apart_share = ""
        print(f"| {case.what} | {name} | {statistics.median(found):.1f} | {ideal} | {apart_share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--ddp", action="append", nargs="+", metavar="NAME=VALUE", help="try these settings of DDP too")
    parser.add_argument("--cpu_time", action="store_true", help="count the CPU's seconds, which leaves out waiting")
    args = parser.parse_args()
    variants: dict[str, dict] = {"two together": {}}
    for words in args.ddp or []:
        pairs = (word.split("=") for word in words)
        variants[", ".join(words)] = {name: ast.literal_eval(value) for name, value in pairs}
    print("| case | processes | images/s | of the ideal | of two apart |\n" + "| --- " * 5 + "|", flush=True)
    for name in args.cases or CASES:
        measure(CASES[name], variants, args.cpu_time)


if __name__ == "__main__":
    main()
