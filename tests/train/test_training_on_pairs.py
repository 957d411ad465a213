"""Trainings on pairs of pictures."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import assert_same_state, images_seen, in_fresh_accelerate, rows, state, train_group, train_here
from PIL import Image, ImageOps

import jit_accel as jit
from jit_accel.base.image_rows import GAP_PIXELS
from jit_accel.prepare import main as prepare

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


@pytest.fixture(scope="module")
def parquet(images, negatives, tmp_path_factory):
    """The same pairs in the row groups of two files."""
    folder, files = tmp_path_factory.mktemp("parquet"), sorted(images.glob("*/*.png"))
    rows = [
        {
            "image": {"bytes": file.read_bytes(), "path": None},
            "negative": {"bytes": (negatives / file.parent.name / f"{file.stem}.bmp").read_bytes(), "path": None},
        }
        for file in files
    ]
    for shard in range(2):
        pq.write_table(pa.Table.from_pylist(rows[shard::2]), folder / f"{shard}.parquet", row_group_size=5)
    return folder


def test_a_stream_of_pairs_goes_on_with_more_processes_and_workers(parquet, tmp_path):
    how = ("--data_path", str(parquet), "--condition_column", "negative", "--lanes", "4", "--save_every_steps", "2")
    notes = tmp_path / "notes"
    notes.mkdir()
    noting = {"TEST_IMAGES_FOLDER": str(notes)}
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    alone = ("--gradient_accumulation_steps", "2")
    train_group(tmp_path, *how, "--output_dir", whole, "--max_steps", "4", *alone, environment=noting)
    expected = images_seen(notes, 4)
    # as long a run, which is stopped in the middle
    train_group(tmp_path, *how, "--output_dir", parts, "--max_steps", "2", *alone, environment=noting)
    found = images_seen(notes, 2)
    again = (*how, "--output_dir", parts, "--max_steps", "4", "--resume", "auto", "--num_workers", "1")
    train_group(tmp_path, *again, num_processes=2, environment=noting)
    found |= images_seen(notes, 4)
    assert found == expected
    assert len(found) == 32


def test_a_prepared_store_brings_its_conditions(run, images, negatives, tmp_path, capsys):
    flags = ["--data_path", str(images), "--condition_path", str(negatives), "--img_size", "28", "--num_workers", "1"]
    assert prepare([*flags, "--output_dir", str(tmp_path / "store")]) == 0
    how = ("--data_path", str(tmp_path / "store"), "--output_dir", str(tmp_path / "out"), *HOW)
    assert train_here(*how, "--max_steps", "2") == 0
    assert jit.load(tmp_path / "out").transformer.config.condition_channels == 3
    held_out = [rows(out)[1]["val/psnr_untouched"] for out in (tmp_path / "out", run[1])]
    assert held_out[0] == pytest.approx(held_out[1])  # the same pairs are held out
    other = ("--output_dir", str(tmp_path / "other"))
    assert train_here(*how, *other, "--condition_from", "grey") == 2
    assert "--condition_from grey: the images of" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_path_may_begin_at_the_partner(images, negatives, tmp_path):
    flags = ("--data_path", str(images), "--condition_path", str(negatives), "--path", "bridge", *HOW)
    assert train_here(*flags, "--max_steps", "2", "--output_dir", str(tmp_path / "out")) == 0
    assert {"val/loss", "val/psnr"} <= rows(tmp_path / "out")[1].keys()


def test_images_opened_before_bring_their_conditions(images, negatives, tmp_path):
    source = jit.open_images(images, condition_path=negatives)
    how = {"model": "JiT-XS/7", "img_size": 28, "batch_size": 4, "max_steps": 1, "data_path": str(images)}
    how |= {"num_workers": 0, "num_inference_steps": 2, "mixed_precision": "no", "warmup_steps": 1}
    with in_fresh_accelerate():
        run = jit.fit(jit.Config.of(**how, output_dir=str(tmp_path / "out")), source=source)
    assert jit.load(run).transformer.config.condition_channels == 3
    with in_fresh_accelerate(), pytest.raises(jit.UserError, match="opened before"):
        config = jit.Config.of(**how, output_dir=str(tmp_path / "b"), condition_path=str(negatives))
        jit.fit(config, source=source)
