"""A command as a process of its own, whose words go to a file, and which ends with this program."""

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from jit_accel.base.console import redacted
from jit_accel.base.errors import StopRequest, UserError
from jit_accel.base.host import end_with_parent

LOOK_S = 0.2
GRACE_S = 240.0  # for a training that is asked to end, and saves a checkpoint
LAST_LINES = 12  # of a command that has failed, which are shown
IS_POSIX = os.name == "posix"


def run_command(command: Sequence[str], log: Path, stop: StopRequest) -> int:
    """Run a command to its end, and return its exit code; what it prints is added to `log`.

    A signal that `stop` has received goes to all processes of the command, whose end is waited for; a second Ctrl-C
    ends them at once. Raises `UserError` where it cannot be started, `OSError` where the log cannot be written.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {redacted(shlex.join(command))}\n".encode())
        file.flush()
        how = {"start_new_session": True, "preexec_fn": end_with_parent} if IS_POSIX else {}
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **how)
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started ({error.strerror}).", about="launch") from None
        try:
            is_told = False
            while child.poll() is None:
                if stop.number and not is_told:
                    _signal_all(child, signal.SIGTERM)
                    is_told = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
            if child.returncode:  # a launcher need not wait for its processes
                psutil.wait_procs(_left_of(child), timeout=GRACE_S)
        except BaseException:
            _signal_all(child, getattr(signal, "SIGKILL", signal.SIGTERM))
            child.wait()
            raise
    return child.returncode


def last_lines(log: Path) -> str:
    """Return the end of what a command has printed."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:] if line.strip())


def _signal_all(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(OSError):
        if IS_POSIX:
            os.killpg(child.pid, number)
        else:
            child.send_signal(number)


def _left_of(child: subprocess.Popen) -> list[psutil.Process]:
    """Return the living processes of the command's session."""
    if not IS_POSIX:
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == child.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
