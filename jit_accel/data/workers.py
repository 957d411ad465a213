"""The processes that decode: torch DataLoader workers that survive the signals meant for the trainer."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import pyarrow
import torch
from torch.utils.data import DataLoader


def make_loader(dataset, *, num_workers: int, sampler=None, pin_memory: bool = False) -> DataLoader:
    """A DataLoader that passes the items of `dataset` through as they are, prefetching two a worker."""
    forked = num_workers > 0 and sys.platform.startswith("linux")
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_identity,
        worker_init_fn=partial(_init_worker, os.getpid()),
        multiprocessing_context="fork" if forked else None,  # spawning imports torch again: seconds a worker
        generator=torch.Generator(),  # else each start draws from the global generator, which dropout uses too
    )


def _identity(item):
    return item


def _init_worker(parent_pid: int, worker_id: int) -> None:
    if os.getppid() != parent_pid:  # killed already: torch's watchdog would take its heir for our parent and wait
        os._exit(1)
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
