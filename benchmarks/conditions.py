"""Which way of showing a network its condition is better, and what a bottleneck costs.

    python benchmarks/conditions.py [--steps 400] [--seeds 0 1] [--output_dir runs/conditions]

Trains the quickstart's network on two tasks, once for each way and seed, and prints a table: the loss and the PSNR of
held-out images (the weights' average), and the processor's time beside that of the first way. All runs of a seed
see the same images, noise and times. A run that is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
TASKS = ("downscale:4", "mask:0.5")
WAYS = {
    "added": (),
    "added, bottleneck of 64": ("--condition_bottleneck", "64"),
    "added, bottleneck of 16": ("--condition_bottleneck", "16"),
    "tokens": ("--condition_inject", "tokens"),
    "tokens, bottleneck of 16": ("--condition_inject", "tokens", "--condition_bottleneck", "16"),
}
METRICS = ("ema/val_loss", "val/psnr")


def train(folder: Path, task: str, way: tuple[str, ...], seed: int, steps: int) -> dict[str, float]:
    """Return the last value of each metric of a run, and `cpu_s`, the processor's seconds."""
    result = folder / "result.json"
    if not result.exists():
        command = [sys.executable, "-m", "jit_accel.train", "--config", str(REPO / "launch/recipes/quickstart.yaml")]
        command += ["--condition_from", task, *way, "--seed", str(seed), "--max_steps", str(steps)]
        command += ["--holdout", "0.1", "--val_every_steps", str(steps), "--val_images", "1000"]
        command += ["--paired_every_steps", str(steps), "--paired_images", "256", "--guidance_scale", "1"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--output_dir", str(folder)], check=True, cwd=REPO)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = {name: [row[name] for row in rows if name in row][-1] for name in METRICS}
        found["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result.write_text(json.dumps(found))
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/conditions"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    found = {}
    for seed in args.seeds:
        for task in TASKS:
            for number, (name, way) in enumerate(WAYS.items()):
                folder = args.output_dir.absolute() / f"{task.replace(':', '_')}_{number}_seed_{seed}"
                found.setdefault((task, name), []).append(train(folder, task, way, seed, args.steps))
    print("| task | condition | validation loss, by seed | PSNR, dB, by seed | time |")
    print("| --- | --- | --- | --- | --- |")
    for (task, name), runs in found.items():
        losses, decibels = (", ".join(f"{run[metric]:.{n}f}" for run in runs) for metric, n in zip(METRICS, (4, 2)))
        first = [run["cpu_s"] for run in found[task, next(iter(WAYS))]]
        time = statistics.median(run["cpu_s"] / a for run, a in zip(runs, first))
        print(f"| `{task}` | {name} | {losses} | {decibels} | {time:.2f} |")


if __name__ == "__main__":
    main()
