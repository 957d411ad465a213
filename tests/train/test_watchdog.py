"""Processes that fail, die or lag: the run ends soon, and the right one is named."""

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import DEVICES_OF_TWO, Group, on_device

from jit_accel.base import watchdog
from jit_accel.monitor.log import read_metrics
from jit_accel.train import build
from jit_accel.train.feed import Feed
from jit_accel.train.trainer import Trainer

HOST = re.escape(socket.gethostname())
pytestmark = pytest.mark.multiprocess


def trouble():
    """Let something happen to one process after step 5; where that is to lag, the limit is short until it is named."""
    kind, rank, folder = os.environ["TEST_TROUBLE"].split(":")
    # Who fails says so; on a busy machine it may be silent for a second before that.
    watchdog.BEAT_S = 1.0 if kind in ("raise", "memory", "worker") else 0.2
    step, next_ = Trainer.train_step, Feed.next

    def train_step(self):
        step(self)
        if self.step == 5:
            watches.append(self.watch)
            if kind in ("freeze", "sleep", "data"):
                self.watch.limit_s = 1.0
            if kind == "request" and self.accelerator.is_main_process:
                (self.output_dir / watchdog.REQUEST_FILE).touch()
                wait_for(self.output_dir / watchdog.STACKS_FILE)
            if os.environ["RANK"] == rank or rank == "both":
                sick(kind)

    def sick(kind):
        if kind == "raise":
            raise ValueError("the disk has gone")
        if kind.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "sleep":
            time.sleep(1000)
        if kind == "memory":
            raise MemoryError("of the whole machine")
        if kind == "worker":
            os.kill(psutil.Process().children()[-1].pid, signal.SIGKILL)

    def next_batch(self):
        if kind == "data" and os.environ["RANK"] == rank:
            trainer_has_begun.append(1)
            if len(trainer_has_begun) == 6:
                wait_for(Path(folder) / "warned")
        return next_(self)

    def wait_for(path):
        while not path.exists():
            time.sleep(0.01)

    def warn_and_wait(text):
        warn(text)
        for watch in watches:
            watch.limit_s = 600.0
        (Path(folder) / "warned").touch()

    trainer_has_begun, watches = [], []
    warn, watchdog.warn = watchdog.warn, warn_and_wait
    Trainer.train_step, Feed.next = train_step, next_batch
    if kind == "kill-late" and os.environ["RANK"] == "0":
        cause = watchdog.Watchdog._cause_of
        watchdog.Watchdog._cause_of = lambda *args: (time.sleep(6 * watchdog.BEAT_S), cause(*args))[1]


@pytest.fixture
def run(images, tmp_path):
    def start(
        kind: str, rank: int | str, codes: list[int] | None, *more: str, setup="trouble", processes=2, device="cpu"
    ) -> str:
        environment = {"TEST_SETUP": f"test_watchdog:{setup}", "TEST_TROUBLE": f"{kind}:{rank}:{tmp_path}"}
        environment |= on_device(device)
        flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--max_steps", "20", *more]
        group = Group(flags, tmp_path / "log.txt", processes, environment)
        if kind == "freeze":  # nothing else ends it
            for process in group.processes[:1]:
                process.join(300)
            group.kill()
        found = group.wait()
        assert codes is None or found == codes, group.output()
        name = torch.cuda.get_device_name() if device == "cuda" else device
        assert f"{processes} x {name}" in group.output() or setup == "early_trouble"
        return group.output()

    return start


def early_trouble():
    """Let something happen to one process before the first step, with a short limit; until it is warned of, if late."""
    kind, rank, folder = os.environ["TEST_TROUBLE"].split(":")
    watchdog.BEAT_S = 0.2
    build_model, make, warn = build.build_model, watchdog.Watchdog, watchdog.warn
    warned, watches = Path(folder) / "warned", []

    def make_with_limit(accelerator, limit_s):
        watches.append(make(accelerator, 1.0 if kind in ("freeze", "late") else limit_s))
        return watches[0]

    def warn_and_wait(text):
        warn(text)
        watches[0].limit_s = 600.0
        warned.touch()

    # The processes may need longer than that to meet.
    build.Watchdog, watchdog.warn = make_with_limit, warn_and_wait

    def build_model_late(*args):
        if os.environ["RANK"] == rank:
            if kind == "raise":
                raise ValueError("no such driver")
            if kind in ("kill", "freeze"):
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            while not warned.exists():
                time.sleep(0.01)
        return build_model(*args)

    build.build_model = build_model_late


LIMIT = ("--max_stall_minutes", f"{1 / 60}")


def failed(tmp_path) -> str:
    return (tmp_path / "run" / "FAILED").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_process_raises_is_the_reason_that_is_left(run, tmp_path, rank):
    output = run("raise", rank, None)
    reason = "ValueError: the disk has gone"
    assert reason in failed(tmp_path)
    assert rank == 0 or re.match(rf"process 1 on {HOST} failed: {reason}", failed(tmp_path))
    assert output.count("Traceback (most recent call last)") == 1  # that of the process itself
    assert rank == 1 or "error (process 1): the main process is gone" in output or failed(tmp_path) in output


def test_a_killed_process_is_named(run, tmp_path):
    run("kill", 1, None)
    assert re.match(rf"process 1 on {HOST} is silent for \d+ s", failed(tmp_path))


def test_all_that_are_left_name_the_killed_process_not_what_they_felt(run, tmp_path):
    """Also where the main process, which alone knows who is silent, does not notice as long as the others wait."""
    output = run("kill-late", 1, None, processes=3)
    assert re.match(rf"process 1 on {HOST} is silent for \d+ s", failed(tmp_path))
    assert "Traceback" not in output


def test_a_process_that_is_silent_ends_the_run_in_time(run, tmp_path):
    output = run("freeze", 1, [1, -signal.SIGKILL])
    named = rf"no process has gone on for \d+ s: process 1 on {HOST} is silent for \d+ s"
    assert re.match(named, failed(tmp_path))
    assert re.search(f"error: {named}", output)
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert re.search(rf"=== process 1 on {HOST}: .*\nno answer", stacks)
    assert "thread MainThread:" in stacks


def hanging_files():
    """As `trouble`, on a file server that hangs when the main process has something to say."""
    trouble()
    watchdog.write_text = build.leave_failure = lambda *_: threading.Event().wait()


def test_a_file_server_that_hangs_does_not_keep_the_processes(run):
    log = run("sleep", 1, [1, 1], setup="hanging_files")
    assert re.search(rf"no process has gone on for \d+ s: process 1 on {HOST} trains step 5", log)


@pytest.mark.parametrize("device", DEVICES_OF_TWO)
def test_a_process_that_lags_is_named_with_the_place_where_it_is(run, tmp_path, device):
    run("sleep", 1, [1, 1], device=device)
    assert re.match(rf"no process has gone on for \d+ s: process 1 on {HOST} trains step 5", failed(tmp_path))
    stacks = (tmp_path / "run" / "stacks.txt").read_text().split("=== process ")
    assert "in sick" in stacks[2]
    assert "in sick" not in stacks[1]


def test_a_process_that_waits_for_its_data_is_named_and_waited_for(run, tmp_path):
    output = run("data", 1, [0, 0])
    assert re.search(rf"Warning: no process has gone on for \d+ s: process 1 on {HOST} waits for its data\.", output)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [*range(1, 21)]
    assert not (tmp_path / "run" / "FAILED").exists()


def test_the_stacks_of_all_processes_are_had_for_the_asking(run, tmp_path):
    output = run("request", 0, [0, 0])
    assert "The stacks of all processes are in " in output
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert stacks.count("thread MainThread:") == 2
    assert not (tmp_path / "run" / "STACKS").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_process_raises_before_the_first_step_is_the_reason_that_is_left(run, tmp_path, rank):
    output = run("raise", rank, None, setup="early_trouble")
    assert "ValueError: no such driver" in failed(tmp_path)
    assert rank == 0 or re.match(rf"process 1 on {HOST} failed", failed(tmp_path))
    assert output.count("Traceback (most recent call last)") == 1  # that of the process itself


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_before_the_first_step_is_named(run, tmp_path, rank):
    run("kill", rank, None, setup="early_trouble")
    assert re.match(rf"process {rank} on {HOST}.* is (silent|gone)", failed(tmp_path))


def test_a_process_that_is_silent_before_the_first_step_ends_the_run_in_time(run, tmp_path):
    output = run("freeze", 1, [1, -signal.SIGKILL], setup="early_trouble")
    assert re.match(rf"no process has gone on for \d+ s: process 1 on {HOST} is silent for", failed(tmp_path)), output


def test_a_process_that_takes_long_to_start_is_waited_for(run, tmp_path):
    output = run("late", 1, [0, 0], setup="early_trouble")
    assert re.search("Warning: no process has gone on for .* starts", output)
    assert not (tmp_path / "run" / "FAILED").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for_long(images, tmp_path, rank):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run"), *LIMIT]
    group = Group(flags, tmp_path / "log.txt", 1, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    assert group.wait() == [2], group.output()
    assert "the 2 processes of this run could not all meet at 127.0.0.1 within" in group.output()
    assert "Traceback" not in group.output()
    assert not (tmp_path / "run").exists()


def test_a_main_process_that_is_killed_is_named_by_the_others(run, tmp_path):
    output = run("kill", 0, [-signal.SIGKILL, 2])
    assert re.match(rf"process 0 on {HOST}, the main one, is gone", failed(tmp_path))
    assert failed(tmp_path).strip() in output


@pytest.mark.parametrize("kind", ["raise", "memory", "worker"])
def test_one_reason_is_left_where_several_processes_fail(run, tmp_path, kind):
    workers = ("--num_workers", "1") if kind == "worker" else ()
    run(kind, "both" if kind == "raise" else 1, None, *workers)
    reasons = {"raise": "ValueError: the disk has gone", "memory": "MemoryError: of the whole machine"}
    named = "" if kind == "raise" else rf"process 1 on {HOST} failed: "
    assert re.match(rf"({named}|process \d on {HOST} failed: )?{reasons.get(kind, '.*worker')}", failed(tmp_path))


def test_a_process_that_compiles_goes_on():
    found = []

    def backend(module, inputs):
        found.append(watchdog.compiles())
        return lambda *args: (found.append(watchdog.compiles()), module(*args))[1]

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert found == [True, False]
    assert not watchdog.compiles()


def _short_limit():
    watchdog.BEAT_S = 0.2
    build.Watchdog = lambda accelerator, _: watchdog.Watchdog(accelerator, STOPPED_S - 2)


STOPPED_S = 8.0


def test_a_run_that_was_stopped_whole_goes_on_afterwards(images, tmp_path):
    """By a debugger, or on a machine that slept, for longer than the limit."""
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--max_steps", "400"]
    environment = {"TEST_SETUP": "test_watchdog:_short_limit"}
    group = Group(flags, tmp_path / "log.txt", 2, environment)
    while len(read_metrics(tmp_path / "run")) < 5 and group.processes[0].is_alive():
        time.sleep(0.05)
    for sent, seconds in ((signal.SIGSTOP, STOPPED_S), (signal.SIGCONT, 0)):
        for process in group.processes:
            os.kill(process.pid, sent)
        time.sleep(seconds)
    assert group.wait() == [0, 0], group.output()
    assert len(read_metrics(tmp_path / "run")) == 400
