"""What watching a training costs: steps with everything that watches on and off, alternating in one run.

    python benchmarks/monitoring.py [--rounds 12] [--steps 10] [FLAG ...]

On: losses by t, update ratio, averages, health, metrics.jsonl and Weights & Biases (offline), read every 10 steps. Off:
the same trainer with a monitor that does nothing. Further flags go to the training. A second figure is the time inside
the monitor's own calls, which is less noisy, but blind to what its helpers take from other cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time

# Before torch: threads that spin would slow down whatever shares their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

CASE = ("--model", "JiT-S/4", "--img_size", "32", "--batch_size", "16", "--num_workers", "0", "--use_wandb")
WATCHED_CALLS = ("record_by_t", "record", "watched_step", "read")


class Silence:
    """In place of the monitor."""

    def record_by_t(self, t, losses): ...

    def record(self, step, learning_rate, loss, grad_norm): ...

    def read(self, is_asked_to_stop):
        from jit_accel.monitor.monitor import Interval

        return Interval((), stop_asked=False, bad_images=0, images_seen=0, not_finite=None)

    def watched_step(self, step):
        return contextlib.nullcontext()


class Timed:
    """The monitor, and the seconds spent in it."""

    def __init__(self, monitor):
        self.monitor, self.seconds = monitor, 0.0

    def __getattr__(self, name):
        attribute = getattr(self.monitor, name)
        return self._timed(attribute) if name in WATCHED_CALLS else attribute

    def _timed(self, method):
        def call(*args):
            began = time.perf_counter()
            result = method(*args)
            self.seconds += time.perf_counter() - began
            return self._timed_parts(result) if isinstance(result, contextlib.AbstractContextManager) else result

        return call

    @contextlib.contextmanager
    def _timed_parts(self, manager):
        began = time.perf_counter()
        with manager:
            self.seconds += time.perf_counter() - began
            yield
            began = time.perf_counter()
        self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    args, flags = parser.parse_known_args()

    import torch

    from jit_accel.base.devices import device_name
    from jit_accel.base.watchdog import Watchdog
    from jit_accel.config.command_line import parse_args
    from jit_accel.train.accelerator import build_accelerator
    from jit_accel.train.build import build_trainer
    from jit_accel.train.results import record_run

    with tempfile.TemporaryDirectory() as folder:
        data = ("--data_path", "builtin:fashion_mnist", "--output_dir", folder, "--log_every_steps", str(args.steps))
        config = parse_args([*CASE, *data, "--max_steps", "100000", *flags])
        accelerator = build_accelerator(None, None, [])
        trainer = build_trainer(config, accelerator, Watchdog(accelerator, 0))
        trainer.monitor.open(0, record_run(config.recorded(), trainer.plan, trainer.network, accelerator))
        device, on, off = accelerator.device, Timed(trainer.monitor), Silence()

        def seconds_a_step(monitor) -> float:
            trainer.monitor, began = monitor, time.perf_counter()
            for _ in range(args.steps):
                trainer.train_step()
            trainer.flush()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - began) / args.steps

        for monitor in (on, off):  # warm up
            seconds_a_step(monitor)
        on.seconds, times = 0.0, {"on": [], "off": []}
        for number in range(args.rounds):
            pair = [("on", on), ("off", off)]
            for name, monitor in pair if number % 2 else reversed(pair):
                times[name].append(seconds_a_step(monitor))
        on.monitor.close(0)
        accelerator.end_training()
    ratios = [a / b - 1 for a, b in zip(times["on"], times["off"])]
    inside = on.seconds / (args.steps * sum(times["on"]))
    print(
        f"{config.model.model}, {config.data.img_size} px, batch {config.optim.batch_size}, "
        f"{accelerator.mixed_precision}, {device_name(device)}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n"
        f"step: {statistics.median(times['off']):.3f} s without, {statistics.median(times['on']):.3f} s with "
        f"monitoring; median of {args.rounds} paired differences {statistics.median(ratios):+.2%} "
        f"(quartiles {' to '.join(f'{q:+.2%}' for q in statistics.quantiles(ratios, n=4)[::2])})\n"
        f"inside the monitor's calls: {inside:.2%} of the time"
    )


if __name__ == "__main__":
    main()
