"""What stands on the terminal, and what in a log file."""

import itertools
import os
import struct
import subprocess
import sys

import pytest

from jit_accel.monitor import log
from jit_accel.monitor.log import Progress

SCRIPT = """
import sys
from jit_accel.base.console import say
from jit_accel.monitor.log import Progress
shown = Progress(40, 10, sys.argv[1] == "shown")
for step in range(11, 41):
    shown.step_done()
    if step % 10 == 0:
        shown.show({"step": step, "train/epoch": step / 8, "train/loss": 0.25, "perf/images_per_second": 1234.5,
                    "perf/step_time": 0.5})
        say(f"Saved {step}") if sys.argv[1] == "shown" else None
shown.close()
"""


def row(step, **more):
    return {
        "step": step,
        "train/epoch": 1.5,
        "train/loss": 0.25,
        "perf/images_per_second": 12.34,
        "perf/step_time": 2.0,
    } | more


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_plain_lines_with_all_that_matters(capsys):
    Progress(1000, 0, True).show(row(200))
    out, err = capsys.readouterr()
    assert out == "step 200/1,000 (20%) | epoch 1.50 | loss 0.2500 | 12.3 images/s | left 0:26:40\n"
    assert err == ""


def test_lines_become_rare_in_a_long_run_and_the_last_step_always_has_one(capsys, clock):
    shown = Progress(10_001, 0, True)
    times = []
    for step in range(1, 10_001):
        clock[0] += 9.0  # a day and an hour
        shown.show(row(step))
        if capsys.readouterr().out:
            times.append(clock[0] - 1000)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 9.0
    assert min(gaps) >= 10.0
    assert max(gaps) <= 309.0
    assert len(times) < 500
    shown.show(row(10_001))
    assert "(100%)" in capsys.readouterr().out


def test_other_processes_are_silent(capsys):
    shown = Progress(10, 0, False)
    for step in range(1, 11):
        shown.step_done()
        shown.show(row(step))
    shown.close()
    assert capsys.readouterr() == ("", "")


def on_a_terminal(argument):
    """What the script writes on a terminal of 120 columns."""
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, argument], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    assert process.wait() == 0
    return written.decode()


def test_a_terminal_gets_a_bar():
    written = on_a_terminal("shown")
    for part in ("train:", "40/40", "loss 0.2500", "1,234 images/s", "epoch 5.00", "Saved 20\r\n"):
        assert part in written
    assert "left" not in written
    assert on_a_terminal("hidden") == ""
