"""What each solver costs and gives: the error of its images, and their distance from real ones, against network calls.

    python benchmarks/solvers.py PIPELINE [PIPELINE ...] [--calls 13 25 49 99] [--time_shift S] [--figure FILE]

The error is the root mean square, over 64 images in [0, 1], of the difference from Heun's in 400 steps from the same
noise; the distance is the Fréchet distance of EfficientNet-Lite0 (`pip install -e ".[eval]"`) of so many images from
`--reference`; 0 leaves it out. Prints a table for each pipeline (a folder, or a run) and guidance, all in one figure.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import jit_accel as jit
from jit_accel.base.host import keep_heap
from jit_accel.model.solvers import SOLVERS

EXACT_STEPS, ERROR_IMAGES = 400, 64


def steps_for(method: str, calls: int) -> int:
    """Return the steps of so many network calls; Heun's last step is a single one."""
    return math.ceil(calls / SOLVERS[method].calls)


def drawn(pipe, method: str, steps: int, scale: float, time_shift: float = 1.0) -> torch.Tensor:
    classes = pipe.transformer.config.num_classes
    labels = [number % classes for number in range(ERROR_IMAGES)]
    generator = torch.Generator().manual_seed(0)
    how = {"generator": generator, "output_type": "pt", "method": method, "guidance_scale": scale}
    how["time_shift"] = time_shift
    return pipe(labels, steps, **how).images


def rows_of(pipe, scale: float, args) -> list[tuple[str, int, float, float | None]]:
    """Return (method, calls, error, distance) for each solver and number of calls."""
    exact, rows = drawn(pipe, "heun", EXACT_STEPS, scale), []
    for method in SOLVERS:
        for calls in args.calls:
            steps, distance = steps_for(method, calls), None
            error = (drawn(pipe, method, steps, scale, args.time_shift) - exact).square().mean().sqrt().item()
            if args.distance_of:
                how = {"num_images": args.distance_of, "features": "efficientnet_lite0", "metrics": "fd"}
                how |= {"num_inference_steps": steps, "method": method, "guidance_scale": scale, "batch_size": 100}
                how["time_shift"] = args.time_shift
                distance = jit.measure(pipe, args.reference, **how)["fd_efficientnet_lite0"]
            rows.append((method, calls, error, distance))
            far = "" if distance is None else f"{distance:.1f}"
            print(f"| {method} | {calls} | {error:.4f} | {far} |", flush=True)
    return rows


def draw_figure(found: dict[str, list], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = 2 if any(row[3] is not None for rows in found.values() for row in rows) else 1
    figure, axes = plt.subplots(len(found), count, figsize=(5 * count, 3.4 * len(found)), squeeze=False)
    for line, (title, rows) in zip(axes, found.items()):
        for axis, column, name in zip(line, (2, 3), ("RMS difference from Heun, 400 steps", "Fréchet distance")):
            for method in SOLVERS:
                points = [(row[1], row[column]) for row in rows if row[0] == method]
                axis.plot(*zip(*points), marker="o", label=method)
            axis.set(xlabel="network calls", ylabel=name, title=title, xscale="log", yscale="log")
            axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="PIPELINE")
    parser.add_argument("--calls", type=int, nargs="+", default=[13, 25, 49, 99])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--time_shift", type=float, default=1.0)
    parser.add_argument("--distance_of", type=int, default=2000)
    parser.add_argument("--reference", default="builtin:fashion_mnist_test")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    keep_heap()
    found = {}
    for name in args.pipelines:
        pipe = jit.load(name)
        pipe.set_progress_bar_config(disable=True)
        for scale in args.guidance:
            title = f"{Path(name).resolve().name}, guidance {scale:g}"
            print(f"\n{title}\n\n| solver | network calls | error | distance |\n| --- | --- | --- | --- |")
            found[title] = rows_of(pipe, scale, args)
    if args.figure:
        draw_figure(found, args.figure)


if __name__ == "__main__":
    main()
