"""The planner's memory against that of trainings on this machine.

    python benchmarks/plan.py            JiT-Ti, S and B on the CPU, some minutes, up to 7 GB of memory
    python benchmarks/plan.py Ti S

A training of a few steps runs in a process of its own, with a checkpoint amid them that a slow disk takes only after
the next step: the most that a training needs at once. Its peak resident set, less what was resident when all was
imported and no network was there yet, stands against weights, moments, averages, gradients, activations and the copies
that the checkpoint is written from. It is measured twice: where freed memory is given back at once (glibc's
MALLOC_MMAP_THRESHOLD_), and where the heap is kept, as a training does unless told.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading

from jit_accel.config.presets import parse_model_name
from jit_accel.plan.memory import Division, Workload, bytes_of_checkpoint, memory_of

CASES = {"Ti": ("JiT-Ti/4", 128), "S": ("JiT-S/4", 24), "B": ("JiT-B/4", 4)}  # and images a step
SIDE, CLASSES, GIB = 64, 10, 2**30
STEPS = 3
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # each larger piece of memory is a mapping of its own


def measured(name: str) -> float:
    """Return the GiB that a training takes beside the program, in this process."""
    import psutil

    import jit_accel.train.build  # noqa: F401 (all that a training imports)
    from jit_accel.model import checkpointer
    from jit_accel.train import main
    from jit_accel.train.samples import SampleSheets
    from jit_accel.train.trainer import Trainer

    is_trained, train_step, write_tensors = threading.Event(), Trainer.train_step, checkpointer.write_tensors

    def step(trainer):
        train_step(trainer)
        if trainer.step == STEPS:
            is_trained.set()

    def write_late(*args, **how):
        is_trained.wait()
        return write_tensors(*args, **how)

    def stop(*_):
        raise KeyboardInterrupt

    Trainer.train_step, checkpointer.write_tensors = step, write_late
    SampleSheets.draw = stop  # the last checkpoint is on the disk by then
    model, batch = CASES[name]
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--model {model} --img_size {SIDE} --batch_size {batch} --max_steps {STEPS} --seed 1"
        flags += f" --save_every_steps {STEPS - 1} --sample_every_steps 0 --num_inference_steps 1 --ema_decays auto"
        flags += " --mixed_precision no --num_workers 0 --no_html_report"
        code = main(["--data_path", "builtin:fashion_mnist", "--output_dir", f"{folder}/run", *flags.split()])
    assert code == 130, f"the training ended with {code}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (peak - before) / GIB


def planned(name: str) -> float:
    """Return the same by the planner."""
    model, batch = CASES[name]
    work = Workload(*parse_model_name(model), SIDE, CLASSES, precision="no")
    memory = memory_of(work, Division("ddp", recompute=False, batch_size=batch, accumulation=1), "cpu")
    return (memory.peak + bytes_of_checkpoint(work)) / GIB


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(sys.argv[2])))
        return
    print("| model | images a step | planned GiB | measured GiB | ratio | kept | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or CASES:
        child, found = [sys.executable, __file__, "--measure", name], []
        for environment in (GIVEN_BACK, {}):
            told = subprocess.run(
                child, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | environment
            ).stdout
            found.append(json.loads(told.splitlines()[-1]))
        model, batch = CASES[name]
        ratios = " | ".join(f"{gib:.2f} | {planned(name) / gib:.2f}" for gib in found)
        print(f"| {model} | {batch} | {planned(name):.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
