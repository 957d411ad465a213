"""A watch over the processes of a run: it names the one that failed, is gone or lags, and ends what waits for it."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import DistError, TCPStore

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError, message_of
from jit_accel.base.files import write_text

BEAT_S = 2.0
STORE_TIMEOUT_S = 10
STACKS_FILE = "stacks.txt"
REQUEST_FILE = "STACKS"  # whose presence in the run's folder asks for the stacks of all processes
MAIN_IS_GONE = -2  # so that the others say why the run ends
_COMPILERS = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py", "torch/_inductor/async_compile.py")
_OF_CONNECTIONS = ("Connection", "gloo", "NCCL", "nccl", "Socket", "timed out", "Timed out", "Broken pipe")


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a process, as the main one knows it, and when that, and its progress, were new."""

    text: str = ""
    heard: float = 0.0
    progress: int = -1
    moved: float = 0.0
    place: str = "has not begun"
    may_last: bool = True
    host: str = ""


class Watchdog:
    """Signs of life of all processes, in a store of their own that the main process keeps; a thread of each looks.

    In its `with` block each process says by `at` where it is. Where none goes on for `limit_s` seconds (0: no limit)
    the main process names the one that is silent or behind, leaves the reason by `leave` and the stacks of all in
    `output_dir`, and all end with exit code 1. What a process raises reaches the others, which raise that instead of a
    broken connection. Blocks may be nested: the inner one ends the watch.
    """

    def __init__(self, accelerator, limit_s: float):
        self.rank, self.count, self.is_main = (
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.is_main_process,
        )
        self.limit_s, self.output_dir = limit_s, None  # until the run has its folder
        self.leave: Callable[[str], None] = lambda reason: None
        self.progress, self.place, self.may_last, self.store = 0, "starts", True, None
        self.signs: list[Sign] = []  # which the main process alone sees
        self._lock, self._is_over, self._thread = threading.Lock(), threading.Event(), None
        self._is_asked = threading.Event()  # for stacks
        if self.count == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        how = {"world_size": None, "timeout": timedelta(seconds=STORE_TIMEOUT_S), "wait_for_workers": False}
        if self.is_main:
            self.store = TCPStore(host, 0, is_master=True, **how)
            for rank in range(self.count):
                self.store.set(f"sign/{rank}", "")
        (port,) = broadcast_object_list([self.store.port if self.store else None])
        self.hosts = gather_object([socket.gethostname()])
        self.store = self.store or TCPStore(host, port, is_master=False, **how)

    def at(self, place: str, may_last: bool = False) -> None:
        """Say what this process does next, which is progress; time alone is no sign of trouble where it `may_last`."""
        self.place, self.may_last = place, may_last
        self.go_on()

    def go_on(self) -> None:
        """Say that this process goes on with what it does."""
        self.progress += 1

    def __enter__(self) -> "Watchdog":
        if self.store and not self._thread:
            now = time.monotonic()
            self.signs = [Sign(heard=now, moved=now, host=host) for host in self.hosts] if self.is_main else []
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            if self.is_main:
                threading.Thread(target=self._look_for_requests, name="requests", daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback_) -> None:
        """Raise the reason of another process in place of the `error` that it led to here."""
        if self._is_over.is_set():
            return
        try:
            cause = self._cause_of(error) if self._thread and isinstance(error, Exception) else None
        finally:
            self._is_over.set()
        if cause:
            raise cause from error

    def _cause_of(self, error: Exception) -> UserError | None:
        """Return the error of another process, if that came first; else let the others know of this one."""
        if getattr(error, "everywhere", False):
            return None
        is_of_connection = any(word in str(error) for word in _OF_CONNECTIONS)
        try:
            if is_of_connection:  # which the main process alone can say the reason of
                with self._lock:
                    self.store.set("cut_off", self._name())
            first = self._other_failure(wait_s=10 * BEAT_S if is_of_connection else 0)
            if not first:
                mine = {"rank": self.rank, "reason": f"{self._name()} failed: {message_of(error)}"}
                with self._lock:
                    first = json.loads(self.store.compare_set("failure", "", json.dumps(mine)))
                if self.is_main and first["rank"] == self.rank:
                    self.leave(message_of(error))
            if self.is_main:
                time.sleep(BEAT_S)  # the others read it, as long as there is a store
        except (DistError, RuntimeError):
            if not is_of_connection:
                return None
            gone = f"{self._main()} is gone, or cannot be reached: it says more, where it can"
            first = {"rank": MAIN_IS_GONE, "reason": gone}
            self.leave(first["reason"])
        if first["rank"] == self.rank:
            return None
        cause = UserError(f"{first['reason']}. The run ends here; go on with --resume auto.")
        cause.everywhere = first["rank"] != MAIN_IS_GONE
        if self.is_main:
            self.leave(message_of(cause))
        return cause

    def _other_failure(self, wait_s: float) -> dict | None:
        """Return what another process has said to fail of, or the main one, that it is silent."""
        deadline = time.monotonic() + wait_s
        while not (found := self._first_failure()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _first_failure(self) -> dict | None:
        with self._lock:
            return json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None

    def _name(self) -> str:
        return f"process {self.rank} on {socket.gethostname()}"

    def _main(self) -> str:
        return f"process 0 on {self.hosts[0]}, the main one,"

    def _watch(self) -> None:
        heard, answered, beats_left, before, first = time.monotonic(), 0, 5, time.monotonic(), None
        while not self._is_over.wait(BEAT_S):
            if (now := time.monotonic()) - before > 3 * BEAT_S:  # all were stopped, or asleep, or this one alone
                heard = now
                self.signs = [replace(sign, heard=now, moved=now) for sign in self.signs]
            if compiles():
                self.go_on()
            try:
                with self._lock:
                    now = {"beat": now, "progress": self.progress, "place": self.place, "may_last": self.may_last}
                    self.store.set(f"sign/{self.rank}", json.dumps(now))
                    if self.is_main:
                        self._look_after_all()
                    answered = self._answer(answered)
                    if first is None and self.store.check(["failure"]):
                        first = json.loads(self.store.get("failure"))["reason"]
                heard = time.monotonic()
            except (DistError, RuntimeError) as error:
                silent_s = time.monotonic() - heard
                if self.limit_s and silent_s > self.limit_s:
                    self._end(f"{self._main()} has not been heard of for {silent_s:.0f} s ({message_of(error)})")
            beats_left -= first is not None
            if not beats_left:  # whoever waits for the one that failed does not get out of it
                self._end(first)
            before = time.monotonic()

    def _end(self, reason: str) -> None:
        """End this process at once, since its main thread hangs; the main one says and leaves why."""
        if self._is_over.is_set():
            return
        if self.is_main:
            _for_a_while(partial(self.leave, reason))
            say(f"error: {reason}", sys.stderr)
            time.sleep(2 * BEAT_S)  # the others read it, as long as there is a store
        elif reason.startswith(self._main()):
            _for_a_while(partial(self.leave, reason))
            say(f"error ({self._name()}): {reason}\n{stacks()}", sys.stderr)
        os._exit(1)

    def _answer(self, answered: int) -> int:
        """Give the stacks of this process where they were asked for since."""
        asked = int(self.store.get("asked")) if self.store.check(["asked"]) else 0
        if asked > answered:
            self.store.set(f"stacks/{asked}/{self.rank}", stacks())
        return asked

    def _look_after_all(self) -> None:
        now = time.monotonic()
        texts = self.store.multi_get([f"sign/{rank}" for rank in range(self.count)])
        for rank, (before, text) in enumerate(zip(self.signs, map(bytes.decode, texts))):
            if text != before.text:
                found = json.loads(text)
                moved = now if found["progress"] != before.progress else before.moved
                place = {name: found[name] for name in ("progress", "place", "may_last")}
                self.signs[rank] = replace(before, text=text, heard=now, moved=moved, **place)
        if self._is_asked.is_set():
            self._is_asked.clear()
            self._write_stacks()
            say(f"The stacks of all processes are in {self._place_of_stacks()}")
        silent = [rank for rank, sign in enumerate(self.signs) if now - sign.heard > 5 * BEAT_S]
        if silent and self.store.check(["cut_off"]):
            self.store.compare_set("failure", "", json.dumps({"rank": -1, "reason": self._in_words(silent)}))
        still_s = now - max(sign.moved for sign in self.signs)
        if not self.limit_s or still_s < self.limit_s:
            return
        behind = self._behind(now)
        problem = f"no process has gone on for {still_s:.0f} s: {self._in_words(behind)}"
        if all(self.signs[rank].may_last and now - self.signs[rank].heard < self.limit_s for rank in behind):
            warn(f"{problem}.")
            self.signs = [replace(sign, moved=now) for sign in self.signs]
            return
        reason = f"{problem}. Look at that machine and its network, then go on with --resume auto. The limit is "
        reason += f"--max_stall_minutes {self.limit_s / 60:g}; the stacks of all processes are in "
        reason += f"{self._place_of_stacks()}."
        self.store.compare_set("failure", "", json.dumps({"rank": -1, "reason": reason}))
        self._write_stacks()
        self._end(reason)

    def _look_for_requests(self) -> None:
        """Look whether somebody asks for stacks; in a thread of its own, since a file server may hang."""
        while not self._is_over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.output_dir and (request := self.output_dir / REQUEST_FILE).exists():
                    request.unlink(missing_ok=True)
                    self._is_asked.set()

    def _behind(self, now: float) -> list[int]:
        """Return the processes that are silent, else those that have got least far."""
        silent = [rank for rank, sign in enumerate(self.signs) if now - sign.heard > 5 * BEAT_S]
        least = min(sign.progress for sign in self.signs)
        return silent or [rank for rank, sign in enumerate(self.signs) if sign.progress == least]

    def _in_words(self, ranks: list[int]) -> str:
        """Return what is known of some processes; at most four are named."""
        now, parts = time.monotonic(), []
        for rank in ranks[:4]:
            sign = self.signs[rank]
            silent_s = now - sign.heard
            state = f"is silent for {silent_s:.0f} s" if silent_s > 2 * BEAT_S else sign.place
            parts.append(f"process {rank} on {sign.host} {state}")
        return ", ".join(parts) + f" and {len(ranks) - 4} more" * (len(ranks) > 4)

    def _place_of_stacks(self) -> Path | str:
        return self.output_dir / STACKS_FILE if self.output_dir else "the output"

    def _write_stacks(self) -> None:
        """Ask all processes for their stacks, and write what comes within a few seconds."""
        asked = int(self.store.add("asked", 1))
        self.store.set(f"stacks/{asked}/{self.rank}", stacks())
        keys = [f"stacks/{asked}/{rank}" for rank in range(self.count)]
        deadline = time.monotonic() + 4 * BEAT_S
        while time.monotonic() < deadline and not self.store.check(keys):
            time.sleep(0.1)
        parts = []
        for rank, key in enumerate(keys):
            text = self.store.get(key).decode() if self.store.check([key]) else "no answer\n"
            parts.append(f"=== process {rank} on {self.signs[rank].host}: {self.signs[rank].place}\n{text}")
        text = "\n".join(parts)
        if self.output_dir is None:
            say(text, sys.stderr)
        else:
            _for_a_while(partial(write_text, self.output_dir / STACKS_FILE, text))


def _for_a_while(work: Callable[[], None]) -> None:
    """Do work with files, and do not wait for it where their server hangs; what fails there is passed over."""

    def tried() -> None:
        with contextlib.suppress(OSError, UserError):
            work()

    thread = threading.Thread(target=tried, daemon=True)
    thread.start()
    thread.join(4 * BEAT_S)


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)


def compiles() -> bool:
    """Return True while torch compiles in a thread of this process, which may take long and is no lack of progress."""
    frames = list(sys._current_frames().values())
    while frames:
        frames = [frame for frame in frames if frame]
        codes = [frame.f_code for frame in frames]
        if any(code.co_filename.endswith(_COMPILERS) and code.co_name != "run" for code in codes):  # of a CUDA graph
            return True
        frames = [frame.f_back for frame in frames]
    return False
