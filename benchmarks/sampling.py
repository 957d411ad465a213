"""What sampling costs beside the network's own time, and what guidance costs.

    python benchmarks/sampling.py             all cases that suit this device
    python benchmarks/sampling.py quick s4    some of them

The variants alternate inside one process and only their ratios are worth comparing. On a CPU the clock is that of the
process's own time on all cores, so that other programs matter little. Calls of the network and the rows of their
batches are counted, and must be exactly those needed.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jit_accel.base.devices import DTYPES, chosen_precision, device_name
from jit_accel.model.generation import SamplerSettings, generate_batches
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.precision import BlockWork, times_of
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import build_model
from jit_accel.sample.image_files import ImageFiles
from jit_accel.sample.image_plan import SamplePlan

NUM_CLASSES = 10


@dataclass(frozen=True)
class Case:
    what: str
    model: str
    img_size: int
    batch_size: int
    device: str
    steps: int = 10
    rounds: int = 5


CASES = {
    "quick": Case("JiT-Ti/7, 28 px, batch 16", "JiT-Ti/7", 28, 16, "cpu", rounds=6),
    "s4": Case("JiT-S/4, 32 px, batch 4", "JiT-S/4", 32, 4, "cpu", steps=5, rounds=3),
    "b16": Case("JiT-B/16, 256 px, batch 64", "JiT-B/16", 256, 64, "cuda", steps=50),
    "l16": Case("JiT-L/16, 256 px, batch 64", "JiT-L/16", 256, 64, "cuda", steps=50, rounds=3),
}


@dataclass
class Network:
    """Counts the calls of a network, and the time in them."""

    module: torch.nn.Module
    rows: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.rows.clear()
        self.seconds = 0.0
        hooks = [self.module.register_forward_pre_hook(self._begin), self.module.register_forward_hook(self._end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module, arguments) -> None:
        self.rows.append(len(arguments[0]))
        self.began = now()

    def _end(self, module, arguments, output) -> None:
        self.seconds += now() - self.began


def now() -> float:
    """Seconds: of the clock when a GPU has done its work, or the CPU time of this process."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    def __init__(self, case: Case):
        self.case = case
        network = build_model(case.model, img_size=case.img_size, num_classes=NUM_CLASSES).eval().to(case.device)
        self.pipeline = JiTPipeline(network, JiTScheduler())
        self.pipeline.set_progress_bar_config(disable=True)
        self.network = Network(network)
        patch_size, side = network.config.patch_size, case.img_size
        work = BlockWork.of(network.config, patch_size, side, side, case.batch_size, trains=False)
        self.mixed_precision = chosen_precision() or times_of(work).faster
        self.dtype = DTYPES.get(self.mixed_precision)

    def sample(self, guidance_scale: float, interval: tuple[float, float], folder: Path | None = None) -> float:
        """Seconds that a batch takes, with its files if `folder` says where."""
        case = self.case
        settings = SamplerSettings(case.steps, guidance_scale, interval)
        plan = SamplePlan(tuple(range(NUM_CLASSES)), (-(-case.batch_size // NUM_CLASSES),) * NUM_CLASSES, NUM_CLASSES)
        ids = plan.ids()[: case.batch_size]
        numbers = [image.number for image in ids]
        with contextlib.ExitStack() as stack:
            if folder:
                store = ImageFiles(folder, plan, (case.img_size, case.img_size), "png")
                stack.enter_context(store.pool)
                store.prepare()
            began = now()
            with self.precision():
                ((_, images),) = generate_batches(self.pipeline, numbers, settings=settings, batch_size=case.batch_size)
            pixels = images.permute(0, 2, 3, 1).cpu().numpy()
            if folder:
                store.write(ids, pixels)
                store.flush()
            return now() - began

    @torch.no_grad()
    def two_pass(self) -> float:
        """Seconds of a batch with guidance 1 where both passes are made whatever the weight, as in plain samplers."""
        case, network, scheduler = self.case, self.network.module, self.pipeline.scheduler
        labels = torch.arange(case.batch_size, device=case.device) % NUM_CLASSES
        no_class = torch.full_like(labels, NUM_CLASSES)
        began = now()
        z = torch.randn(case.batch_size, 3, case.img_size, case.img_size).to(case.device)
        scheduler.set_timesteps(case.steps, device=case.device)
        with self.precision():
            for t in scheduler.timesteps:
                conditional, unconditional = network(z, t, labels).sample, network(z, t, no_class).sample
                z = scheduler.step(unconditional + 1.0 * (conditional - unconditional), t, z).prev_sample
        z.cpu()
        return now() - began

    def precision(self):
        return torch.autocast(self.case.device, self.dtype, enabled=self.dtype is not None)

    def needed_rows(self, interval: tuple[float, float]) -> list[int]:
        """The batch of each call: double where guidance acts."""
        self.pipeline.scheduler.set_timesteps(self.case.steps)
        low, high = torch.tensor(interval).tolist()
        times = self.pipeline.scheduler.timesteps.tolist()
        return [self.case.batch_size * (2 if low < t < high or (low == 0 and t < high) else 1) for t in times]

    def measure(self) -> dict:
        times: dict[str, list[float]] = {"one": [], "two": [], "interval": [], "always": []}
        shares: dict[float, list[float]] = {1.0: [], 2.0: []}
        counts = {}
        self.sample(2.0, (0.0, 1.0))
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(self.case.rounds):
                times["two"].append(self.two_pass())
                times["one"].append(self.sample(1.0, (0.1, 1.0)))
                for name, interval in (("interval", (0.1, 1.0)), ("always", (0.0, 1.0))):
                    times[name].append(self.sample(2.0, interval))
                for scale, of_network in shares.items():
                    with self.network.watched():
                        seconds = self.sample(scale, (0.1, 1.0), Path(folder))
                    of_network.append(self.network.seconds / seconds)
        for name, interval in (("interval", (0.1, 1.0)), ("always", (0.0, 1.0))):
            with self.network.watched():
                self.sample(2.0, interval)
            counts[name] = list(self.network.rows)
            assert counts[name] == self.needed_rows(interval), f"{counts[name]}, needed: {self.needed_rows(interval)}"
        return {"times": times, "shares": shares, "counts": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = (
        "case",
        "steps",
        "guidance 1",
        "over two passes",
        "rows for [0.1, 1] of [0, 1]",
        "time of [0, 1]",
        "in the network",
        "guided",
    )
    print(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for name in args.cases or [name for name, case in CASES.items() if case.device == device]:
        case = CASES[name]
        bench = Bench(case)
        result = bench.measure()
        times, counts = result["times"], result["counts"]
        rows, all_rows = sum(counts["interval"]), sum(counts["always"])
        print(
            f"| {case.what}, {bench.mixed_precision} | {case.steps} "
            f"| {case.batch_size / statistics.median(times['one']):.3g} images/s "
            f"| {ratio(times['two'], times['one']):.2f} x | {rows} of {all_rows} ({rows / all_rows:.2f}) "
            f"| {ratio(times['interval'], times['always']):.2f} | {statistics.median(result['shares'][1.0]):.1%} "
            f"| {statistics.median(result['shares'][2.0]):.1%} |",
            flush=True,
        )
    print(f"\n{device_name(torch.device(device))}, torch {torch.__version__}, {torch.get_num_threads()} threads; Heun")


def ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators))


if __name__ == "__main__":
    main()
