"""Trainings that go on where a checkpoint cannot be trusted."""

import shutil

import pytest
from helpers import assert_same_state, flip_a_bit, last_checkpoint, rows, train_group, train_here


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(images, tmp_path, processes):
    """And ends as if nothing had happened, bit for bit; all processes take the same one."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2", "--resume", "auto")
    train_group(tmp_path, *flags, num_processes=processes)
    shutil.copytree(out, whole)
    flip_a_bit(last_checkpoint(out) / "optimizer.safetensors")
    printed = train_group(tmp_path, *flags, num_processes=processes)
    assert printed.count("step_00000006 is damaged, and is now step_00000006.damaged: optimizer.safetensors") == 1
    assert "step_00000004 at step 4" in printed
    (out / "checkpoints" / "step_00000006.damaged").rename(tmp_path / "aside")
    assert_same_state(out, whole)
    assert rows(out) == rows(whole)


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
