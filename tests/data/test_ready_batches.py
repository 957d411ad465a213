"""Prefetching changes when a batch is read, and nothing else."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from data_samples import SIZE, image_folder, parquet
from helpers import DEVICES

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.batch import Batch, PixelBatch, empty_batch, ready
from jit_accel.data.batches.ready_batches import ReadyBatches, batches


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for number in range(4):
        parquet(root / "parquet" / f"{number}.parquet", range(10 * number, 10 * number + 10))
    return {
        "random_access": open_images(image_folder(root / "folder", 22)),
        "stream": open_images(root / "parquet", streaming=True),
    }


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert prefetching() == []


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def plain(source, num_workers=0):
    return build_loader(source, img_size=SIZE, batch_size=3, seed=5, num_workers=num_workers, shuffle_buffer=8)


def content(batch: Batch):
    return batch.images.tolist(), batch.labels.tolist(), batch.positions.tolist(), batch.bad_images


@pytest.mark.parametrize("kind", ["random_access", "stream"])
@pytest.mark.parametrize(("num_workers", "depth"), [(0, 0), (0, 1), (0, 5), (2, 2)])
def test_batches_states_and_epochs_are_those_of_the_plain_loader(sources, kind, num_workers, depth):
    expected = plain(sources[kind])
    prefetcher = ReadyBatches(plain(sources[kind], num_workers), "cpu", depth)
    assert prefetcher.state_dict() == expected.state_dict()
    for _ in range(18):
        assert content(next(prefetcher)) == content(ready(next(expected), "cpu"))
        assert prefetcher.state_dict() == expected.state_dict()
        assert prefetcher.epoch == expected.epoch
    prefetcher.close()


@pytest.mark.parametrize("kind", ["random_access", "stream"])
def test_a_resumed_prefetcher_goes_on_with_what_was_not_handed_out(sources, kind):
    first = ReadyBatches(plain(sources[kind]), "cpu", 2)
    for _ in range(4):
        next(first)
    while not first.wait(10):
        pass
    resumed = ReadyBatches(plain(sources[kind]), "cpu", 2)
    resumed.load_state_dict([first.state_dict()])
    assert resumed.state_dict() == first.state_dict()
    for _ in range(6):
        assert content(next(resumed)) == content(next(first))
    with pytest.raises(RuntimeError, match="after the first batch"):
        resumed.load_state_dict(first.state_dict())
    first.close()
    resumed.close()


@pytest.mark.parametrize("kind", ["random_access", "stream"])
def test_batches_are_those_of_a_training_on_one_process(sources, kind):
    made = batches(sources[kind], img_size=SIZE, batch_size=3, seed=5, shuffle_buffer=8)
    expected = plain(sources[kind])
    for batch, pixels in zip(made, [next(expected) for _ in range(5)]):
        assert content(batch) == content(ready(pixels, "cpu"))
        assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)
    made.close()


class Counting:
    """A loader of numbered batches that waits for permission before each, and fails at number `fail_at`."""

    def __init__(self, fail_at=None, allowed=10**9):
        self.number, self.fail_at, self.is_closed = 0, fail_at, False
        self.allowed = threading.Semaphore(allowed)
        self.epoch = 0

    def __next__(self):
        self.allowed.acquire()
        if self.number == self.fail_at:
            raise UserError("--data_path: the disk is gone.")
        self.number += 1
        return PixelBatch(
            torch.full((1, 3, 2, 2), self.number), torch.zeros(1, dtype=torch.long), np.array([self.number])
        )

    def state_dict(self):
        return {"number": self.number}

    def close(self):
        self.is_closed = True


def number_of(batch):
    return int(batch.positions[0])


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_error_comes_out_where_its_batch_would(fail_at):
    prefetcher = ReadyBatches(Counting(fail_at), "cpu", depth=3)
    assert [number_of(next(prefetcher)) for _ in range(fail_at)] == list(range(1, fail_at + 1))
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is gone"):
            next(prefetcher)
    assert prefetcher.state_dict() == {"number": fail_at}
    prefetcher.close()


def test_no_more_than_depth_batches_are_read_ahead():
    loader = Counting(allowed=0)
    prefetcher = ReadyBatches(loader, "cpu", depth=2)
    assert loader.number == 0
    assert prefetching() == []
    for _ in range(8):
        loader.allowed.release()
    next(prefetcher)
    deadline = time.monotonic() + 120
    while loader.number < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert loader.number == 3  # one handed out, two in store
    prefetcher.close()
    assert loader.number == 3


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_it_closes_at_any_moment_and_twice(consumed):
    loader = Counting()
    prefetcher = ReadyBatches(loader, "cpu", depth=2)
    for _ in range(consumed):
        next(prefetcher)
    prefetcher.close()
    prefetcher.close()
    assert loader.is_closed
    assert prefetching() == []
    with pytest.raises(RuntimeError, match="close"):
        next(prefetcher)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"img_size": 0}, {"lanes": 0}])
def test_numbers_below_one_are_refused(tmp_path, wrong):
    source = open_images(parquet(tmp_path / "d.parquet", range(4)))
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} 0: must be at least 1"):
        batches(source, **{"img_size": SIZE, "batch_size": 2} | wrong)


def test_a_loader_that_hangs_does_not_hold_up_closing(monkeypatch):
    monkeypatch.setattr("jit_accel.data.batches.ready_batches.PATIENCE_S", 0.1)
    loader = Counting(allowed=1)
    prefetcher = ReadyBatches(loader, "cpu", depth=2)
    next(prefetcher)
    assert not prefetcher.wait(0.01)
    prefetcher.close()
    (thread,) = prefetching()
    loader.allowed.release()  # the batch arrives after all
    thread.join(60)
    assert loader.is_closed


LEFT_OPEN = """
import sys
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.ready_batches import ReadyBatches
source, left_open = open_images(sys.argv[1]), []
for num_workers in (0, 2):
    loader = build_loader(source, img_size=4, batch_size=2, seed=0, num_workers=num_workers)
    left_open.append(ReadyBatches(loader, "cpu", depth=2))
    next(left_open[-1])
print("done")
"""


def test_a_program_that_forgets_to_close_it_still_ends(tmp_path):
    """With workers and without: one program has both."""
    image_folder(tmp_path, 6)
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_arrives_mirrored_and_normalised(device):
    images = torch.arange(4 * 3 * 2 * 5).to(torch.uint8).view(4, 3, 2, 5)
    mirror = np.array([True, False, False, True])
    pixels = PixelBatch(images, torch.zeros(4, dtype=torch.int64), np.arange(4), ["a.png: empty"], mirror)
    before = images.clone()
    batch = ready(pixels, device)
    assert batch.images.device.type == batch.labels.device.type == device
    x = images.to(device).float().div_(127.5).sub_(1)
    assert torch.equal(batch.images[[0, 3]], x[[0, 3]].flip(-1))
    assert torch.equal(batch.images[[1, 2]], x[[1, 2]])
    assert torch.equal(images, before)
    assert (batch.positions.tolist(), batch.bad_images) == ([0, 1, 2, 3], ["a.png: empty"])
    assert [name for name, value in vars(type(batch)).items() if callable(value) and name[0] != "_"] == []  # no method


def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it():
    shape = (2, 3, 5, 7)
    held = [empty_batch(shape) for _ in range(6)]
    held += [held[0][1:].flatten(), held[1].numpy(), torch.utils.dlpack.from_dlpack(held[2])]
    for n, one in enumerate(held[:6]):
        one.fill_(n)
    views = held[6:]
    del held, one
    for _ in range(20):
        empty_batch(shape).fill_(99)
    assert [int(np.asarray(view).max()) for view in views] == [0, 1, 2]
    first = empty_batch(shape)
    address = first.data_ptr()
    del first
    assert empty_batch(shape).data_ptr() == address


def test_workers_fill_memory_that_is_shared_already(monkeypatch):
    assert not empty_batch((2, 3, 4, 4)).is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", object)
    batch = empty_batch((2, 3, 4, 4))
    batch.numpy()[:] = 7
    assert (batch.shape, batch.dtype, batch.is_shared()) == ((2, 3, 4, 4), torch.uint8, True)
    assert (batch == 7).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["random_access", "stream"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_made_ahead_are_whole_when_they_are_used(sources, kind, num_workers, device):
    """Through page-locked memory on a GPU, whose work the host runs ahead of."""
    expected = plain(sources[kind])
    prefetcher = ReadyBatches(plain(sources[kind], num_workers), device, depth=2)
    found = []
    for _ in range(50):
        batch = next(prefetcher)
        assert batch.images.device.type == batch.labels.device.type == device
        if device == "cuda":
            torch.cuda._sleep(1_000_000)
        found.append(batch.images)
    # On the same device: a GPU divides by a number as it multiplies by its inverse, rounded otherwise in the last bit.
    assert all(torch.equal(images, ready(next(expected), device).images) for images in found)
    prefetcher.close()
