"""kill -9 in a save, at each call that touches the disk, of real processes: a whole checkpoint is always there."""

import itertools
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import free_port, in_fresh_accelerate

from jit_accel.model.checkpointer import Checkpointer
from jit_accel.model.checkpoints import load_parts, sound_checkpoint, step_folders
from jit_accel.model.tensor_files import SummedFile
from jit_accel.train.state import NamedTensors

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
TOUCHING = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
LAST = 10**6
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


def save_and_train_on(accelerator, out: Path, step: int, keep: int = 1) -> None:
    """Save two tensors of a step's value, and change them when their copies are made."""
    weights = {"w": torch.full((50, 3), float(step)), "b": torch.full((4,), float(step))}
    parts = {"model": NamedTensors(weights), "run": SimpleNamespace(state_dict=lambda: {"n": step})}
    checkpointer = Checkpointer(accelerator, out, keep)
    checkpointer.begin(step, parts)
    checkpointer.wait_for_copies()
    for tensor in weights.values():
        tensor.fill_(-1)
    checkpointer.finish()


def die_at(moment: int, out: Path) -> itertools.count:
    """Let this process be killed at that call to touch the disk in `out`; return the counter of the calls."""
    calls, lock = itertools.count(), threading.Lock()

    def touch() -> None:
        with lock:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def look(event, args) -> None:
        if event in TOUCHING and any(str(out) in str(argument) for argument in args):
            touch()

    write, sync = SummedFile.write, os.fsync

    def write_in_two(self, data) -> None:
        data = memoryview(data).cast("B")
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            write(self, part)
            self.file.flush()
            touch()

    def sync_noted(descriptor) -> None:
        touch()
        sync(descriptor)

    SummedFile.write, os.fsync = write_in_two, sync_noted
    sys.addaudithook(look)
    return calls


def saving_process(out: Path, rank: int, ranks: int, port: int, moment: int) -> int:
    """Fork a process that saves step 2, and is killed there unless it comes to the end; return its number."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    try:
        names = ("RANK", "LOCAL_RANK") if ranks > 1 else ()
        environment = dict.fromkeys(names, str(rank)) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        with in_fresh_accelerate(**environment):
            accelerator = Accelerator()
            calls = die_at(moment, out)
            save_and_train_on(accelerator, out, 2)
            os._exit(min(next(calls), 255))
    finally:
        os._exit(254)


def killed_save(out: Path, ranks: int = 1, killed: int = 0, moment: int = LAST) -> int:
    """Save with so many processes, kill one of them, then the others; return how often the killed one touched the disk.

    0 where it was killed.
    """
    port = free_port()
    processes = [saving_process(out, r, ranks, port, moment if r == killed else LAST) for r in range(ranks)]
    status = os.waitpid(processes[killed], 0)[1]
    for number, process in enumerate(processes):
        if number != killed:
            if os.WIFSIGNALED(status):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) < 250
    return 0 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def step_found(out: Path) -> int:
    """Return the step that `--resume auto` finds, of which all values must be."""
    target = {"w": torch.zeros(50, 3), "b": torch.zeros(4)}
    path = sound_checkpoint(ALONE, out, "auto")
    step = load_parts(path, {"model": NamedTensors(target)})
    assert all((tensor == step).all() for tensor in target.values())
    return step


@pytest.mark.parametrize(("ranks", "killed", "every"), [(1, 0, 1), (2, 0, 4), (2, 1, 1)])
def test_whenever_a_process_is_killed_in_a_save_the_old_or_the_new_checkpoint_is_whole(tmp_path, ranks, killed, every):
    """And the next save leaves nothing behind of what was killed."""
    out, good = tmp_path / "run", tmp_path / "good"
    save_and_train_on(ALONE, good, 1)
    shutil.copytree(good, out)
    calls = killed_save(out, ranks, killed)
    assert step_found(out) == 2
    assert calls >= (25 if killed == 0 else 6)
    found = []
    for moment in range(0, calls, every):
        shutil.rmtree(out)
        shutil.copytree(good, out)
        assert killed_save(out, ranks, killed, moment) == 0
        found.append(step_found(out))
        if moment % 5 == 0:
            save_and_train_on(ALONE, out, 3)
            assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000003"]
    assert found == sorted(found)  # once it is there it stays there
    assert set(found) == ({1, 2} if killed == 0 else {1})
    assert len(step_folders(out / "checkpoints")) >= 1
