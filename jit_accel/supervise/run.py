"""A training that is started again when something of it is lost, as long as it makes progress."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

from jit_accel.base.console import say, warn
from jit_accel.base.errors import StopRequest, UserError, shutdown_timeout_s
from jit_accel.base.files import write_text
from jit_accel.base.folder_lock import drop_lost_holder, living_holder
from jit_accel.base.host import adopt_orphans, end_with_parent
from jit_accel.monitor.log import FAILED_FILE

RESTARTS = 2  # in a row, without a newer checkpoint
PAUSE_S = 2.0  # before a restart: processes on other machines find out that one is gone, and end
GRACE_S = 240.0  # for processes that have lost their launcher, and save a checkpoint
LOST_GRACE_S = 15.0  # in which a training finds out itself, and says, that a part of it on another machine is gone
SILENT_S = 15.0  # three heartbeats: the training itself, when it has started, waits for more
LOST_FILE = ".lost"  # another text each time that a part of the training is lost, on whatever machine
LOOK_S = 0.5
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # which Windows does not have
WRONG_SETTING = 2  # exit code of a training that did not begin, where its launcher hands it on


class Supervisor:
    """The parent of a launcher, one on each machine; they know of each other by the run's folder alone.

    Each start is from the newest checkpoint (`--resume auto`). What a lost launcher leaves behind is waited for, so
    that there is one training at a time; then the others are told, since their processes may wait for those in vain.
    `restarts` in a row that bring no newer checkpoint are the end.

    Args:
        command: the launcher's.
        folder: the run's, on a file system that all machines share.
        restarts: how many; 0 for a training that is not started again.
        limit_s: how long the processes of a lost training may take to end, on whatever machine.
    """

    def __init__(self, command: list[str], folder: Path, restarts: int, limit_s: float):
        self.command, self.folder, self.restarts, self.limit_s = command, folder, restarts, limit_s
        given = shutdown_timeout_s()
        self.stop, self.grace_s = StopRequest(), GRACE_S if given is None else given
        self.is_lost_elsewhere = False  # the last start, on another machine

    def run(self) -> int:
        """Train until that is done, a signal asks for an end, or nothing comes of it. Returns the exit code."""
        adopt_orphans()
        reached, fruitless, is_restart = self.newest_step(), 0, False
        failure = self.folder / FAILED_FILE
        with self.stop:
            while not self.stop.number:
                if self.restarts:
                    self._wait_for_the_folder()
                before = _state_of(failure)
                if not self.stop.number and (code := self._train()) == 0:
                    return 0
                if self.stop.number:
                    break
                if not self.restarts:
                    return code if code > 0 else 128 - code
                step = self.newest_step()
                fruitless = 0 if step > reached else fruitless + is_restart
                reached, is_restart = max(step, reached), True
                reason = "a part of it was lost on another machine." if self.is_lost_elsewhere else _in_words(code)
                has_begun = _state_of(failure) not in (None, before)
                if code == WRONG_SETTING and not has_begun and not living_holder(self.folder):
                    return code
                if has_begun:
                    reason = failure.read_text(encoding="utf-8", errors="replace").strip()
                if fruitless == self.restarts:
                    rule = f"{fruitless} restarts in a row brought no checkpoint after step {reached:,}. The last one: "
                    say(f"error: {rule}{reason}", sys.stderr)
                    return 1
                warn(f"the training ended: {reason} It is started again, from step {step:,}.")
                self._sleep(PAUSE_S)
        return 128 + self.stop.number

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint that has a manifest; 0 without any."""
        found = (self.folder / "checkpoints").glob("step_*/manifest.json")
        return max((int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit()), default=0)

    def _train(self) -> int:
        """Run the launcher to its end, and wait for the processes that it leaves. Returns its exit code."""
        others, before = set(psutil.Process().children()), end_with_parent if os.name == "posix" else None
        mark, is_told, elsewhere = self._lost_mark(), False, 0.0
        try:
            process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=before)
        except OSError as error:
            raise UserError(f"{self.command[0]} cannot be started ({error.strerror}).") from None
        while (code := process.poll()) is None:
            if self.stop.number and not is_told:
                process.send_signal(signal.SIGTERM)
                is_told = True
            elsewhere = elsewhere or (time.monotonic() if self._lost_mark() != mark else 0.0)
            is_late = elsewhere and time.monotonic() > elsewhere + LOST_GRACE_S
            # A start is ended at once: the next one of another machine must not meet this one.
            if elsewhere and not is_told and (is_late or not living_holder(self.folder)):
                _signal(_descendants(others), KILL)
            time.sleep(LOOK_S)
        # One that was just starting knows of no lost launcher.
        _signal(_descendants(others, all_of=False), signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        while left := _descendants(others):
            if time.monotonic() > deadline:
                _signal(left, KILL)
            psutil.wait_procs(left, timeout=LOOK_S)
        self.is_lost_elsewhere = bool(elsewhere) or self._lost_mark() != mark
        if self.restarts and code != 0 and not (self.stop.number or self.is_lost_elsewhere):
            self._say_that_it_is_lost()
        return code

    def _lost_mark(self) -> str:
        """Return what stands for the last loss on any machine; read, since NFS asks the server only then."""
        try:
            return (self.folder / LOST_FILE).read_text()
        except (OSError, ValueError):
            return ""

    def _say_that_it_is_lost(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / LOST_FILE, secrets.token_hex(8))

    def _wait_for_the_folder(self) -> None:
        """Wait until no process, here or on another machine, trains in the folder any more; at most the limit."""
        deadline, is_said = time.monotonic() + self.limit_s, False
        drop_lost_holder(self.folder)  # which other machines may wait for
        while (holder := living_holder(self.folder, SILENT_S)) and time.monotonic() < deadline and not self.stop.number:
            if not is_said:
                say(f"{holder} trains in {self.folder}: its end is waited for ...")
                is_said = True
            time.sleep(LOOK_S)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop.number:
            time.sleep(LOOK_S)


def _state_of(file: Path) -> tuple[int, int] | None:
    try:
        return file.stat().st_mtime_ns, file.stat().st_ino
    except OSError:
        return None


def _in_words(code: int) -> str:
    if code < 0:
        return f"the launcher was ended by {signal.Signals(-code).name}."
    return f"the launcher ended with {code}, and says above why."


def _descendants(others: Collection[psutil.Process], *, all_of: bool = True) -> list[psutil.Process]:
    """Return the children of this process but for `others`, and with `all_of` theirs."""
    found = [child for child in psutil.Process().children() if child not in others]
    for child in list(found) if all_of else ():
        with contextlib.suppress(psutil.Error):
            found += child.children(recursive=True)
    return found


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
