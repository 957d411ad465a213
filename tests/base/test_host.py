"""Modes of the processor and of the heap, seen at what they do."""

import subprocess
import sys

import pytest
import torch

from jit_accel.base.host import HEAP_VARIABLES, denormals_flushed, keep_heap

NUMBERS = 2**20  # enough for every thread to have a share


def share_flushed() -> float:
    """Return the share of products below the normal range that come out as zero."""
    products = torch.full((NUMBERS,), 1e-30) * 1e-10
    return (products == 0).float().mean().item()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(NUMBERS).add(1)  # now both are there, and have modes of their own
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor keeps them always")
def test_denormals_are_flushed_by_all_threads_inside_the_block_alone(two_threads):
    assert share_flushed() == 0
    with denormals_flushed():
        assert share_flushed() == 1
        with denormals_flushed():
            assert share_flushed() == 1
        assert share_flushed() == 1
    assert share_flushed() == 0


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor keeps them always")
def test_the_mode_that_was_there_comes_back_whatever_torchs_defaults_are(two_threads):
    torch.set_flush_denormal(True)
    try:
        with torch.device("meta"), denormals_flushed():
            pass
        assert torch.full((), 1e-30, device="cpu").mul(1e-10).item() == 0
    finally:
        torch.set_flush_denormal(False)


def test_a_failure_leaves_the_mode_as_it_was(two_threads):
    with pytest.raises(KeyError), denormals_flushed():
        raise KeyError
    assert share_flushed() == 0


def test_normal_numbers_stay_as_they_are(two_threads):
    numbers = torch.randn(NUMBERS)
    expected = numbers * numbers
    with denormals_flushed():
        assert torch.equal(numbers * numbers, expected)


HEAP = """
import resource
import torch
from jit_accel.base.host import keep_heap
{call}
def faults_of(step):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def step():
    [torch.ones(2**22) for _ in range(12)]
for _ in range(12):
    step()
print(faults_of(step))
"""


def faults(call: str, **environment: str) -> int:
    """Return the page faults of a step that takes and frees 192 MiB, after a dozen like it."""
    done = subprocess.run([sys.executable, "-c", HEAP.format(call=call)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's heap")
def test_memory_that_a_step_frees_is_kept_for_the_next(monkeypatch):
    for name in HEAP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert faults("keep_heap()") < 100
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))  # whoever sets the heap himself has what he set
    assert faults("keep_heap()") > 1000


FREED = """
import ctypes
from jit_accel.base.host import keep_heap
keep_heap()
c = ctypes.CDLL(None)
for function, argument, result in ((c.malloc, "size_t", "void_p"), (c.free, "void_p", None), (c.sbrk, "int", "void_p")):
    function.argtypes, function.restype = [getattr(ctypes, f"c_{argument}")], result and getattr(ctypes, f"c_{result}")
pieces = [c.malloc(2**24) for _ in range(160)]  # none of it is touched
end = c.sbrk(0)
for piece in pieces:
    c.free(piece)
print(end - c.sbrk(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's heap")
def test_more_than_two_gib_at_the_end_of_the_heap_are_kept(monkeypatch):
    for name in HEAP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0


WORKER = """
import ctypes
from jit_accel.base.host import keep_heap
from jit_accel.data.batches.workers import make_loader
c = ctypes.CDLL(None)
c.sbrk.restype, c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
class GivenBack:
    def __getitem__(self, index):
        pieces = [c.malloc(2**24) for _ in range(16)]
        end = c.sbrk(0)
        for piece in pieces:
            c.free(piece)
        return end > c.sbrk(0)
keep_heap()
print(*make_loader(GivenBack(), num_workers=1, sampler=[0]), GivenBack()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's heap")
def test_a_process_that_decodes_gives_large_images_back(monkeypatch):
    for name in HEAP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]  # unlike the process above it


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_heap()
    with denormals_flushed():
        pass
