"""What the GPUs of a machine do, within a time: the tests that need them, then speed and memory as a table of Markdown.

    bash benchmarks/gpu.sh                  with the environment that it needs
    bash benchmarks/gpu.sh --device cpu     at tiny sizes, to try it where there is no GPU

Each case trains in processes of its own, so that its peak memory is its own: the trainer's steps, with one average, on
pixels in memory. A batch that does not fit is halved. Beside the table, `output_dir` gets what the tests said, and a
profile of each case, which https://ui.perfetto.dev shows. What the time is too short for, the table says.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from step import REPO, timed, training

BUDGET_S = 480
SHARE_OF_TESTS = 0.45
LONGEST_MEASURED_S = {"cuda": 12.0, "cpu": 1.0}  # of a case, beside its start
MOST_ROUNDS, STEPS, PROFILED_STEPS = 6, 5, 2
HEAD = "| card | model | step | precision | images a GPU | images/s | MFU | GiB |"
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Work:
    """A model, images a process at first, their side, and on how many devices."""

    model: str
    batch_size: int
    img_size: int
    way: str
    processes: int = 1

    @property
    def name(self) -> str:
        several = f"_x{self.processes}" if self.processes > 1 else ""
        return f"{self.model.replace('/', '_')}_{self.way}{several}"


def works_of(device: str, processes: int) -> list[Work]:
    """Return the cases: each model on one device, and one on all of them."""
    if device == "cpu":
        return [Work("JiT-Ti/16", 2, 32, EAGER, 2), Work("JiT-Ti/16", 2, 32, COMPILED)]
    sizes = (("JiT-B/16", 128), ("JiT-L/16", 64), ("JiT-H/16", 32))
    alone = [Work(model, batch, 256, way) for model, batch in sizes for way in (EAGER, COMPILED)]
    return alone + [Work(*sizes[0], 256, COMPILED, processes)] * (processes > 1)


class Pixels:
    """Images by random access that cost a copy alone."""

    is_encoded, is_labelled = False, True

    def __init__(self, side: int, count: int = 512):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        np.take(self.pixels, indices, axis=0, out=out)
        return indices % 1000, {}


def measure(work: Work, profile: Path) -> dict:
    """Return what a case takes, measured in this process and those that were started beside it."""
    import torch

    from jit_accel.base.processes import end_with_launcher
    from jit_accel.data.formats.source import source_of

    end_with_launcher()
    names = tuple(map(str, range(1000)))
    source = source_of("pixels", "memory", Pixels(work.img_size), names, "pixels", work.img_size)
    batch = work.batch_size
    while True:
        try:
            return measure_batch(work, batch, source, profile)
        except torch.OutOfMemoryError:
            if batch == 1 or work.processes > 1:  # where others may have had the room, and wait
                raise
            batch //= 2
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_batch(work: Work, batch: int, source, profile: Path) -> dict:
    import torch
    from accelerate.utils import broadcast_object_list

    from jit_accel.base.devices import device_name
    from jit_accel.monitor.monitor import peak_memory_gib

    flags = ["--model", work.model, "--img_size", str(work.img_size), "--batch_size", str(batch), "--no_html_report"]
    flags += ["--ema_decays", "0.9999", "--compile" if work.way == COMPILED else "--no_compile"]
    with training(*flags, source=source) as trainer:
        device, monitor = trainer.accelerator.device, trainer.monitor
        times = [timed(trainer.train_step, device, 1)]
        # As the main process finds, or the others would wait for steps that it does not take.
        (rounds,) = broadcast_object_list([LONGEST_MEASURED_S[device.type] / (STEPS * times[0])])
        for _ in range(min(MOST_ROUNDS, int(rounds))):
            times.append(timed(trainer.train_step, device, STEPS))
            trainer.flush()
        images_per_s, memory = trainer.plan.global_batch_size / statistics.median(times), peak_memory_gib(device)
        with torch.profiler.profile() as profiler:
            timed(trainer.train_step, device, PROFILED_STEPS)
        if trainer.accelerator.is_main_process:
            profile.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(profile))
        peak = monitor.peak_flops and monitor.peak_flops * work.processes
        trainer.accelerator.wait_for_everyone()
        return {
            "card": device_name(device),
            "precision": trainer.accelerator.mixed_precision,
            "batch_size": batch,
            "images_per_s": images_per_s,
            "mfu": monitor.flops_per_image * images_per_s / peak if peak else None,
            "memory_gib": memory,
        }


def started(command: list[str], limit_s: float, log: Path, device: str, **environment: str) -> int | None:
    """Run a command whose output goes to a file; return its exit code, or None if it took too long and was ended."""
    on_cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    how = {"stderr": subprocess.STDOUT, "env": os.environ | on_cpu | environment, "cwd": REPO}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, **how, start_new_session=True)
        try:
            return process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tested(args: argparse.Namespace, limit_s: float) -> tuple[str, bool]:
    """Run the tests; return what came of them in a line, and whether that is good."""
    log = args.output_dir / "tests.txt"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *args.tests.split()]
    code = started(command, limit_s, log, args.device)
    text = log.read_text()
    if code is None:
        done = ", ".join(f"{text.count(word)} {word.strip().lower()}" for word in (" PASSED", " FAILED", " SKIPPED"))
        return f"not finished within {limit_s:.0f} s: {done} ({log})", False
    *_, last = ["nothing was said", *filter(str.strip, text.splitlines())]
    return f"{last.strip('= ')} ({log})", code == 0


def row_of(work: Work, args: argparse.Namespace, limit_s: float) -> tuple[str, bool]:
    """Measure a case; return its row of the table, which says so where nothing came of it, and whether that is good."""
    result, log = args.output_dir / f"{work.name}.json", args.output_dir / f"{work.name}.txt"
    result.unlink(missing_ok=True)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(work.processes)]
    command = [sys.executable, *(several if work.processes > 1 else []), __file__, "--device", args.device]
    # Traced alone on a CPU, for which the compiler takes minutes.
    quick = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"} if args.device == "cpu" and work.way == COMPILED else {}
    command += ["--measure", work.name, "--output_dir", str(args.output_dir)]
    code = started(command, limit_s, log, args.device, **quick) if limit_s > 1 else None
    card = f" x {work.processes}" if work.processes > 1 else ""
    if code != 0 or not result.is_file():
        late = f"not finished within {limit_s:.0f} s" if limit_s > 1 else "no time was left"
        why = late if code is None else f"failed, see {log.name}"
        return f"| –{card} | {work.model} | {work.way} | – | – | {why} | – | – |", False
    r = json.loads(result.read_text())
    mfu = f"{r['mfu']:.0%}" if r["mfu"] else "–"
    cells = [f"{r['card']}{card}", work.model, work.way, r["precision"], r["batch_size"], f"{r['images_per_s']:,.1f}"]
    return f"| {' | '.join(map(str, [*cells, mfu, format(r['memory_gib'], '.2f')]))} |", True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget_s", type=float, default=BUDGET_S, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu_benchmark"))
    parser.add_argument("--tests", default="-m gpu tests", help="arguments of pytest (default: %(default)s)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output_dir = args.output_dir.absolute()
    deadline = time.monotonic() + args.budget_s
    import torch

    count = torch.cuda.device_count() if args.device == "cuda" else 1
    if not count:
        sys.exit("error: no GPU is seen: --device cpu tries this program without one.")
    if args.measure:
        count = int(os.environ.get("WORLD_SIZE", count))
        work = next(work for work in works_of(args.device, count) if work.name == args.measure)
        found = measure(work, args.output_dir / "profiles" / f"{work.name}.json.gz")
        if os.environ.get("RANK", "0") == "0":
            (args.output_dir / f"{work.name}.json").write_text(json.dumps(found))
        return
    said, is_good = tested(args, SHARE_OF_TESTS * (deadline - time.monotonic()))
    print(f"Tests: {said}\n", flush=True)
    table, works = [HEAD, "| --- " * HEAD.count(" | ") + "| --- |"], works_of(args.device, count)
    print(*table, sep="\n", flush=True)
    for place, work in enumerate(works):
        left_s = deadline - time.monotonic()
        # Twice an equal share at most, so that one that hangs leaves time to the others.
        row, is_measured = row_of(work, args, min(left_s, 2 * left_s / (len(works) - place)))
        table.append(row)
        is_good = is_good and is_measured
        print(row, flush=True)
    (args.output_dir / "table.md").write_text("\n".join(table) + "\n")
    print(f"\ntorch {torch.__version__}; the table, what was said, and profiles are in {args.output_dir}")
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
