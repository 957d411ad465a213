"""What a training step costs: the trainer against the bare model, and against what the machine can do.

    python benchmarks/step.py             all cases that suit this device
    python benchmarks/step.py b4 quick    some of them
    python benchmarks/step.py --reference the trainer against the paper's formulation (benchmarks/reference.py)

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


# Against the reference, which does not clip: eager and compiled, where weights move, and as a run begins.
PLAIN = ("--ema_decays", "0.9996", "0.9999", "--max_grad_norm", "0")
MOVING = ("--learning_rate", "1e-3", "--warmup_steps", "0")
REFERENCE_CASES = {
    "b4_eager": Case("eager, rate 1e-3", flags("JiT-B/4", 64, 8, *PLAIN, *MOVING), "cpu"),
    "b4_eager_first": Case("eager, first steps of a run", flags("JiT-B/4", 64, 8, *PLAIN), "cpu"),
    "b4_compiled": Case("compiled, rate 1e-3", flags("JiT-B/4", 64, 8, *PLAIN, *MOVING, "--compile"), "cpu"),
    "b4_compiled_first": Case("compiled, first steps of a run", flags("JiT-B/4", 64, 8, *PLAIN, "--compile"), "cpu"),
}


@contextlib.contextmanager
def training(*flags: str, source=None) -> Iterator:
    """Give a trainer that is warm; nothing is kept of what it does."""
    from jit_accel.base.host import denormals_flushed, keep_heap
    from jit_accel.base.watchdog import Watchdog
    from jit_accel.config.command_line import parse_args
    from jit_accel.train.accelerator import build_accelerator
    from jit_accel.train.build import build_trainer

    keep_heap()
    with tempfile.TemporaryDirectory() as folder, denormals_flushed():
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


def compare(case: Case) -> dict:
    """Run the trainer's steps and the reference's by turns; the process's heap and its flushed denormals serve both."""
    import torch
    from reference import ReferenceStep

    from jit_accel.monitor.monitor import peak_memory_gib

    with training(*case.flags) as trainer:
        device, precision, batch = trainer.accelerator.device, trainer.accelerator.mixed_precision, trainer.plan
        memory, side = peak_memory_gib(device), trainer.network.config.img_size
        x = torch.rand(batch.global_batch_size, 3, side, side, device=device) * 2 - 1
        labels = torch.zeros(len(x), dtype=torch.long, device=device)
        decays, rate = map(float, trainer.optim.ema_decays), trainer.optimizers[0].param_groups[0]["lr"]
        reference = ReferenceStep(trainer.network, rate, tuple(decays), precision, "--compile" in case.flags)

        def ours() -> None:
            trainer.train_step()
            trainer.flush()  # which reads the loss

        seconds: dict[str, list[float]] = {"trainer": [], "reference": []}
        for i in range(case.rounds + 1):
            for name, action in (("trainer", ours), ("reference", lambda: reference(x, labels))):
                taken = timed(action, device, 1)
                seconds[name] += [taken] if i else []  # the first compiles
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {"precision": precision, "memory_gib": memory, **found}


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
    parser.add_argument("--reference", action="store_true", help="compare with the paper's formulation")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--compare", choices=REFERENCE_CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure or args.compare:
        print(json.dumps(measure(CASES[args.measure]) if args.measure else compare(REFERENCE_CASES[args.compare])))
    elif args.reference:
        against_reference(args.cases or list(REFERENCE_CASES))
    else:
        against_bare_step(args.cases)


def run_alone(*flags: str) -> dict:
    """Return what this program prints in a process of its own."""
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=REPO)
    return json.loads(done.stdout.splitlines()[-1])


def against_reference(cases: list[str]) -> None:
    print("| JiT-B/4, 64 px, batch 8, two EMAs | trainer | reference | throughput | peak memory |")
    print("| --- " * 5 + "|")
    for name in cases:
        r = run_alone("--compare", name)
        ratio = r["reference"] / r["trainer"]
        seconds = f"{r['trainer']:.2f} s | {r['reference']:.2f} s"
        print(
            f"| {REFERENCE_CASES[name].what}, {r['precision']} | {seconds} | {ratio:.2f} | {r['memory_gib']:.2f} GiB |",
            flush=True,
        )


def against_bare_step(cases: list[str]) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | step | images/s | over bare step | of matrix rate | MFU | peak memory |\n" + "| --- " * 7 + "|")
    for name in cases or [name for name, case in CASES.items() if case.device == device]:
        r = run_alone("--measure", name)
        mfu = f"{r['mfu']:.0%}" if r["mfu"] else "–"
        print(
            f"| {CASES[name].what} | {r['step_s']:.3f} s | {r['images_per_s']:.1f} | {r['overhead']:+.1%} "
            f"| {r['of_matrix_rate']:.0%} of {r['matrix_gflops']:.0f} GFLOP/s | {mfu} | {r['memory_gib']:.2f} GiB |",
            flush=True,
        )
    print(f"\n{r['device']}, precision {r['precision']}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
