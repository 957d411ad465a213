import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import seal_as_before

from jit_accel.base.errors import UserError
from jit_accel.config.groups import OptimConfig
from jit_accel.model.checkpointer import Checkpointer
from jit_accel.model.checkpoints import (
    STATE,
    complete_checkpoints,
    find_checkpoint,
    is_complete,
    load_parts,
    read_run,
)
from jit_accel.train.optimizers import build_optimizers, set_lr
from jit_accel.train.state import FIXED_SETTINGS, NamedTensors, OptimizerState, RunFacts

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(ALONE, tmp_path, keep=2)


def find(checkpointer, resume):
    return find_checkpoint(checkpointer.folder.parent, resume)


class Values:
    """A part that is no tensors."""

    def __init__(self, **values):
        self.values = values

    def state_dict(self):
        return self.values

    def load_state_dict(self, state):
        self.values = state


def save(checkpointer, step):
    return checkpointer.save(step, {"model": NamedTensors({"w": torch.full((3,), float(step))}), "run": Values(n=step)})


def loaded(path):
    """The weight and the step of a checkpoint."""
    target = torch.zeros(3)
    step = load_parts(path, {"model": NamedTensors({"w": target})})
    return target, step


def test_what_was_saved_comes_back(checkpointer):
    path = save(checkpointer, 7)
    target, step = loaded(path)
    assert torch.equal(target, torch.full((3,), 7.0))
    assert step == 7
    run = Values()
    load_parts(path, {"run": run})
    assert run.values == read_run(path) == {"n": 7}


def test_a_part_that_one_of_two_runs_does_not_have_is_passed_over(checkpointer):
    path = checkpointer.save(1, {"scaler": None, "feed": Values(a=1), "run": Values()})
    scaler = Values(scale=2.0)
    assert load_parts(path, {"scaler": scaler, "feed": None}) == 1
    assert scaler.values == {"scale": 2.0}


def test_parts_without_names_are_read_as_they_were_written_before(checkpointer):
    """The first format's state.json."""
    path = save(checkpointer, 5)
    old = {"format": 1, "step": 5, "loaders": [3], "bad_images": [[]], "world_size": 1, "global_batch_size": 4}
    (path / STATE).write_text(json.dumps({**old, "scaler": None, "settings": {"seed": 1}, "fingerprint": "a"}))
    seal_as_before(path)
    feed, monitor = Values(), Values()
    assert load_parts(path, {"feed": feed, "monitor": monitor, "scaler": Values()}) == 5
    assert feed.values == {"loaders": [3], "bad_images": [[]]}
    assert monitor.values == {"epochs": {"images_seen": 20}, "health": None}
    assert read_run(path) == {"world_size": 1, "global_batch_size": 4, "settings": {"seed": 1}, "fingerprint": "a"}


def test_a_newer_format_is_refused(checkpointer):
    path = save(checkpointer, 5)
    (path / STATE).write_text(json.dumps({"format": 99}))
    seal_as_before(path)
    with pytest.raises(UserError, match=r"was written by a newer jit_accel"):
        read_run(path)


def test_the_newest_stay(checkpointer):
    for step in (1, 2, 10, 9_999_999):
        save(checkpointer, step)
    assert [p.name for p in complete_checkpoints(checkpointer.folder)] == ["step_00000010", "step_09999999"]
    assert find(checkpointer, "auto").name == "step_09999999"
    assert sorted(p.name for p in checkpointer.folder.iterdir()) == ["step_00000010", "step_09999999"]


@pytest.mark.parametrize("damage", ["no manifest", "cut short", "file gone"])
def test_a_damaged_folder_is_no_checkpoint(checkpointer, damage):
    good, bad = save(checkpointer, 1), save(checkpointer, 2)
    if damage == "no manifest":
        (bad / "manifest.json").unlink()
    elif damage == "cut short":
        os.truncate(bad / "model.safetensors", 20)
    else:
        (bad / "state.json").unlink()
    assert not is_complete(bad)
    assert find(checkpointer, "auto") == good
    with pytest.raises(UserError, match=r"resume .*holds no complete checkpoint"):
        find(checkpointer, str(bad))


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(checkpointer, monkeypatch):
    """Stop the save after each single call that touches the disk."""
    save(checkpointer, 1)
    calls = [("os", "rename"), ("os", "fsync"), ("shutil", "rmtree")]
    modules = {"os": os, "shutil": shutil}

    class Killed(BaseException):
        pass

    for moment in range(40):
        countdown = iter(range(moment, -1, -1))
        with monkeypatch.context() as patch:
            for module, name in calls:
                real = getattr(modules[module], name)

                def dies_in_time(*args, real=real, countdown=countdown, **kwargs):
                    if next(countdown, None) is None:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(modules[module], name, dies_in_time)
            try:
                save(checkpointer, 2 + moment)
                finished = True
            except Killed:
                finished = False
        found = find(checkpointer, "auto")
        assert found is not None
        target, step = loaded(found)
        assert target[0] == step
    assert finished  # the last moments lie behind the end of the save
    assert find(checkpointer, "auto").name == "step_00000041"
    save(checkpointer, 50)
    assert [p.name for p in sorted(checkpointer.folder.iterdir())] == ["step_00000041", "step_00000050"]


def test_a_whole_checkpoint_is_never_touched_by_saving_its_step_again(checkpointer):
    path = save(checkpointer, 3)
    before = (path / "model.safetensors").stat().st_ino
    assert save(checkpointer, 3) == path
    assert (path / "model.safetensors").stat().st_ino == before
    assert [p.name for p in checkpointer.folder.iterdir()] == ["step_00000003"]


def test_going_on_from_an_older_checkpoint_keeps_what_is_written_from_there(checkpointer):
    for step in (100, 200):
        save(checkpointer, step)
    assert [p.name for p in checkpointer.set_aside_after(100)] == ["step_00000200"]
    save(checkpointer, 150)
    assert find(checkpointer, "auto").name == "step_00000150"
    kept = sorted(p.name for p in checkpointer.folder.iterdir())
    assert kept == ["abandoned_step_00000200", "step_00000100", "step_00000150"]


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_the_last_checkpoint(checkpointer, monkeypatch):
    good = save(checkpointer, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jit_accel.model.checkpointer.write_tensors", full)
        with pytest.raises(UserError, match=r"output_dir .*step 2 cannot be written .*No space left.*make room"):
            save(checkpointer, 2)
    assert find(checkpointer, "auto") == good
    assert save(checkpointer, 2).name == "step_00000002"
    assert sorted(p.name for p in checkpointer.folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_resume_means_what_it_says(checkpointer, tmp_path):
    assert find(checkpointer, "none") is None
    assert find(checkpointer, "auto") is None
    with pytest.raises(UserError, match=r"resume \S+: holds no complete checkpoint.*or auto.*or none"):
        find(checkpointer, str(tmp_path))
    path = save(checkpointer, 5)
    assert find(checkpointer, str(path)) == find(checkpointer, str(tmp_path)) == find(checkpointer, "auto") == path
    assert find(checkpointer, "none") is None


def test_no_pickle_is_written(checkpointer):
    path = save(checkpointer, 5)
    for file in path.iterdir():
        assert file.suffix in (".json", ".safetensors")
        if file.suffix == ".json":
            json.loads(file.read_text())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_optimizer_steps_like_the_one_that_was_saved(tmp_path, name):
    def build():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"attn": torch.nn.Linear(4, 6)})])}
        )
        optimizers = build_optimizers(model, OptimConfig(optimizer=name, weight_decay=0.1))
        set_lr(optimizers, 0.1)
        return model, optimizers

    def step(model, optimizers, seed):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.step()

    model, optimizers = build()
    step(model, optimizers, 1)
    step(model, optimizers, 2)
    checkpointer = Checkpointer(ALONE, tmp_path, keep=1)

    def parts(model, optimizers):
        return {"model": NamedTensors(model.state_dict()), "optimizer": OptimizerState(model, optimizers)}

    path = checkpointer.save(2, parts(model, optimizers))
    other, restored = build()
    load_parts(path, parts(other, restored))
    step(model, optimizers, 3)
    step(other, restored, 3)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_another_run_is_refused_with_every_difference_named(tmp_path):
    settings = dict.fromkeys(FIXED_SETTINGS, 1)
    saved = {"settings": settings, "fingerprint": "a", "data": "cats (10 images, 2 classes)"}

    def refuse(settings, **data):
        RunFacts({"settings": settings, **data}, is_main=True).refuse_other(tmp_path, saved)

    refuse({**settings, "batch_size": 5}, data="cats", fingerprint="a")
    with pytest.raises(UserError, match=r"--img_size is 2, the checkpoint has 1; --data_path is dogs, .* cats \(10"):
        refuse({**settings, "img_size": 2}, data="dogs", fingerprint="b")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e28, -1e28])
@pytest.mark.parametrize("part", ["model", "ema_auto", "optimizer"])
def test_values_that_no_training_can_go_on_with_are_not_saved(checkpointer, part, value):
    good = save(checkpointer, 1)
    parts = {name: NamedTensors({"w": torch.ones(9, 9), "n": torch.ones(2)}) for name in ("model", "ema_auto")}
    parts["optimizer"] = NamedTensors({"w|exp_avg": torch.full((9, 9), 1e17), "w|n": torch.ones((), dtype=torch.int64)})
    parts[part].tensors[next(iter(parts[part].tensors))][4, 5] = value
    with pytest.raises(UserError, match=r"w\S* holds \S+ after step 2: .*overwritten.*step_0+1\. Lower"):
        checkpointer.save(2, parts)
    assert find(checkpointer, "auto") == good
    parts[part].tensors[next(iter(parts[part].tensors))][4, 5] = 0.0
    assert checkpointer.save(3, parts) == find(checkpointer, "auto")


def kept(checkpointer):
    return [int(path.name.removeprefix("step_")) for path in complete_checkpoints(checkpointer.folder)]


def test_the_newest_that_finite_steps_followed_stays_whatever_is_newer(checkpointer):
    save(checkpointer, 1)
    checkpointer.prove(1)  # its own step says nothing of it
    save(checkpointer, 2)
    checkpointer.prove(3)
    save(checkpointer, 4)
    save(checkpointer, 6)
    save(checkpointer, 8)
    assert kept(checkpointer) == [2, 6, 8]
    checkpointer.prove(9)
    save(checkpointer, 10)
    save(checkpointer, 12)
    save(checkpointer, 14)
    assert kept(checkpointer) == [8, 12, 14]


def test_a_checkpoint_that_a_resume_cannot_go_on_from_gives_way_to_a_proven_one(checkpointer):
    def left(resumed):
        checkpointer.distrust(resumed)
        return kept(checkpointer)

    save(checkpointer, 2)
    assert left(2) == [2]  # there is no better one
    checkpointer.prove(3)
    assert left(2) == [2]
    save(checkpointer, 4)
    assert left(0) == [2, 4]  # nobody has tried it
    assert left(4) == [2]
    assert str(checkpointer.diverged("w is inf")).startswith("w is inf: training stopped")
    assert "the last good checkpoint is" in str(checkpointer.diverged("w is inf"))
    names = sorted(path.name for path in checkpointer.folder.iterdir())
    assert names == ["step_00000002", "step_00000004.not_finite"]
    assert save(checkpointer, 4).is_dir()
