"""The paper's toy experiment (arXiv 2511.13720): what should a network predict if the data fill a plane?

    python benchmarks/toy.py [--dimensions 2 8 16 512] [--steps 2000] [--seed 0] [--output docs/images/toy.png]

A spiral in two dimensions is embedded in D by a random matrix with orthonormal columns, of which the networks know
nothing. For each D and each prediction (x, e, v) an MLP of five layers and 256 ReLUs learns with the loss in v; its
samples are projected back by the matrix. Noise, times, loss and solver are the package's own: a point is an image of
D channels and one pixel. Draws a figure and prints a table; the same seed gives the same numbers on the same machine.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

# Before torch: threads that spin would slow down whatever shares their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor, nn

from jit_accel.base import rng
from jit_accel.config.facts import Plan
from jit_accel.config.groups import OptimConfig
from jit_accel.model.objective import Objective
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.spaces import SPACES
from jit_accel.train.optimizers import lr_at, set_lr

WIDTH, LAYERS = 256, 5
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 256, 1e-3, 50
# Later times than on images: noise hides the arms of the spiral, 0.8 apart, only up to a standard deviation of 0.4.
P_MEAN, P_STD = 0.8, 1.0
POINTS, SAMPLING_STEPS = 2048, 20  # steps of t_eps, so that the last one ends on the prediction of x
DIRECTIONS = 128
FRAME = 2.5  # half a side of each picture


def spiral(seed: int, positions) -> Tensor:
    """One and a half turns, uniform in the angle: points (N, 2), each a function of its position, at most 2 from 0."""
    angle = 1.5 * math.pi * (1 + 2 * torch.from_numpy(rng.uniform(seed, "spiral", positions)))
    return torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1).mul_(2 / (4.5 * math.pi)).float()


def embedding(dimensions: int, seed: int) -> Tensor:
    """A random matrix (D, 2) with orthonormal columns."""
    gaussian = torch.randn(dimensions, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.float()


def as_images(points: Tensor) -> Tensor:
    """(N, D) as images (N, D, 1, 1), which is what objective and scheduler take."""
    return points[:, :, None, None]


def noise(seed: int, first: int, count: int, dimensions: int) -> Tensor:
    """Noise of `count` points, (count, D, 1, 1), in one draw: that of one image with a row for each point."""
    return as_images(Objective().noise(seed, [first], torch.empty(1, 1, count, dimensions))[0, 0])


class MLP(nn.Module):
    """`LAYERS` linear layers with ReLU between, from z (N, D, 1, 1) and t (N,) to a prediction like z."""

    def __init__(self, dimensions: int):
        super().__init__()
        sizes = [dimensions + 1, *[WIDTH] * (LAYERS - 1), dimensions]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(sample=self.layers(torch.cat([z.flatten(1), t[:, None]], dim=1)).view_as(z))


def train(prediction: str, matrix: Tensor, steps: int, seed: int) -> MLP:
    """An MLP that predicts "x", "e" or "v" of spirals embedded by `matrix` (D, 2)."""
    torch.manual_seed(seed)
    objective = Objective(prediction=prediction, P_mean=P_MEAN, P_std=P_STD)
    model = MLP(len(matrix))
    optimizer = torch.optim.Adam(model.parameters())
    optim, plan = OptimConfig(learning_rate=LEARNING_RATE), Plan(steps, WARMUP_STEPS, BATCH_SIZE, num_images=BATCH_SIZE)
    for step in range(steps):
        positions = np.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        x = as_images(spiral(seed, positions) @ matrix.T)
        e = noise(seed, step, BATCH_SIZE, len(matrix))
        t = objective.times(seed, positions)
        loss = objective.losses(model, x, t, e, None).mean()
        loss.backward()
        set_lr([optimizer], lr_at(step, optim, plan))
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def sample(model, prediction: str, dimensions: int, seed: int, points: int = POINTS) -> Tensor:
    """Generated points (N, D): from noise by Heun's method."""
    scheduler = JiTScheduler(prediction_type=prediction)
    scheduler.set_timesteps(SAMPLING_STEPS)
    z = noise(seed + 1, 0, points, dimensions)
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, t.expand(len(z))).sample, t, z).prev_sample
    return z.flatten(1)


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """How far points (N, 2) have to be moved to lie like others (N, 2): the mean over projections to a line."""
    angle = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    lines = torch.stack([angle.cos(), angle.sin()])
    return ((a @ lines).sort(dim=0).values - (b @ lines).sort(dim=0).values).abs().mean().item()


def distance_from_spiral(points: Tensor, matrix: Tensor, seed: int) -> float:
    """Mean distance of points (N, D) to the nearest of the embedded spiral, in all D dimensions."""
    inside = points @ matrix
    outside = (points - inside @ matrix.T).norm(dim=1)
    curve = spiral(seed, np.arange(8 * POINTS))
    return torch.hypot(torch.cdist(inside, curve).min(dim=1).values, outside).mean().item()


def draw(truth: Tensor, found: dict[tuple[int, str], Tensor], file: Path) -> None:
    """The points (N, 2) of each D and prediction, beside the true ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dimensions = sorted({d for d, _ in found})
    titles = {"truth": "ground truth", **{space: f"{space}-prediction" for space in SPACES}}
    size = (8, 0.4 + 1.78 * len(dimensions))
    figure, axes = plt.subplots(len(dimensions), len(titles), figsize=size, squeeze=False, layout="constrained")
    for d, row in zip(dimensions, axes):
        for axis, name in zip(row, titles):
            points = truth if name == "truth" else found[d, name]
            axis.scatter(*points.T, s=1.5, linewidths=0, color="0.35" if name == "truth" else "C0")
            axis.set(xlim=(-FRAME, FRAME), ylim=(-FRAME, FRAME), xticks=[], yticks=[], aspect="equal")
            outside = (points.abs() > FRAME).any(dim=1).float().mean().item()
            if outside > 0.01:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.text(0, -0.9 * FRAME, f"{outside:.0%} lie outside", ha="center", bbox=box)
        row[0].set_ylabel(f"D = {d}", rotation=0, ha="right", va="center", fontsize="large")
    for axis, title in zip(axes[0], titles.values()):
        axis.set_title(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def at_least(least: int):
    """A type of argparse."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return int(text)

    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=at_least(2), nargs="+", default=[2, 8, 16, 512], metavar="D")
    parser.add_argument("--steps", type=at_least(1), default=2000, help="of training, each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=1, help="more hardly help networks this small")
    parser.add_argument("--output", type=Path, default=Path("toy.png"), help="where the figure goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.process_time()

    truth, other = spiral(args.seed + 1, np.arange(2 * POINTS)).chunk(2)
    found: dict[tuple[int, str], Tensor] = {}
    print("| D | " + " | ".join(SPACES) + " | " + " | ".join(f"{s}, from the spiral" for s in SPACES) + " |")
    print("| --- " * (1 + 2 * len(SPACES)) + "|")
    for d in args.dimensions:
        matrix = embedding(d, args.seed)
        distances = []
        for prediction in SPACES:
            points = sample(train(prediction, matrix, args.steps, args.seed), prediction, d, args.seed)
            found[d, prediction] = points @ matrix
            distances.append(distance_from_spiral(points, matrix, args.seed + 2))
        apart = [sliced_wasserstein(found[d, prediction], truth) for prediction in SPACES]
        print(f"| {d} | " + " | ".join(f"{value:.3g}" for value in apart + distances) + " |", flush=True)
    draw(truth, found, args.output)
    floor = sliced_wasserstein(other, truth)
    print(
        f"\nSliced Wasserstein distance of {POINTS} points, projected back, to as many true ones ({floor:.3g} between "
        f"two sets of true points); then\nthe mean distance from the spiral in all D dimensions.\n{args.output}, "
        f"{time.process_time() - start:.0f} s of CPU time, torch {torch.__version__}, threads: {args.threads}"
    )


if __name__ == "__main__":
    main()
