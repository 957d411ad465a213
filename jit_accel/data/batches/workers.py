"""The processes that decode: how they start, end and are missed."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial

import psutil
import pyarrow
import torch
from torch.utils.data import DataLoader

from jit_accel.base.host import give_heap_back


def from_workers(dataset, *, num_workers: int, sampler=None) -> Iterator:
    """Return an iterator of what `make_loader`'s loader yields, whose workers have begun.

    It raises `RuntimeError` where a worker was killed, as torch mostly does.
    """
    return _watched(iter(make_loader(dataset, num_workers=num_workers, sampler=sampler)))


def _watched(iterator: Iterator) -> Iterator:
    workers = list(getattr(iterator, "_workers", ()))
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError) as error:  # of a worker that was killed while it handed a batch over
            gone = [worker for worker in workers if _has_ended(worker)]
            if not gone:
                raise
            rule = "is gone, killed for want of memory, perhaps: try fewer --num_workers"
            raise RuntimeError(f"DataLoader worker (pid {gone[0].pid}) {rule}") from error
        yield item


def _has_ended(process: multiprocessing.Process) -> bool:
    """Return True for a process that is gone; its connections break a moment before."""
    process.join(1)
    return process.exitcode is not None


def make_loader(dataset, *, num_workers: int, sampler=None) -> DataLoader:
    """Return a DataLoader that passes the items of `dataset` through as they are, prefetching two a worker."""
    forked = num_workers > 0 and sys.platform.startswith("linux")
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=partial(_init_worker, os.getpid()),
        multiprocessing_context="fork" if forked else None,  # spawning imports torch again: seconds a worker
        generator=torch.Generator(),  # else each start draws from the global generator, which dropout uses too
    )


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_per_process() -> int:
    """Return this process's share of the cores, where a launcher started several on this machine."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, num_cores() // max(1, int(local) if local.isdigit() else 1))


def worker_memory_gib() -> float | None:
    """Return the memory of the largest process that this one started, without shared batches and mapped files."""
    sizes = []
    for process in multiprocessing.active_children():
        try:
            memory = psutil.Process(process.pid).memory_info()
        except psutil.Error:  # it has just ended
            continue
        sizes.append(memory.rss - getattr(memory, "shared", 0))
    return max(sizes) / 2**30 if sizes else None


def _identity(item):
    return item


def _init_worker(parent_pid: int, worker_id: int) -> None:
    if os.getppid() != parent_pid:  # killed already: torch's watchdog would take its heir for our parent and wait
        os._exit(1)
    give_heap_back()
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    # Ctrl-C and the scheduler's signals reach the whole process group. The trainer then finishes its step and
    # saves, for which it needs us; we leave when it closes the loader, or when torch's watchdog misses it.
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _obey_the_second)


def _obey_the_second(signum, frame) -> None:
    """multiprocessing ends workers that hang with SIGTERM at exit, after DataLoader sent a first one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
