"""Processes that fail, die or lag: the run ends soon, and the right one is named."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers import Group

from jit_accel.base import watchdog
from jit_accel.monitor.log import read_metrics
from jit_accel.train.feed import Feed
from jit_accel.train.trainer import Trainer

HOST = re.escape(socket.gethostname())
pytestmark = pytest.mark.multiprocess


def trouble():
    """Let something happen to one process after step 5; the limit of the watch is short from there on."""
    kind, rank, folder = os.environ["TEST_TROUBLE"].split(":")
    watchdog.BEAT_S = 0.2
    step, next_ = Trainer.train_step, Feed.next

    def train_step(self):
        step(self)
        if self.step == 5:
            self.watch.limit_s = 1.0 if kind != "request" else 0
            if kind == "request" and self.accelerator.is_main_process:
                (self.output_dir / watchdog.REQUEST_FILE).touch()
                wait_for(self.output_dir / watchdog.STACKS_FILE)
            if os.environ["RANK"] == rank:
                sick(kind)

    def sick(kind):
        if kind == "raise":
            raise ValueError("the disk has gone")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "sleep":
            time.sleep(1000)

    def next_batch(self):
        if kind == "data" and os.environ["RANK"] == rank:
            trainer_has_begun.append(1)
            if len(trainer_has_begun) == 6:
                wait_for(Path(folder) / "warned")
        return next_(self)

    def wait_for(path):
        while not path.exists():
            time.sleep(0.01)

    trainer_has_begun = []
    warn = watchdog.warn
    watchdog.warn = lambda text: (warn(text), (Path(folder) / "warned").touch())
    Trainer.train_step, Feed.next = train_step, next_batch


@pytest.fixture
def run(images, tmp_path):
    def start(kind: str, rank: int, codes: list[int] | None) -> str:
        environment = {"TEST_SETUP": "test_watchdog:trouble", "TEST_TROUBLE": f"{kind}:{rank}:{tmp_path}"}
        flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--max_steps", "20"]
        group = Group(flags, tmp_path / "log.txt", 2, environment)
        if kind == "freeze":  # nothing else ends it
            for process in group.processes[:1]:
                process.join(300)
            group.kill()
        found = group.wait()
        assert codes is None or found == codes, group.output()
        assert "2 x cpu" in group.output()
        return group.output()

    return start


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


def test_a_process_that_is_silent_ends_the_run_in_time(run, tmp_path):
    output = run("freeze", 1, [1, -signal.SIGKILL])
    named = rf"no process has gone on for \d+ s: process 1 on {HOST} is silent for \d+ s"
    assert re.match(named, failed(tmp_path))
    assert re.search(f"error: {named}", output)
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert re.search(rf"=== process 1 on {HOST}: .*\nno answer", stacks)
    assert "thread MainThread:" in stacks


def test_a_process_that_lags_is_named_with_the_place_where_it_is(run, tmp_path):
    run("sleep", 1, [1, 1])
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
