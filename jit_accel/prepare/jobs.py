"""Work shared among processes that stop when they are asked to, and when the program that started them is gone."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pyarrow
import torch
from tqdm import tqdm

from jit_accel.base.errors import Stopped, StopRequest, UserError
from jit_accel.prepare.encode import Encoded

_POLL_S = 0.2
_worker: tuple | None = None  # in a worker: what the jobs have in common, the counter of images, the request to stop


def run_jobs(
    function: Callable, jobs: list[tuple], common: Any, num_workers: int, stop: StopRequest, **bar: str | int | None
) -> int:
    """Call `function(common, *job)` for all jobs in `num_workers` processes; return the number of images they counted.

    `bar` is of the progress bar: `desc`, `total`, all images, and `initial`, those of jobs that were done before.
    Raises `Stopped` once a signal came; the jobs that were under way are lost.
    """
    if not jobs:
        return 0
    # Spawning would import torch again: seconds a worker.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    counter, halt = context.Value("q", 0), context.Value("b", 0)
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), context, _init_worker, (os.getpid(), common, counter, halt))
    try:
        pending = {pool.submit(_call, function, job) for job in jobs}
        with tqdm(unit=" images", disable=None, **bar) as shown:
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
                shown.update(counter.value + bar["initial"] - shown.n)
                stop.raise_if_asked()
                for future in done:
                    future.result()
        return counter.value
    except BrokenProcessPool:
        time.sleep(_POLL_S)  # a signal to the whole group ends workers before it is noticed here
        stop.raise_if_asked()
        raise UserError(
            "a process was killed, most likely because the memory was full. What is finished is kept: "
            "run the same command with a smaller --num_workers.",
            about="num_workers",
        ) from None
    finally:
        halt.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def counted(images: Iterable[Encoded]) -> Iterator[Encoded]:
    """Pass the images of a job on, counting them, until the program is to stop."""
    _, counter, halt = _worker
    for image in images:
        if halt.value:
            raise Stopped(0)
        with counter.get_lock():
            counter.value += 1
        yield image


def _init_worker(parent_pid: int, common: Any, counter, halt) -> None:
    global _worker
    _worker = common, counter, halt
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    # Ctrl-C reaches the whole process group; the main process asks us to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _call(function: Callable, job: tuple) -> None:
    function(_worker[0], *job)
