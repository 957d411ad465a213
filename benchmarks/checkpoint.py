"""How long a training waits for its checkpoints, how long these take to be on the disk, and a resume to read them.

    python benchmarks/checkpoint.py                                a few minutes, 2.5 GB in a temporary folder
    python benchmarks/checkpoint.py --models JiT-H/16 --device cuda --folder /scratch

A checkpoint is begun, and steps of one image are done until it is there. The training waits where it hands the tensors
over, before it changes them, and where it takes note of the end. A resume looks at the checksums, then reads the
tensors: seconds of computing, since the files are in the page cache here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from jit_accel.config.groups import OptimConfig
from jit_accel.model.checkpointer import Checkpointer
from jit_accel.model.checkpoints import load_parts, newest_checkpoint
from jit_accel.model.manifest import damage_of
from jit_accel.model.transformer import build_model
from jit_accel.train.averages import Ema
from jit_accel.train.optimizers import build_optimizers
from jit_accel.train.state import NamedTensors, OptimizerState

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


class Training:
    """A network of 256 px that is trained on one image, with AdamW and an average."""

    def __init__(self, model: str, device: str):
        self.network = build_model(model, 256, 1000, proj_dropout=0.0, attn_dropout=0.0).to(device)
        self.optimizers = build_optimizers(self.network, OptimConfig())
        self.averages = Ema(self.network, ["0.9999"])
        self.inputs = torch.randn(1, 3, 256, 256, device=device), torch.tensor([0.5]).to(device), torch.tensor([3])
        self.parts = {
            "model": NamedTensors(self.averages.params),
            "ema_0.9999": NamedTensors(self.averages.first),
            "optimizer": OptimizerState(self.network, self.optimizers),
        }

    def compute(self) -> None:
        x, t, labels = self.inputs
        self.network(x, t, labels.to(x.device)).sample.square().mean().backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.averages.update(1)


def measure(training: Training, checkpointer: Checkpointer, step: int) -> tuple[float, float]:
    """Return the seconds that a save was waited for, and those that it took."""
    clock, waited_s = time.perf_counter, 0.0
    began = at = clock()
    checkpointer.begin(step, training.parts)
    waited_s += clock() - at
    while True:
        training.compute()
        at = clock()
        checkpointer.wait_for_copies()
        path = checkpointer.finish_if_written()
        waited_s += clock() - at
        training.update()
        if path:
            return waited_s, clock() - began


def read(training: Training, path: Path) -> tuple[float, float]:
    """Return the CPU seconds that a resume takes for the checksums, and for the tensors."""
    began = time.process_time()
    assert damage_of(path) is None
    looked = time.process_time()
    load_parts(path, training.parts)
    return looked - began, time.process_time() - looked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["JiT-Ti/16", "JiT-S/16", "JiT-B/16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where the disk is; default: that of temporary files")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    print(
        "| model | GiB | waited for, s | on the disk after, s | share | checksums, CPU s | read, CPU s |\n"
        + "| --- " * 7
        + "|"
    )
    for model in args.models:
        training = Training(model, args.device)
        training.compute()
        training.update()
        tensors = [tensor for part in training.parts.values() for tensor in part.state_dict().values()]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            checkpointer = Checkpointer(ALONE, Path(folder), keep=1)
            found = [measure(training, checkpointer, step) for step in range(1, args.saves + 1)]
            looked_s, read_s = read(training, newest_checkpoint(checkpointer.folder))
        waited_s, took_s = (statistics.median(values) for values in zip(*found))
        size = sum(tensor.nbytes for tensor in tensors) / 2**30
        saved = f"{waited_s:.3f} | {took_s:.1f} | {waited_s / took_s:.1%}"
        print(f"| {model} | {size:.2f} | {saved} | {looked_s:.2f} | {read_s:.2f} |", flush=True)


if __name__ == "__main__":
    main()
