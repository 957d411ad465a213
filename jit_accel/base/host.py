"""Modes of the processor and the C library's heap that computing on a CPU needs; processes without a parent."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

HEAP_VARIABLES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
# Numbers of glibc's mallopt(3), and values: pieces from 32 MiB on, its limit, that fit into no hole are mappings of
# their own (M_MMAP_THRESHOLD), or holes that are a little too small would make a long run's heap grow; what is free at
# the heap's end stays however large it is (M_TRIM_THRESHOLD); and the heap grows by 64 MiB at a time (M_TOP_PAD).
KEPT = {-3: 2**25, -1: -1, -2: 2**26}
# What glibc comes to by itself where large pieces are freed again and again.
GIVEN_BACK = {-3: 2**25, -1: 2**26, -2: 2**17}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


def keep_heap() -> None:
    """Keep memory that is freed for the next step: by glibc, and unless the environment says otherwise.

    Else a step's activations go back to the system, which clears each page before the next step has it again: 320,000
    page faults a step of JiT-B/4, a twentieth of its time.
    """
    _set_heap(KEPT)


def give_heap_back() -> None:
    """Let a process that was forked from one that keeps its heap give large pieces back: of the largest image, say."""
    _set_heap(GIVEN_BACK)


def _set_heap(options: dict[int, int]) -> None:
    if any(name in os.environ for name in HEAP_VARIABLES):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take numbers below float32's normal range, 1.2e-38, for zero inside the block, in all threads that compute.

    Gradients and second moments are so small while the network is nearly the zero function that it begins as, and a
    CPU computes with such numbers ten times slower. Nothing happens on processors that cannot.
    """
    import torch

    least = torch.full((), 2.0**-126, dtype=torch.float32, device="cpu")  # whatever the default is
    was_flushed = (least / 2).item() == 0
    _flush(True)
    try:
        yield
    finally:
        _flush(was_flushed)


def _flush(mode: bool) -> None:
    import torch

    if not torch.set_flush_denormal(mode):
        return
    # Threads take the mode from the one that starts them: those that are there already have to be asked, each.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # OpenMP of another make
        task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: torch.set_flush_denormal(mode))
        ctypes.CDLL(None).GOMP_parallel(task, None, torch.get_num_threads(), 0)


def adopt_orphans() -> None:
    """Make what this process's children leave behind its own children, on Linux."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Let this process get SIGTERM when its parent is gone, on Linux; to be called between fork and exec."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # of systems that have none
        ctypes.CDLL(None).prctl(option, value)
