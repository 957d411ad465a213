"""Trainings on pairs of pictures."""

import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_state, rows, state, train_group, train_here
from PIL import Image, ImageOps

import jit_accel as jit
from jit_accel.base.image_rows import GAP_PIXELS

HOW = ("--save_every_steps", "2", "--holdout", "0.2", "--val_every_steps", "2", "--keep_checkpoints", "9")


@pytest.fixture(scope="module")
def negatives(images, tmp_path_factory):
    """The negative of each image, in grey and with another ending, in a folder beside."""
    folder = tmp_path_factory.mktemp("pairs") / "negatives"
    for file in images.glob("*/*.png"):
        place = folder / file.parent.name / f"{file.stem}.bmp"
        place.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(file).convert("L")).save(place)
    return folder


@pytest.fixture(scope="module")
def run(images, negatives, tmp_path_factory):
    """The flags and the folder of a finished run of four steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(images), "--condition_path", str(negatives), *HOW)
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "4") == 0
    return flags, out


def test_a_pipeline_comes_out_that_wants_a_condition(run):
    _, out = run
    pipe = jit.load(out)
    assert pipe.transformer.config.condition_channels == 3
    assert all("val/loss" in row for row in rows(out)[1::2])
    with pytest.raises(ValueError, match="condition_image is not given"):
        pipe(0, 1)


def test_sheets_show_pairs(run):
    _, out = run
    sheet = np.asarray(Image.open(out / "samples" / "step_00000004.png"))
    cell = sheet.shape[0] // 3
    condition, _, truth = (sheet[row * cell : (row + 1) * cell - GAP_PIXELS, -8 * cell :] for row in range(3))
    zoom = (cell - GAP_PIXELS) // 28
    shown, true = (
        picture[zoom // 2 :: zoom, : cell - GAP_PIXELS][:, zoom // 2 :: zoom].astype(int)
        for picture in (condition, truth)
    )
    assert np.array_equal(shown, 255 - true)


def test_a_resume_goes_on_bit_for_bit(run, tmp_path):
    flags, out = run
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--resume", "auto") == 0
    assert_same_state(out, tmp_path / "out")


def test_a_resume_knows_its_pairs_where_they_moved_and_refuses_others(run, images, negatives, tmp_path, capsys):
    _, out = run
    moved = shutil.copytree(negatives, tmp_path / "moved")
    again = ("--data_path", str(images), *HOW, "--output_dir", str(out), "--resume", "auto", "--max_steps", "4")
    assert train_here(*again, "--condition_path", str(moved)) == 0
    file = next(moved.glob("*/*.bmp"))
    file.rename(file.with_suffix(".png"))
    assert train_here(*again, "--condition_path", str(moved)) == 2
    assert "belongs to another run" in capsys.readouterr().err
    assert train_here(*again) == 2
    assert "the checkpoint has 3" in capsys.readouterr().err


def test_two_processes_take_the_steps_of_one(images, negatives, tmp_path):
    flags = ("--data_path", str(images), "--condition_path", str(negatives), "--max_steps", "2", "--output_dir")
    one, two = (tmp_path / name for name in ("one", "two"))
    train_group(tmp_path, *flags, str(one), "--gradient_accumulation_steps", "2")
    train_group(tmp_path, *flags, str(two), num_processes=2)
    for name, tensor in state(one).items():
        if name.startswith("model/"):
            assert torch.allclose(state(two)[name], tensor, atol=1e-5), name


def test_too_many_bad_partners_stop_a_run(images, negatives, tmp_path, capsys):
    some = shutil.copytree(negatives, tmp_path / "some")
    for file in sorted(some.glob("*/*.bmp"))[::2]:
        file.unlink()
    flags = ("--data_path", str(images), "--condition_path", str(some), "--output_dir", str(tmp_path / "out"))
    assert train_here(*flags) == 2
    assert "its condition is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--condition_from", "grey", "--condition_path", "x"), "--condition_from grey does: give one of them"),
        (("--condition_path", "x", "--condition_column", "y"), "--condition_path x does: give one of them"),
        (("--condition_path", "nowhere"), "--condition_path nowhere: no such file or folder"),
        (("--condition_column", "shown"), "--condition_column shown: "),
    ],
)
def test_settings_that_do_not_fit_are_refused(images, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_opened_before_bring_their_conditions(images, negatives, tmp_path):
    source = jit.open_images(images, condition_path=negatives)
    how = {"model": "JiT-XS/7", "img_size": 28, "batch_size": 4, "max_steps": 1, "data_path": str(images)}
    how |= {"num_workers": 0, "num_inference_steps": 2, "mixed_precision": "no", "warmup_steps": 1}
    from helpers import in_fresh_accelerate

    with in_fresh_accelerate():
        run = jit.fit(jit.Config.of(**how, output_dir=str(tmp_path / "out")), source=source)
    assert jit.load(run).transformer.config.condition_channels == 3
    with in_fresh_accelerate(), pytest.raises(jit.UserError, match="opened before"):
        config = jit.Config.of(**how, output_dir=str(tmp_path / "b"), condition_path=str(negatives))
        jit.fit(config, source=source)
