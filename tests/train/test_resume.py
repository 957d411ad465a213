"""Trainings that go on where a checkpoint cannot be trusted."""

import os
import re
import shutil

import pytest
import torch
from helpers import Group, assert_same_state, flip_a_bit, last_checkpoint, rows, train_group, train_here

from jit_accel.model.loading import load_pipeline
from jit_accel.model.tensor_files import StoredTensor
from jit_accel.train.trainer import Trainer


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(images, tmp_path, processes):
    """And ends as if nothing had happened, bit for bit; all processes take the same one."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2", "--resume", "auto")
    train_group(tmp_path, *flags, num_processes=processes)
    one_file = load_pipeline(out).transformer.state_dict()
    in_parts = load_pipeline(last_checkpoint(out)).transformer.state_dict()
    assert all(torch.equal(in_parts[name], weights) for name, weights in one_file.items())
    shutil.copytree(out, whole)
    file = max(last_checkpoint(out).glob("optimizer*.safetensors"))
    flip_a_bit(file)
    printed = train_group(tmp_path, *flags, num_processes=processes)
    assert printed.count(f"step_00000006 is damaged, and is now step_00000006.damaged: {file.name} is not") == 1
    assert "step_00000004 at step 4" in printed
    (out / "checkpoints" / "step_00000006.damaged").rename(tmp_path / "aside")
    assert_same_state(out, whole)
    assert rows(out) == rows(whole)


def _fail_to_read_on_rank_1() -> None:
    read = StoredTensor.__getitem__

    def fail(self, slices):
        if os.environ["RANK"] == "1":
            raise OSError(5, "Input/output error")
        return read(self, slices)

    StoredTensor.__getitem__ = fail


@pytest.mark.multiprocess
def test_a_checkpoint_that_one_process_cannot_read_ends_all_of_them(images, tmp_path):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--resume", "auto")
    train_group(tmp_path, *flags, num_processes=2)
    environment = {"TEST_SETUP": "test_resume:_fail_to_read_on_rank_1"}
    group = Group([*flags, "--max_steps", "9"], tmp_path / "log", 2, environment)
    assert group.wait() == [2, 2], group.output()
    assert group.output().count("model cannot be loaded (OSError: [Errno 5] Input/output error)") == 1
    assert "Traceback" not in group.output()


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_in_its_folder(images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "3")
    assert train_here(*flags) == 0
    for file in out.glob("checkpoints/*/manifest.json"):
        file.unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for resume in ("auto", str(out / "checkpoints" / "step_00000003"), "none"):
        assert train_here(*flags, "--resume", resume) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        assert ("manifest.json is missing" in printed.err) == (resume != "none")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_dry_run_passes_over_a_damaged_checkpoint_and_leaves_it(images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "3", "--resume", "auto")
    assert train_here(*flags) == 0
    flip_a_bit(last_checkpoint(out) / "model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train_here(*flags, "--dry_run") == 0
    printed = capsys.readouterr()
    assert "step_00000006 is damaged: model.safetensors" in printed.err
    assert "step_00000003 at step 3" in printed.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def losses_become_infinite_behind(step, patch):
    loss = Trainer.loss
    patch.setattr(Trainer, "loss", lambda self, batch: loss(self, batch) * (1 if self.step < step else float("inf")))


def test_a_run_that_dies_behind_a_fresh_checkpoint_goes_on_from_the_proven_one(images, tmp_path, monkeypatch, capsys):
    """The resume that fails says which one it is; the next one takes it, and ends as if nothing had happened."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--data_path", str(images), "--save_every_steps", "2", "--keep_checkpoints", "1", "--resume", "auto")
    assert train_here(*flags, "--output_dir", str(whole)) == 0
    save = Trainer.save

    class Killed(BaseException):
        pass

    def save_and_die(self):
        save(self)
        if self.step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_die)
        with pytest.raises(Killed):
            train_here(*flags, "--output_dir", str(out))
    assert last_checkpoint(out).name == "step_00000004"
    with monkeypatch.context() as patch:
        losses_become_infinite_behind(4, patch)
        assert train_here(*flags, "--output_dir", str(out)) == 2
    assert "step_00000002. Lower" in capsys.readouterr().err
    assert train_here(*flags, "--output_dir", str(out)) == 0
    printed = capsys.readouterr()
    assert re.search(r"followed \S+step_00000004.not_finite were not finite: step_00000002 is taken", printed.err)
    assert "step_00000002 at step 2" in printed.out
    assert rows(out) == rows(whole)
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "7") == 0
    assert "not_finite" not in capsys.readouterr().err


@pytest.mark.parametrize("value", [1e28, float("nan")])
def test_weights_that_were_thrown_away_by_a_step_are_not_saved(images, tmp_path, monkeypatch, capsys, value):
    """The loss and the norm of that step were finite: they are those of the weights before it."""
    out = tmp_path / "run"
    flags = ("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2", "--resume", "auto")
    step = Trainer.train_step

    def step_too_far(self):
        step(self)
        if self.step == 4:
            next(self.network.parameters()).data[0] = value

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_too_far)
        assert train_here(*flags) == 2
    printed = capsys.readouterr().err
    assert f"holds {value:.3g}".replace("+", "") in printed.replace("+", "")
    assert "the last good checkpoint is" in printed
    assert (out / "FAILED").exists()
    assert [path.name for path in (out / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert train_here(*flags) == 0
