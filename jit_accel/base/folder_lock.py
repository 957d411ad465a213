"""A folder that one program at a time writes to, on this machine and on others that share its file system."""

import contextlib
import errno
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import psutil

from jit_accel.base import files
from jit_accel.base.console import say
from jit_accel.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the heartbeat alone
    fcntl = None

LOCK_FILE, HOLDER_FILE = ".lock", ".holder.json"
HEARTBEAT_S = 5
SILENT_S = 30  # a holder on another machine that shows no heartbeat for so long is gone
SEEN_WITHIN_S = 30
TOKEN_VARIABLE = "JIT_ACCEL_HOLDER"
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ours: set[str] = set()  # tokens that this process holds


class FolderLock:
    """The right to write into a folder, with which it is made; it ends with its holder, however that ends.

    The system's lock on `.lock` (fcntl, also over NFS) goes with its process. `.holder.json` says who holds the folder,
    and is touched every `HEARTBEAT_S` seconds: it counts where the file system has no locks, or keeps them from other
    machines. Whoever lost the folder, since it was silent for too long, finds another's token there before it writes.
    """

    def __init__(self, folder: Path, about: str = "output_dir"):
        self.folder, self.about, self.token = folder, about, secrets.token_hex(8)
        self.on_write: Callable[[], None] = lambda: None  # called as something is about to be written
        self._descriptor: int | None = None
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder during the block. Raises `UserError` where another has it, naming it, or it is not writable.

        In the block every replacing, moving and appending of `base.files` in the folder looks first whether the folder
        is still ours, and raises `UserError` if not.
        """
        with files.disk_errors(self.about, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
        beat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        try:
            beat.start()
            with files.guarded(self.folder, self.check):
                yield
        finally:
            self._release()
            if beat.is_alive():
                beat.join(1)  # longer only where the file system hangs

    @contextlib.contextmanager
    def shared(self, token: str) -> Iterator[None]:
        """Write in the block on behalf of the process that holds the folder by this token, maybe of another machine.

        As in `held` what writes looks first whether the folder is still that one's. Errors as of `look_for`.
        """
        self.look_for(token)
        self.token = token
        with files.guarded(self.folder, self.check):
            yield

    def check(self) -> None:
        """Raise `UserError`, on this process alone, where another has taken the folder over."""
        self.on_write()
        holder = self._holder()
        if holder["token"] != self.token if holder else _is_missing(self.folder / HOLDER_FILE):
            who = f"another training (that has ended since, or someone who removed {HOLDER_FILE})"
            error = UserError(
                f"{_in_words(holder) if holder else who} has taken this folder over, since nothing was heard of this "
                f"training for more than {SILENT_S} s. It ends here, and leaves the folder as it is.",
                about=self.about,
                value=self.folder,
            )
            error.everywhere = False
            raise error

    def look_for(self, token: str) -> None:
        """Make sure that this is the folder in which another process took the lock of this token.

        Raises `UserError`, on a machine that does not share it. A network's file system may show new files late.
        """
        deadline = time.monotonic() + SEEN_WITHIN_S
        while (holder := self._holder()) is None or holder["token"] != token:
            if time.monotonic() > deadline:
                raise UserError(
                    f"is another folder on {socket.gethostname()} than on the machine of the main process, so that no "
                    "checkpoint could be loaded there: give a folder on a file system that all machines share.",
                    about=self.about,
                    value=self.folder,
                )
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                os.listdir(self.folder)  # which NFS asks the server for

    def _take(self) -> None:
        holder = self._holder()
        if holder and holder["token"] in _ours:  # looked at first: closing a locked file twice would unlock it
            raise self._refusal(holder)
        try:
            is_locked = self._lock()
            holder = self._holder()
            if holder and not (is_locked and holder["machine"] == _machine()):
                self._outwait(holder)
            self._write_holder()
        except BaseException:
            self._unlock()
            raise
        _ours.add(self.token)

    def _lock(self) -> bool:
        """Lock the file. Returns False where the file system has no locks; `UserError` where another process has it."""
        try:
            self._descriptor = locked(self.folder / LOCK_FILE)
        except BlockingIOError:
            raise self._refusal(self._holder()) from None
        return self._descriptor is not None

    def _outwait(self, holder: dict) -> None:
        """Wait until a holder that may be gone has been silent for long enough. `UserError`: it is alive."""
        seen, began, is_said = self._last_beat(), time.monotonic(), False
        # Clocks may differ, also by hours: some heartbeats must be missed here, whatever they say.
        silent_s = max(0.0, min(self._silent_s(), SILENT_S - 3 * HEARTBEAT_S))
        while (left_s := SILENT_S - silent_s - (time.monotonic() - began)) > 0:
            if not is_said:
                say(f"{self.folder} was held by {_in_words(holder)}: waits {left_s:.0f} s for a sign of it ...")
                is_said = True
            time.sleep(min(1.0, left_s))
            if (last := self._last_beat()) != seen:
                if last:
                    raise self._refusal(self._holder() or holder)
                return

    def _silent_s(self) -> float:
        """Return for how long the holder has shown no heartbeat, by the clock of the file system."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".") as file:
            return os.stat(file.name).st_mtime - self._last_beat()

    def _last_beat(self) -> float:
        try:
            return (self.folder / HOLDER_FILE).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _refusal(self, holder: dict | None) -> UserError:
        who = (
            f"{_in_words(holder)}, last heard of {max(0.0, time.time() - self._last_beat()):.0f} s ago"
            if holder
            else "one"
        )
        return UserError(
            f"another training writes to it: {who}. Wait for its end, stop it, or give another folder.",
            about=self.about,
            value=self.folder,
        )

    def _holder(self) -> dict | None:
        try:
            holder = json.loads((self.folder / HOLDER_FILE).read_text(encoding="utf-8"))
            return holder if {"token", "machine", "host", "process", "since"} <= holder.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _write_holder(self) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = {"token": self.token, "machine": _machine(), "host": socket.gethostname()}
        files.write_json(self.folder / HOLDER_FILE, holder | {"process": os.getpid(), "since": now})

    def _beat(self) -> None:
        while not self._is_over.wait(HEARTBEAT_S):
            holder = self._holder()
            with contextlib.suppress(OSError):
                if holder and holder["token"] == self.token:
                    os.utime(self.folder / HOLDER_FILE)

    def _release(self) -> None:
        self._is_over.set()
        _ours.discard(self.token)
        holder = self._holder()
        with contextlib.suppress(OSError):
            if holder and holder["token"] == self.token:
                for name in (HOLDER_FILE, LOCK_FILE):
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()  # where nothing came of it
        self._unlock()

    def _unlock(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def on_behalf_of_holder(folder: Path) -> dict[str, str]:
    """Return the environment of a program that writes into a folder for whoever holds it: see `held_by_parent`."""
    holder = FolderLock(folder)._holder()
    return {**os.environ, TOKEN_VARIABLE: holder["token"]} if holder else dict(os.environ)


@contextlib.contextmanager
def held_by_parent(folder: Path) -> Iterator[None]:
    """Write into a folder in the block only as long as it is still that of the process that started this one."""
    lock = FolderLock(folder)
    lock.token = os.environ.get(TOKEN_VARIABLE, "")
    with files.guarded(folder, lock.check) if lock.token else contextlib.nullcontext():
        yield


def locked(path: Path) -> int | None:
    """Lock a file, which is made, and return its descriptor; None where the file system has no locks.

    The lock ends with this process, or as the descriptor is closed; whoever removes the file does so before. Raises
    `BlockingIOError` where another process has it, and `OSError` where the file cannot be made.
    """
    while fcntl:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the processes that decode
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NOT_SUPPORTED:
                return None
            raise BlockingIOError from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its last holder has just removed it
    return None


def living_holder(folder: Path, silent_s: float = SILENT_S) -> str | None:
    """Return in words who holds a folder, None where nobody does, or its holder is gone, or silent for so long."""
    lock = FolderLock(folder)
    if (holder := lock._holder()) is None:
        return None
    try:
        is_here = holder["machine"] == _machine()
        lives = psutil.pid_exists(holder["process"]) if is_here else lock._silent_s() < silent_s
    except OSError:  # whoever starts there says why
        return None
    return _in_words(holder) if lives else None


def drop_lost_holder(folder: Path) -> None:
    """Remove the sign of a holder that was a process of this machine and is gone; else others wait for its silence."""
    lock = FolderLock(folder)
    holder = lock._holder()
    if holder and holder["machine"] == _machine() and not psutil.pid_exists(holder["process"]):
        with contextlib.suppress(OSError, UserError):
            lock._lock()  # nobody takes the folder meanwhile
            if lock._holder() == holder:
                (folder / HOLDER_FILE).unlink(missing_ok=True)
        lock._unlock()


def _machine() -> str:
    """Return what this machine is known by until it starts anew; a container that numbers its processes is another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _is_missing(file: Path) -> bool:
    """Return True where a file is not there; not where its disk does not answer, as whatever writes there will say."""
    try:
        os.lstat(file)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _in_words(holder: dict) -> str:
    return f"process {holder['process']} on {holder['host']} (since {holder['since']})"
