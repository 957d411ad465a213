"""Time counts as lost while the device has nothing to do for want of data, and only then."""

import multiprocessing
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from test_ready_batches import Counting

from jit_accel.data.batches import ready_batches
from jit_accel.data.batches.ready_batches import ReadyBatches, WaitTime, waiting_advice
from jit_accel.data.batches.workers import worker_memory_gib
from jit_accel.data.reading.images import TableImages
from jit_accel.monitor.log import read_metrics

CPU, ACCELERATOR = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `clock.now += seconds`."""

    class Clock:
        now = 100.0
        perf_counter = staticmethod(lambda: Clock.now)

    monkeypatch.setattr(ready_batches, "time", Clock)
    return Clock


class SlowLoader:
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __next__(self):
        self.clock.now += self.seconds


class Device(WaitTime):
    """WaitTime beside a device whose work ends after `queries` questions."""

    def __init__(self, clock, queries):
        super().__init__(ACCELERATOR)
        self.clock, self.queries = clock, queries

    def _work(self):
        return self

    def query(self):
        self.queries -= 1
        return self.queries < 0


class LateLoader(SlowLoader):
    """Its batch is ready after `seconds`."""

    def wait(self, timeout_s):
        waited = min(timeout_s, self.seconds)
        self.clock.now += waited
        self.seconds -= waited
        return self.seconds <= 0

    def __next__(self):
        self.clock.now += max(self.seconds, 0)


def test_on_a_cpu_the_whole_wait_counts(clock):
    lost = WaitTime(CPU)
    for _ in range(4):
        lost.next(SlowLoader(clock, 0.25))
        clock.now += 0.75
    assert lost.seconds == pytest.approx(1.0)
    assert lost.end_interval(4, lost.seconds) == pytest.approx(0.25)
    assert lost.seconds == 0


@pytest.mark.parametrize(
    ("ready_after_s", "busy_queries", "lost_s"),
    [(0, 0, 0), (0, 50, 0), (0.5, 0, 0.5), (0.5, 100, 0.4), (0.5, 10_000, 0)],
)
def test_beside_an_accelerator_only_the_wait_while_it_is_idle_counts(clock, ready_after_s, busy_queries, lost_s):
    lost = Device(clock, busy_queries)
    lost.next(LateLoader(clock, ready_after_s))
    assert lost.seconds == pytest.approx(lost_s, abs=1e-6)


def test_a_prefetcher_tells_whether_a_batch_is_there():
    loader = Counting(allowed=1)
    prefetcher = ReadyBatches(loader, "cpu", depth=2)
    next(prefetcher)
    assert not prefetcher.wait(0.01)
    loader.allowed.release()
    assert prefetcher.wait(5)
    loader.fail_at = 2
    next(prefetcher)
    loader.allowed.release()
    assert prefetcher.wait(5)  # an error comes at once as well
    prefetcher.close()


def test_time_between_intervals_belongs_to_none(clock):
    lost = WaitTime(CPU)
    for _ in range(2):
        lost.next(SlowLoader(clock, 1.0))
        clock.now += 1.0
        assert lost.end_interval(1, lost.seconds) == pytest.approx(0.5)
        clock.now += 1000  # samples, checkpoints


def intervals(clock, lost, count, wait_s, steps=5, step_s=0.2):
    """The shares told, of the intervals that were enough to tell."""
    found = []
    for _ in range(count):
        for _ in range(steps):
            lost.next(SlowLoader(clock, wait_s))
            clock.now += step_s - wait_s
        lost.end_interval(steps, lost.seconds)
        found.append(lost.lost_lately())
    return [share for share in found if share is not None]


def test_a_share_is_told_of_enough_steps_and_not_of_the_start(clock):
    assert intervals(clock, WaitTime(CPU), 41, wait_s=0.02) == [pytest.approx(0.1)] * 10
    lost = WaitTime(CPU)
    assert intervals(clock, lost, 1, wait_s=0.2, steps=100) == []  # workers start
    assert intervals(clock, lost, 40, wait_s=0) == [0.0] * 10
    assert intervals(clock, WaitTime(CPU), 4, wait_s=0.2) == []  # 15 steps of 3 s: too little to tell
    assert intervals(clock, WaitTime(CPU), 100, wait_s=0.001, step_s=0.001) == []  # half a second
    assert intervals(clock, WaitTime(CPU), 2, wait_s=5, steps=2, step_s=10) == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--num_workers 7 (now 2)"),
        ({"num_workers": 7}, "python -m jit_accel.prepare --data_path photos --format uint8 --output_dir FOLDER"),
        ({"cores": 1, "num_workers": 0}, "python -m jit_accel.prepare"),
        ({"num_workers": 7, "crop": "random"}, "and train with --crop center"),
        ({"num_workers": 7, "is_prepared": True}, "--format uint8, which needs no decoding"),
        ({"is_encoded": False, "num_workers": 0}, "--num_workers 7"),
        ({"is_encoded": False, "num_workers": 7}, "disk"),
        ({"is_remote": True, "num_workers": 7}, "--num_workers 14"),
        ({"is_remote": True, "num_workers": 0, "cores": 1}, "--num_workers 1"),
    ],
)
def test_the_advice_fits_the_data(changes, words):
    case = {"num_workers": 2, "cores": 8, "is_remote": False, "is_encoded": True, "is_prepared": False} | changes
    advice = waiting_advice("photos", **case)
    assert words in advice
    remedies = ("--num_workers", "jit_accel.prepare", "--format uint8", "disk")
    assert sum(remedy in advice for remedy in remedies) <= 2


def _hold(gib, ready, end):
    memory = np.ones(int(gib * 2**30), np.uint8)
    ready.set()
    end.wait()
    del memory


def test_the_memory_of_the_largest_worker_is_found():
    assert worker_memory_gib() is None
    context = multiprocessing.get_context("fork")
    readies, end = [context.Event(), context.Event()], context.Event()
    sizes = (0.01, 0.25)
    workers = [context.Process(target=_hold, args=(gib, ready, end)) for gib, ready in zip(sizes, readies)]
    for worker in workers:
        worker.start()
    assert all(ready.wait(120) for ready in readies)
    assert 0.25 < worker_memory_gib() < 2
    end.set()
    for worker in workers:
        worker.join(60)
    assert worker_memory_gib() is None


def metrics(folder):
    return {row["step"]: row.get("data/wait_fraction") for row in read_metrics(folder)}


@pytest.fixture
def clock_of_training(monkeypatch):
    """A clock that only steps move, by 0.1 s: on a busy machine batches may really come too late."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ready_batches, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("jit_accel.train.trainer.set_lr", lambda *args: setattr(clock, "now", clock.now + 0.1))
    return clock


def test_a_training_that_waits_says_so_once_and_how_to_mend_it(images, tmp_path, monkeypatch, capfd, clock_of_training):
    monkeypatch.setattr("jit_accel.train.feed.cores_per_process", lambda: 6)
    read = TableImages.read

    def read_slowly(*args):
        clock_of_training.now += 0.15
        return read(*args)

    monkeypatch.setattr(TableImages, "read", read_slowly)
    monkeypatch.setattr("jit_accel.data.batches.loader.MOST_KEPT_BYTES", 0)  # read each time
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--max_steps", "33"]
    assert helpers.train_here(*flags, "--log_every_steps", "10") == 0
    found = metrics(tmp_path / "out")
    assert [step for step, share in found.items() if share is not None] == [10, 20, 30, 33]
    assert all(found[step] == pytest.approx(0.15 / (0.15 + 0.1)) for step in (20, 30))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "waits for data" in line]
    assert len(warnings) == 1
    assert "--num_workers 5 (now 0)" in warnings[0]


def test_a_training_that_is_fed_well_says_nothing(images, tmp_path, monkeypatch, capfd, clock_of_training):
    monkeypatch.setattr(ready_batches, "_LEAST_S", 0.0)
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--max_steps", "40"]
    assert helpers.train_here(*flags, "--log_every_steps", "20", "--num_workers", "1") == 0
    assert metrics(tmp_path / "out")[40] == 0.0
    assert all(0 < row["data/worker_rss_gib"] < 4 for row in read_metrics(tmp_path / "out") if row["step"] % 20 == 0)
    assert "waits for data" not in capfd.readouterr().err


@pytest.mark.multiprocess
def test_the_slowest_process_is_the_one_that_counts(images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--log_every_steps", "3"]
    environment = {"TEST_SLOW_RANK": "1"}
    helpers.train_group(tmp_path, *flags, num_processes=2, environment=environment)
    found = metrics(tmp_path / "out")
    assert found[6] > 0.2
