"""Checkpoints that nobody waits for, in real trainings."""

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import OLD_FOLDERS, Group, rows, train_group, train_here
from safetensors.torch import load_file

from jit_accel.model import checkpointer as saving
from jit_accel.model.snapshots import Snapshot
from jit_accel.supervise import main as supervise
from jit_accel.train import forecast
from jit_accel.train.averages import Ema
from jit_accel.train.trainer import Trainer


def contents(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of all checkpoints."""
    return {
        f"{file.parent.name}/{file.name}/{name}": tensor
        for file in sorted(out.glob("checkpoints/*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def flags(images):
    return (
        *("--data_path", str(images), "--save_every_steps", "1", "--keep_checkpoints", "9", "--holdout", "0.2"),
        *("--sample_every_steps", "2", "--val_every_steps", "1", "--optimizer", "muon", "--ema_decays", "0.5", "auto"),
    )


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """What a run's checkpoints hold where each is on the disk before the next step."""
    out = tmp_path_factory.mktemp("plain")
    begin = saving.Checkpointer.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Checkpointer, "begin", lambda self, *args: (begin(self, *args), self.finish()))
        assert train_here(*flags, "--output_dir", str(out)) == 0
    return out


def assert_same_contents(out: Path, other: Path) -> None:
    one, two = contents(out), contents(other)
    assert one.keys() == two.keys()
    assert len({name.split("/")[0] for name in one}) == 6
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert rows(out) == rows(other)


class LateSnapshot(Snapshot):
    """Makes its copies when it is waited for."""

    made: ClassVar[list] = []

    def __init__(self, parts):
        super().__init__(parts)
        self.is_asked_for = threading.Event()
        self.made.append(self)

    def take(self):
        assert self.is_asked_for.wait(60)
        return super().take()

    def wait(self):
        self.is_asked_for.set()
        super().wait()


def _copy_late(change=setattr) -> None:
    """Make copies when they are waited for, or when weights are exchanged without a wait."""
    applied = Ema.applied

    @contextlib.contextmanager
    def applied_and_copied(self):
        with applied(self):
            for snapshot in LateSnapshot.made:
                snapshot.is_asked_for.set()
                snapshot.is_under_way.wait(60)
            yield

    change(saving, "Snapshot", LateSnapshot)
    change(Ema, "applied", applied_and_copied)


def _write_at_once() -> None:
    begin = saving.Checkpointer.begin
    saving.Checkpointer.begin = lambda self, *args: (begin(self, *args), self.finish())


def test_copies_that_are_made_at_the_last_moment_are_those_of_their_step(flags, plain, tmp_path, monkeypatch):
    """Steps, samples and validation wait for them before they change weights or exchange averages."""
    _copy_late(monkeypatch.setattr)
    assert train_here(*flags, "--output_dir", str(tmp_path)) == 0
    assert_same_contents(tmp_path, plain)


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["adamw", "muon", "adapter"])
def test_late_copies_of_shards_are_those_of_their_step_too(images, tmp_path, how):
    """FSDP2, with accumulation and samples; an adapter by DDP."""
    flags = ["--data_path", str(images), "--save_every_steps", "1", "--keep_checkpoints", "9", "--batch_size", "1"]
    flags += ["--gradient_accumulation_steps", "2", "--sample_every_steps", "2", "--ema_decays", "0.5", "auto"]
    environment = {"TEST_FSDP2_PRECISION": "no"}
    if how == "adapter":
        environment, base, flags[1] = {}, OLD_FOLDERS / "run" / "pipeline", str(OLD_FOLDERS / "images")
        flags += ["--init_from", str(base), "--lora_rank", "2", "--model", "JiT-XS/2", "--img_size", "8"]
    else:
        flags += ["--optimizer", how]
    for setup in ("_copy_late", "_write_at_once"):
        flags_of_one = [*flags, "--output_dir", str(tmp_path / setup)]
        train_group(
            tmp_path, *flags_of_one, num_processes=2, environment=environment | {"TEST_SETUP": f"test_saving:{setup}"}
        )
    assert_same_contents(tmp_path / "_copy_late", tmp_path / "_write_at_once")


def test_the_training_goes_on_while_a_checkpoint_is_written(flags, plain, tmp_path, monkeypatch, capsys):
    """Each is written only when a later step has been done; the last one is waited for."""
    done, write, step = threading.Condition(), saving.write_tensors, Trainer.train_step
    reached = [0]

    def step_noted(self):
        step(self)
        with done:
            reached[0] = self.step
            done.notify_all()

    def write_late(path, pieces):
        of = int(path.parent.name.removeprefix("tmp_step_"))
        with done:
            assert done.wait_for(lambda: reached[0] > of or of == 6, timeout=60)
        return write(path, pieces)

    monkeypatch.setattr(Trainer, "train_step", step_noted)
    monkeypatch.setattr(saving, "write_tensors", write_late)
    assert train_here(*flags, "--output_dir", str(tmp_path)) == 0
    assert_same_contents(tmp_path, plain)
    assert capsys.readouterr().out.count("Saved ") == 6


def _fill_the_disk_of_rank_1() -> None:
    write = saving.write_tensors

    def fails(path, pieces):
        if os.environ.get("RANK", "1") == "1" and path.parent.name == "tmp_step_00000004":
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    saving.write_tensors = fails


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_is_full_while_the_training_goes_on_ends_it_with_the_last_good_one(images, tmp_path, processes):
    """Also where it is that of another process than the main one."""
    out = tmp_path / "run"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2", "--max_steps", "90"]
    group = Group(flags, tmp_path / "log", processes, {"TEST_SETUP": "test_saving:_fill_the_disk_of_rank_1"})
    assert group.wait() == [2] * processes, group.output()
    assert f"{processes} x cpu" in group.output()
    assert group.output().count("the checkpoint of step 4 cannot be written ([Errno 28] No space left on device") == 1
    assert f"the last good checkpoint is {out / 'checkpoints' / 'step_00000002'}" in group.output()
    assert "Traceback" not in group.output()
    assert "step 4 cannot be written" in (out / "FAILED").read_text()
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_a_launcher_that_kills_sooner_than_a_stop_takes_is_warned_of(images, tmp_path, monkeypatch):
    """Once, after the first checkpoint; and by what that took at the start of a resume."""
    out, said = tmp_path / "run", []
    monkeypatch.setattr(forecast, "warn", said.append)
    monkeypatch.setattr(saving, "say", said.append)

    def run(max_steps: int, **environment: str) -> list[str]:
        said.clear()
        flags = ["--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2", "--resume", "auto"]
        environment = {"TORCHELASTIC_RUN_ID": "none"} | environment
        assert train_here(*flags, "--max_steps", str(max_steps), **environment) == 0
        return ["warned" if "PET_SHUTDOWN_TIMEOUT=" in text else "saved" for text in said if "step" in text]

    assert run(4, PET_SHUTDOWN_TIMEOUT="3600") == ["saved"] * 2
    assert run(6, PET_SHUTDOWN_TIMEOUT="0") == ["warned", "saved"]  # by the time in the checkpoint's manifest
    assert "kills 0 s after SIGTERM" in said[0]
    shutil.rmtree(out)
    sync = saving.sync
    monkeypatch.setattr(saving, "sync", lambda path: (time.sleep(0.2), sync(path)))  # steps pass before it is saved
    found = run(6, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="0")
    assert (found.count("warned"), found[0]) == (1, "saved")
    monkeypatch.setattr(forecast, "grace_s", lambda: None)  # nobody kills it
    assert run(8) == ["saved"]


def test_a_launchers_time_that_is_no_number_is_refused(images, tmp_path, capsys, monkeypatch):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    assert train_here(*flags, TORCHELASTIC_RUN_ID="none", PET_SHUTDOWN_TIMEOUT="soon") == 2
    assert "PET_SHUTDOWN_TIMEOUT soon: must be a whole number of seconds" in capsys.readouterr().err
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "1.5")
    assert supervise([sys.executable, "-m", "jit_accel.train", *flags]) == 2
    assert "PET_SHUTDOWN_TIMEOUT 1.5: must be a whole number of seconds" in capsys.readouterr().err
