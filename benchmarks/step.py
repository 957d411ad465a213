"""What a training step costs: the trainer against the bare model, and against what the machine can do.

    python benchmarks/step.py             all cases that suit this device
    python benchmarks/step.py b4 quick    some of them

Each case runs in its own process, so that its peak memory is its own. Trainer steps, bare steps and matrix
products alternate inside it and only their ratios are worth comparing: machines are noisy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parent.parent
MATRIX_SIDE = 4096


@dataclass(frozen=True)
class Case:
    what: str
    flags: tuple[str, ...]
    device: str
    rounds: int = 6
    steps: int = 1


def flags(model: str, img_size: int, batch_size: int, *more: str) -> tuple[str, ...]:
    return ("--model", model, "--img_size", str(img_size), "--batch_size", str(batch_size), *more)


TWO_EMAS = ("--ema_decays", "auto", "0.9999")
CASES = {
    "quick": Case("the quickstart", ("--config", str(REPO / "launch/recipes/quickstart.yaml")), "cpu", 8, 4),
    "b4": Case("JiT-B/4, 64 px, batch 8", flags("JiT-B/4", 64, 8), "cpu"),
    "b4_emas": Case("the same with two EMAs", flags("JiT-B/4", 64, 8, *TWO_EMAS), "cpu"),
    "b4_compiled": Case("the same with two EMAs, compiled", flags("JiT-B/4", 64, 8, *TWO_EMAS, "--compile"), "cpu"),
}
for _size, _batch in (("B", 128), ("L", 64), ("H", 32)):
    for _compile in ((), ("--compile",)):
        CASES[f"{_size.lower()}16{'_compiled' if _compile else ''}"] = Case(
            f"JiT-{_size}/16, 256 px, batch {_batch}{', compiled' if _compile else ''}",
            flags(f"JiT-{_size}/16", 256, _batch, *_compile),
            "cuda",
            6,
            5,
        )


@contextlib.contextmanager
def training(*flags: str, source=None) -> Iterator:
    """Give a trainer that is warm; nothing is kept of what it does."""
    from jit_accel.base.watchdog import Watchdog
    from jit_accel.config.command_line import parse_args
    from jit_accel.train.accelerator import build_accelerator
    from jit_accel.train.build import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        data = source.name if source else "builtin:fashion_mnist"
        config = parse_args([*flags, "--data_path", data, "--output_dir", folder, "--num_workers", "0"])
        accelerator = build_accelerator(config.performance.mixed_precision, None, [])
        trainer = build_trainer(config, accelerator, Watchdog(accelerator, 0), source=source)
        with contextlib.closing(trainer.feed):
            trainer.monitor.open(0, {})
            for _ in range(3):
                trainer.train_step()
                trainer.flush()
            yield trainer


def measure(case: Case) -> dict:
    """Run one case in this process."""
    from jit_accel.base.devices import device_name
    from jit_accel.monitor.monitor import peak_memory_gib

    with training(*case.flags) as trainer:
        device, batch, monitor = trainer.accelerator.device, trainer.plan.global_batch_size, trainer.monitor
        memory, precision = peak_memory_gib(device), trainer.accelerator.mixed_precision
        bare = BareStep(trainer, batch)
        bare()
        times: dict[str, list[float]] = {"trainer": [], "bare": [], "matrix": []}
        for _ in range(case.rounds):
            times["matrix"].append(timed(matrix_product(device, precision), device, 1))
            times["trainer"].append(timed(trainer.train_step, device, case.steps))
            trainer.flush()
            times["bare"].append(timed(bare, device, case.steps))
    step, rate = statistics.median(times["trainer"]), 2 * MATRIX_SIDE**3 / statistics.median(times["matrix"])
    overheads = [a / b - 1 for a, b in zip(times["trainer"], times["bare"])]
    flops = monitor.flops_per_image * batch
    return {
        "device": device_name(device),
        "precision": precision,
        "step_s": step,
        "images_per_s": batch / step,
        "overhead": statistics.median(overheads),
        "of_matrix_rate": flops / step / rate,
        "matrix_gflops": rate / 1e9,
        "mfu": flops / step / monitor.peak_flops if monitor.peak_flops else None,
        "memory_gib": memory,
    }


class BareStep:
    """Forward, backward and optimizer of a trainer's own model on a fixed batch, and nothing else."""

    def __init__(self, trainer, batch: int):
        import torch

        self.model, self.optimizers = trainer.model, trainer.optimizers
        device, side = trainer.accelerator.device, trainer.network.config.img_size
        self.x, self.target = torch.randn(2, batch, 3, side, side, device=device)
        self.t = torch.rand(batch, device=device)
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)

    def __call__(self) -> None:
        loss = (self.model(self.x, self.t, self.labels).sample.float() - self.target).square().mean()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def matrix_product(device, precision: str):
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=dtype)
    return lambda: a @ b


def timed(action, device, repeats: int) -> float:
    """Seconds of one call."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    wait()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(CASES[args.measure])))
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | step | images/s | over bare step | of matrix rate | MFU | peak memory |\n" + "| --- " * 7 + "|")
    for name in args.cases or [name for name, case in CASES.items() if case.device == device]:
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=REPO)
        r = json.loads(done.stdout.splitlines()[-1])
        mfu = f"{r['mfu']:.0%}" if r["mfu"] else "–"
        print(
            f"| {CASES[name].what} | {r['step_s']:.3f} s | {r['images_per_s']:.1f} | {r['overhead']:+.1%} "
            f"| {r['of_matrix_rate']:.0%} of {r['matrix_gflops']:.0f} GFLOP/s | {mfu} | {r['memory_gib']:.2f} GiB |",
            flush=True,
        )
    print(f"\n{r['device']}, precision {r['precision']}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
