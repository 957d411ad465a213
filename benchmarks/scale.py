"""What a run of many processes on many images costs each of its processes, simulated on one machine.

    python benchmarks/scale.py                                     a minute, 1 GiB of memory
    python benchmarks/scale.py --files 1000000   a folder of image files too, of paths that are made up

The order of the images is pure arithmetic, which one process does here as the last one of 256 would. Sharding is done
by torch's fake process group, on tensors without storage, as each of the named processes would see it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from jit_accel.data.batches import order
from jit_accel.model.snapshots import pieces_of
from jit_accel.model.transformer import build_model

PROCESSES, BATCH = 256, 32
IMAGES = (1_281_167, 14_197_122, 10**9)
GPUS_A_NODE = 8
MIB, GIB = 2**20, 2**30
COPIES = 4  # weights, two moments, an average
READERS = 2  # processes that open a folder together
OPENING = """
import contextlib, sys, time, psutil, pyarrow
from accelerate import Accelerator
from jit_accel.base import processes
from jit_accel.data import open_images
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.formats import folder, scan
files, on_all = int(sys.argv[2]), processes.on_all
if sys.argv[3] == "alone":
    processes.tables_shared = lambda _: contextlib.nullcontext()
def listed(_):
    chunks = [range(at, min(at + 2**18, files)) for at in range(0, files, 2**18)]
    names = ([f"class_{n * 1000 // files:04}/image_{n:08}.jpg" for n in chunk] for chunk in chunks)
    return scan.FolderScan(pyarrow.chunked_array(list(map(pyarrow.array, names))))
folder.scan_folder = listed
accelerator, began = Accelerator(), time.process_time()
def private():
    info = psutil.Process().memory_info()
    return info.rss - info.shared
before = private()
source = on_all(accelerator, lambda: open_images(sys.argv[1]), in_turn=True)
opened_s, opened = time.process_time() - began, private() - before
how = {"max_images": 0, "img_size": 8}
held = on_all(accelerator, lambda: split_holdout(source, 0.01, **how), in_turn=True)
print(opened_s, opened, time.process_time() - began - opened_s, private() - before - opened)
"""


def cost(work: Callable[[], object], times: int = 1) -> tuple[float, float]:
    """Return the seconds of one core and, of a run of its own, the bytes that NumPy held at most during `work`."""
    began = time.process_time()
    for _ in range(times):
        work()
    took_s = (time.process_time() - began) / times
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took_s, peak


def random_access() -> None:
    print("| images | sorted: epoch's first batch, s | MiB | Feistel: any batch, ms | MiB |\n" + "| --- " * 5 + "|")
    last = order.batch_positions(0, PROCESSES - 1, BATCH)
    for n in IMAGES:
        text = "- | -"
        if n < IMAGES[-1]:  # as many as a machine sorts

            def sort(n: int = n) -> None:
                order.epoch_permutation.cache_clear()
                order.image_indices(0, last, n, order.SORTED)

            took_s, peak = cost(sort)
            text = f"{took_s:.2f} | {peak / MIB:,.0f}"
            order.epoch_permutation.cache_clear()
        took_s, peak = cost(lambda n=n: order.image_indices(0, last, n, order.FEISTEL), 200)
        print(f"| {n:,} | {text} | {1000 * took_s:.2f} | {peak / MIB:.2f} |", flush=True)


def streams() -> None:
    print("| units | lanes | epoch's first batch, s | MiB | any later batch, ms |\n" + "| --- " * 5 + "|")
    for units in (10_000, 100_000, 1_000_000):
        lanes = order.default_lanes(units, PROCESSES, BATCH)
        sizes = np.full(units, IMAGES[-1] // units)

        def read(stream: order.StreamOrder, base: int = 0) -> None:
            places = stream.places(stream.positions_of(base, PROCESSES - 1, PROCESSES, BATCH))
            for epoch, lane, window in sorted(set(zip(*(part.tolist() for part in places[:3])))):
                stream.rows(epoch, stream.shuffled(epoch, lane, window))

        took_s, peak = cost(lambda sizes=sizes, lanes=lanes: read(order.StreamOrder(0, sizes, lanes, 1024)))
        stream = order.StreamOrder(0, sizes, lanes, 1024)
        later_s, _ = cost(lambda stream=stream: stream.positions_of(0, PROCESSES - 1, PROCESSES, BATCH), 200)
        print(f"| {units:,} | {lanes:,} | {took_s:.2f} | {peak / MIB:,.1f} | {1000 * later_s:.2f} |", flush=True)


def sharded(model: str, shape: tuple[int, ...] | None, rank: int) -> tuple[float, float]:
    """Return the GiB of weights, moments and an average that a process holds, and that it writes of a checkpoint.

    shape: of the mesh of processes, (sharded,) or (replicated, sharded); None for DDP, of which no process writes more.
    """
    dist.init_process_group("fake", rank=rank, world_size=PROCESSES, store=FakeStore())
    try:
        with torch.device("meta"):
            network = build_model(model, 256, 1000, proj_dropout=0.0, attn_dropout=0.0)
        if shape:
            names = ("replicated", "sharded")[-len(shape) :]
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
        state = dict(network.named_parameters())
        held = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in state.values())
        # Part by part, as a checkpoint is; the parts are alike
        ranks = [rank] if shape else range(PROCESSES)  # whole tensors look the same to all
        written = max(sum(p.values.nbytes for p in pieces_of(state, n, PROCESSES).values()) for n in ranks)
        return COPIES * held / GIB, COPIES * written / GIB
    finally:
        dist.destroy_process_group()


def sharded_as_each(*tasks: tuple[str, tuple[int, ...] | None, int]) -> list[tuple[float, float]]:
    """Return `sharded` of each, in a process of its own: torch keeps a mesh with the place that its first rank had."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(sharded, tasks, chunksize=1)


def sharding(models: list[str]) -> None:
    print("| model | way | a process holds, GiB | and writes, GiB |\n" + "| --- " * 4 + "|")
    for model in models:
        nodes = PROCESSES // GPUS_A_NODE
        for way, shape in {"DDP": None, "FSDP2": (PROCESSES,), "HSDP": (nodes, GPUS_A_NODE)}.items():
            ranks = (0, 1, GPUS_A_NODE, PROCESSES - 1) if shape else (0,)
            found = sharded_as_each(*((model, shape, rank) for rank in ranks))
            held, written = (max(values) for values in zip(*found))
            print(f"| {model} | {way} | {held:.3f} | {written:.4f} |", flush=True)


def folder(files: int) -> None:
    print("| paths | process | opened, s | private bytes an image | --holdout, s | bytes |\n" + "| --- " * 6 + "|")
    for way in ("alone", "shared"):
        with tempfile.TemporaryDirectory() as root:
            shared = {"JIT_ACCEL_CACHE": f"{root}/.cache", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": "29555", "WORLD_SIZE": str(READERS), "LOCAL_WORLD_SIZE": str(READERS)}
            processes = []
            for rank in range(READERS):
                environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-c", OPENING, root, str(files), way]
                processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            for what, process in zip(("first of a machine", "each other"), processes):
                opened_s, opened, held_s, held = map(float, process.communicate()[0].split())
                bytes_each = f"{opened / files:.0f} | {held_s:.1f} | {held / files:.0f}"
                print(f"| {files:,} | {what}, {way} | {opened_s:.1f} | {bytes_each} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["JiT-B/16", "JiT-L/16", "JiT-H/16"], help="default: %(default)s"
    )
    parser.add_argument("--files", type=int, default=0, help="of a folder that is opened; 0: none")
    args = parser.parse_args()
    print(f"{PROCESSES} processes, {BATCH} images each\n")
    random_access()
    print(f"\n{IMAGES[-1]:,} images in units:\n")
    streams()
    print()
    sharding(args.models)
    if args.files:
        print()
        folder(args.files)


if __name__ == "__main__":
    main()
