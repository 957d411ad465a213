"""Snapshots of averages in trainings as users run them, and the averages that are made of them."""

import errno
import filecmp
import shutil

import pytest
import torch
from helpers import last_checkpoint, on_device, train_group, train_here
from safetensors.torch import load_file

from jit_accel import load
from jit_accel.base.errors import UserError
from jit_accel.convert import main as convert
from jit_accel.train import average_snapshots, build
from jit_accel.train.averages import Ema

TRUE_WIDTHS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
STEPS, EVERY = 96, 3


class Watched(Ema):
    """Averages beside which others are tracked that no checkpoint knows."""

    last = None

    def __init__(self, *args):
        super().__init__(*args)
        Watched.last = self
        self.truth = Ema(args[0], [f"width_{width}" for width in TRUE_WIDTHS])

    def update(self, step: int) -> None:
        super().update(step)
        self.truth.update(step)


def flags_of(images, out, *more) -> tuple[str, ...]:
    return ("--data_path", str(images), "--output_dir", str(out), "--average_snapshots", "2", *more)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run with many snapshots, and the averages that were tracked in it."""
    out = tmp_path_factory.mktemp("widths") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "Ema", Watched)
        flags = ("--max_steps", str(STEPS), "--average_snapshots", str(EVERY), "--learning_rate", "1e-2")
        assert train_here(*flags_of(images, out), *flags) == 0
    return out, {float(name[6:]): average for name, average in Watched.last.truth.averages.items()}


def difference(made: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    """Return the distance of two sets of weights, L2, over all of them."""
    return sum(float((made[name] - true[name]).square().sum()) for name in true) ** 0.5


@pytest.mark.parametrize("width", TRUE_WIDTHS)
def test_an_average_that_is_made_later_is_the_one_that_would_have_been_tracked(trained, width):
    out, true = trained
    made = load(out, ema_width=width).transformer.state_dict()
    length = difference(true[width], {name: torch.zeros_like(tensor) for name, tensor in true[width].items()})
    assert difference(made, true[width]) < 0.01 * length
    # and that is no matter of all averages being alike
    others = [difference(true[other], true[width]) for other in TRUE_WIDTHS if other != width]
    assert difference(made, true[width]) < 0.2 * min(others)
    named = load(out, ema=f"width_{width:g}").transformer.state_dict()
    assert all(torch.equal(named[name], made[name]) for name in made)


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_those_that_were_tracked_come_back_bit_for_bit(trained, width):
    out, true = trained
    made = load(out, ema_width=width).transformer.state_dict()
    assert all(torch.equal(made[name], true[width][name]) for name in made)
    assert sorted(path.name for path in (out / "averages").iterdir()) == sorted(
        f"step_{step:08d}-width_{tracked}.safetensors" for step in range(EVERY, STEPS, EVERY) for tracked in (0.05, 0.1)
    )


def test_snapshots_change_nothing_of_the_training(images, tmp_path):
    without, with_them = tmp_path / "without", tmp_path / "with"
    assert train_here("--data_path", str(images), "--output_dir", str(without)) == 0
    assert train_here(*flags_of(images, with_them)) == 0
    ours, theirs = last_checkpoint(without), last_checkpoint(with_them)
    for name in ("model", "ema_auto", "optimizer"):
        assert filecmp.cmp(ours / f"{name}.safetensors", theirs / f"{name}.safetensors", shallow=False)
    assert not (without / "averages").exists()
    assert {path.name for path in theirs.iterdir()} - {path.name for path in ours.iterdir()} == {
        "ema_width_0.05.safetensors",
        "ema_width_0.1.safetensors",
    }


def test_a_resumed_run_has_the_averages_and_snapshots_of_one_that_was_not(images, tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    flags = flags_of(images, out, "--max_steps", "9", "--lr_schedule", "constant", "--save_every_steps", "3")
    assert train_here(*flags, "--keep_checkpoints", "9") == 0
    shutil.copytree(out, whole)
    late = out / "averages" / "step_00000099-width_0.05.safetensors"  # of another interval, say
    late.write_bytes(b"")
    assert train_here(*flags, "--resume", str(out / "checkpoints" / "step_00000003")) == 0
    names = sorted(path.name for path in (whole / "averages").iterdir())
    assert names == sorted(path.name for path in (out / "averages").iterdir())
    assert len(names) == 8
    for name in names:
        assert filecmp.cmp(whole / "averages" / name, out / "averages" / name, shallow=False)
    for name in ("ema_width_0.05", "ema_width_0.1"):
        file = f"checkpoints/step_00000009/{name}.safetensors"
        assert filecmp.cmp(whole / file, out / file, shallow=False)
    # A snapshot that a crash prevented, of the very step of the checkpoint, is made up for.
    (whole / "averages" / "step_00000006-width_0.1.safetensors").unlink()
    flags = (*flags, "--output_dir", str(whole), "--resume", str(whole / "checkpoints" / "step_00000006"))
    assert train_here(*flags) == 0
    assert names == sorted(path.name for path in (whole / "averages").iterdir())


def test_a_run_that_did_not_track_them_cannot_begin_amid_it(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--max_steps", "2") == 0
    assert train_here(*flags_of(images, out, "--resume", "auto")) == 2
    assert "the averages that --average_snapshots stores were not tracked from its beginning" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"ema_width 0.05: the run of .* stored no averages .* --average_snapshots"):
        load(out, ema_width=0.05)


def test_too_few_are_an_error_that_says_which_widths_fit(images, tmp_path):
    assert train_here(*flags_of(images, tmp_path, "--average_snapshots", "100")) == 0
    with pytest.raises(
        UserError, match=r"of 1 step gives its profile .*error of \d+%, too few: widths of 0.04 to 0.1\d? fit"
    ):
        load(tmp_path, ema_width=0.25)


def test_a_doubtful_fit_is_warned_of(images, tmp_path, capsys):
    assert train_here(*flags_of(images, tmp_path, "--average_snapshots", "3")) == 0
    load(tmp_path, ema_width=0.16)
    assert "the profile of width_0.16 is made of 4 stored averages with an error of" in capsys.readouterr().err


def test_what_holds_none_and_files_that_are_damaged_are_named(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"ema_width 0.07: .*pipeline has no checkpoint to take averages from"):
        load(run / "pipeline", ema_width=0.07)
    file = run / "averages" / f"step_{STEPS - EVERY:08d}-width_0.05.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file.name}.*cannot be loaded"):
        load(run, ema_width=0.07)


def test_a_full_disk_ends_the_run_with_a_message(images, tmp_path, capsys, monkeypatch):
    def fail(path, pieces):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(average_snapshots, "write_tensors", fail)
    assert train_here(*flags_of(images, tmp_path / "run")) == 2
    assert (
        "the disk is full. What is finished is kept: make room and go on with --resume auto" in capsys.readouterr().err
    )
    assert not any((tmp_path / "run" / "averages").iterdir())


def test_a_width_is_converted_to_a_pipeline_folder_whose_card_says_so(trained, tmp_path, capsys):
    out, _ = trained
    target = tmp_path / "pipeline"
    assert convert(["--input", str(out), "--ema_width", "0.07", "--output", str(target)]) == 0
    assert "weights: power-function average of relative width 0.07" in capsys.readouterr().out
    assert "Weights: power-function average of relative width 0.07." in (target / "README.md").read_text()
    weights, made = load(target).transformer.state_dict(), load(out, ema_width=0.07).transformer.state_dict()
    assert all(torch.equal(weights[name], made[name]) for name in made)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ema_width", "0.3"), "--ema_width 0.3: must be 0.001 or more and below 0.288"),
        (("--ema_width", "0.05", "--weights", "ema1"), "--ema_width 0.05: says which weights are taken, as --weights"),
    ],
)
def test_conversions_that_contradict_themselves_are_refused(trained, tmp_path, capsys, flags, message):
    assert convert(["--input", str(trained[0]), "--output", str(tmp_path / "x"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_adapters_averages_are_merged_with_its_base(trained, images, tmp_path):
    out, _ = trained
    flags = ("--init_from", str(out), "--lora_rank", "2", "--max_steps", "4")
    assert train_here(*flags_of(images, tmp_path / "lora"), *flags) == 0
    assert (
        load(tmp_path / "lora", ema_width=0.07).transformer.state_dict().keys()
        == load(out).transformer.state_dict().keys()
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("fsdp2", [False, True])
def test_several_processes_store_whole_averages_on_the_main_one(images, tmp_path, fsdp2):
    out = tmp_path / "run"
    flags = flags_of(images, out, "--max_steps", "5", "--save_every_steps", "2", "--keep_checkpoints", "9")
    train_group(tmp_path, *flags, num_processes=2, environment=on_device("cpu", fsdp2))
    for step in (2, 4):
        held = out / "checkpoints" / f"step_{step:08d}"
        for width in (0.05, 0.1):
            stored = load_file(out / "averages" / f"step_{step:08d}-width_{width}.safetensors")
            own = load(held, ema_width=width).transformer.state_dict()
            assert all(torch.equal(stored[name], own[name]) for name in own)
    assert len(list((out / "averages").iterdir())) == 4
