"""A folder that one program at a time writes to."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jit_accel.base import folder_lock
from jit_accel.base.errors import UserError
from jit_accel.base.files import append_json_lines, atomic_file, atomic_folder, move, write_text
from jit_accel.base.folder_lock import HOLDER_FILE, LOCK_FILE, FolderLock, drop_lost_holder, living_holder

HOLDER = """
import sys, time
from pathlib import Path
from jit_accel.base.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is ended."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has no locks."""

    def refuse(*_):
        raise OSError(folder_lock.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refuse)


def seen_from_elsewhere(folder, **changes):
    """Make the holder one of another machine, whose locks this one does not see."""
    file = folder / HOLDER_FILE
    before = file.stat()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "another", "host": "node7"} | changes))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_process_is_refused_and_named_until_the_first_ends(holder, tmp_path):
    folder = tmp_path / "run"
    named = rf"another training writes to it: process {holder.pid} on .*last heard of \d+ s ago\. Wait for its end"
    with pytest.raises(UserError, match=named), FolderLock(folder).held():
        pass
    assert holder.poll() is None
    holder.stdin.close()
    holder.wait()
    assert not folder.exists()  # nothing came of it
    with FolderLock(folder).held():
        write_text(folder / "a.txt", "ours")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


def test_a_killed_holder_of_this_machine_is_followed_at_once(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock.time, "sleep", lambda seconds: pytest.fail("waits"))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / HOLDER_FILE).exists()
    with FolderLock(tmp_path / "run").held():
        assert json.loads((tmp_path / "run" / HOLDER_FILE).read_text())["process"] == os.getpid()


def test_the_sign_of_a_killed_holder_is_dropped_by_its_machine_alone(holder, tmp_path):
    """Others would wait for its silence."""
    folder = tmp_path / "run"
    drop_lost_holder(folder)
    assert living_holder(folder)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    before = (folder / HOLDER_FILE).read_text()
    seen_from_elsewhere(folder)
    drop_lost_holder(folder)
    assert living_holder(folder)
    (folder / HOLDER_FILE).write_text(before)
    drop_lost_holder(folder)
    assert not (folder / HOLDER_FILE).exists()
    assert living_holder(folder) is None
    with FolderLock(folder).held():
        pass


def test_a_container_that_numbers_its_processes_is_another_machine(holder, tmp_path, monkeypatch):
    """There a holder's number stands for no process, or for one that is not the holder."""
    stat = os.stat

    def elsewhere(path, **how):
        return os.stat_result([0, 1, *[0] * 8]) if path == "/proc/self/ns/pid" else stat(path, **how)

    monkeypatch.setattr(folder_lock.os, "stat", elsewhere)
    monkeypatch.setattr(folder_lock.psutil, "pid_exists", lambda number: False)
    drop_lost_holder(tmp_path / "run")
    assert living_holder(tmp_path / "run")


def test_the_same_process_holds_a_folder_once_and_again_afterwards(tmp_path):
    lock = FolderLock(tmp_path)
    with lock.held():
        with pytest.raises(UserError, match="another training writes to it"), FolderLock(tmp_path).held():
            pass
        lock.check()
    with FolderLock(tmp_path).held():
        pass
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_holder_of_another_machine_that_lives_is_refused(tmp_path, request, monkeypatch, has_locks):
    if not has_locks:
        request.getfixturevalue("without_locks")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / HOLDER_FILE).write_text(
        json.dumps({"token": "t", "machine": "another", "host": "node7", "process": 12, "since": "2026-01-01"})
    )

    def beat(seconds):
        os.utime(folder / HOLDER_FILE, (time.time() + 1, time.time() + 1))

    monkeypatch.setattr(folder_lock.time, "sleep", beat)
    with pytest.raises(UserError, match="process 12 on node7"), FolderLock(folder).held():
        pass
    assert json.loads((folder / HOLDER_FILE).read_text())["token"] == "t"


@pytest.mark.parametrize("off_s", [-7200, 7200])
def test_a_holder_whose_clock_is_off_is_known_by_its_heartbeats(tmp_path, monkeypatch, off_s):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / HOLDER_FILE).write_text(
        json.dumps({"token": "t", "machine": "another", "host": "node7", "process": 12, "since": "2026-01-01"})
    )
    slept = []

    def beat(seconds):
        slept.append(seconds)
        if is_alive and len(slept) > 3:
            os.utime(folder / HOLDER_FILE, (time.time() + off_s, time.time() + off_s))

    now = time.monotonic
    monkeypatch.setattr(folder_lock.time, "sleep", beat)
    monkeypatch.setattr(folder_lock.time, "monotonic", lambda: now() + sum(slept))
    is_alive = True
    os.utime(folder / HOLDER_FILE, (time.time() + off_s, time.time() + off_s))
    with pytest.raises(UserError, match="process 12 on node7"), FolderLock(folder).held():
        pass
    is_alive, slept[:] = False, []
    with FolderLock(folder).held():
        pass
    assert sum(slept) <= folder_lock.SILENT_S + 1


def test_a_holder_of_another_machine_that_is_silent_is_followed_and_ends_before_it_writes(
    tmp_path, without_locks, monkeypatch
):
    folder = tmp_path / "run"
    monkeypatch.setattr(folder_lock, "SILENT_S", 0.1)
    first, second = FolderLock(folder), FolderLock(folder)
    with first.held():
        write_text(folder / "theirs.txt", "first")
        seen_from_elsewhere(folder)
        monkeypatch.setattr(folder_lock, "_ours", set())  # as if the second were another process
        second._take()
        for write in (
            lambda: write_text(folder / "theirs.txt", "lost"),
            lambda: append_json_lines(folder / "rows.jsonl", [{"step": 1}]),
            lambda: move(folder / "theirs.txt", folder / "gone.txt"),
            lambda: _make(folder / "checkpoints"),
        ):
            with pytest.raises(UserError, match=f"process {os.getpid()} on .* has taken this folder over"):
                write()
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == ["theirs.txt"]
    assert (folder / "theirs.txt").read_text() == "first"
    assert json.loads((folder / HOLDER_FILE).read_text())["token"] == second.token  # the first leaves that alone
    second._release()


def test_a_holder_that_wakes_when_its_successor_has_ended_writes_nothing(tmp_path, without_locks, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(folder_lock, "SILENT_S", 0.1)
    with FolderLock(folder).held():
        write_text(folder / "theirs.txt", "first")
        seen_from_elsewhere(folder)
        monkeypatch.setattr(folder_lock, "_ours", set())
        second = FolderLock(folder)
        second._take()
        second._release()
        with pytest.raises(UserError, match=r"another training \(that has ended since.* has taken this folder over"):
            write_text(folder / "theirs.txt", "lost")
    assert (folder / "theirs.txt").read_text() == "first"


def test_a_disk_that_does_not_answer_is_not_another_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    lock = FolderLock(tmp_path / "run")
    with lock.held(), monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        patch.setattr(os, "lstat", fail)
        lock.check()


def _make(folder):
    with atomic_folder(folder) as temporary:
        temporary.mkdir()


def test_other_folders_are_written_freely(tmp_path):
    (tmp_path / "run2").mkdir()
    with FolderLock(tmp_path / "run").held():
        (tmp_path / "run" / HOLDER_FILE).write_text("{}")  # damaged: nobody's
        write_text(tmp_path / "run" / "a.txt", "a")
        with atomic_file(tmp_path / "run2" / "b.txt") as temporary:
            temporary.write_text("b")
    assert (tmp_path / "run2" / "b.txt").read_text() == "b"


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "HEARTBEAT_S", 0.01)
    with FolderLock(tmp_path).held():
        os.utime(tmp_path / HOLDER_FILE, (0, 0))
        while not (tmp_path / HOLDER_FILE).stat().st_mtime:
            time.sleep(0.01)


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"^output_dir .*file/run: cannot be written"),
        FolderLock(tmp_path / "file" / "run").held(),
    ):
        pass
    assert not (tmp_path / LOCK_FILE).exists()
