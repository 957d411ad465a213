"""Trainings on grey images and on arrays."""

import shutil

import numpy as np
import pytest
from helpers import assert_same_state, last_checkpoint, rows, train_here
from PIL import Image

import jit_accel as jit
from jit_accel.base.image_rows import as_pictures

RANGE = ("-5", "20")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """A folder of .npy files, float32 (28, 28, 2) from -5 to 20, in two classes."""
    folder, draws = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for number in range(48):
        place = folder / "ab"[number % 2]
        place.mkdir(exist_ok=True)
        np.save(place / f"{number}.npy", draws.uniform(-5, 20, (28, 28, 2)).astype(np.float32))
    return folder


def flags(folder, out, *more):
    how = ("--data_path", str(folder), "--in_channels", "2", "--value_range", *RANGE, "--holdout", "0.2")
    return (*how, "--save_every_steps", "2", "--keep_checkpoints", "9", "--output_dir", str(out), *more)


@pytest.fixture(scope="module")
def run(arrays, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert train_here(*flags(arrays, out, "--max_steps", "4", "--val_every_steps", "2")) == 0
    return out


def test_arrays_train_and_the_pipeline_makes_arrays_in_their_units(run):
    pipe = jit.load(run)
    assert (pipe.transformer.config.in_channels, pipe.config.value_range) == (2, [-5.0, 20.0])
    found = pipe(["a", "b"], num_inference_steps=2, output_type="np").images
    assert found.shape == (2, 28, 28, 2)
    assert found.min() > 1  # about the middle of the range, so early
    assert np.isfinite([row["val/loss"] for row in rows(run)[1::2]]).all()
    assert jit.load(last_checkpoint(run)).config.value_range == [-5.0, 20.0]


def test_their_sheet_is_a_row_of_channels(run):
    sheet = np.asarray(Image.open(run / "samples" / "step_00000004.png").convert("RGB")).astype(int)
    assert (np.ptp(sheet, axis=2) == 0).all()
    assert sheet.shape[1] > 8 * 2 * 28  # eight images of two channels side by side
    pixels = np.arange(2 * 3 * 4 * 2, dtype=np.uint8).reshape(2, 3, 4, 2)
    pictures = as_pictures(pixels)
    assert pictures.shape == (2, 3, 8, 3)
    assert (pictures[..., :4, 0] == pixels[..., 0]).all()
    assert (pictures[..., 4:, 2] == pixels[..., 1]).all()


def test_they_resume_bit_for_bit(run, arrays, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags(arrays, out, "--max_steps", "4", "--val_every_steps", "2", "--resume", "auto")) == 0
    assert_same_state(out, run)


def test_a_run_is_not_continued_in_another_range(run, arrays, capsys):
    other = [*flags(arrays, run, "--max_steps", "4", "--resume", "auto")]
    other[other.index("20")] = "30"
    assert train_here(*other) == 2
    assert "--value_range" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        (("--value_range", "5", "5"), "two numbers, the smaller one first"),
        (("--in_channels", "65"), "at least 1 and at most 64"),
        (("--in_channels", "3"), "--in_channels 2"),
        (("--eval_every_steps", "2"), "features of grey or colour"),
        (("--aux_loss", "features=0.1"), "features are of grey or colour"),
        (("--condition_from", "jpeg:20"), "JPEGs are grey or colour"),
    ],
)
def test_contradictions_are_refused(arrays, tmp_path, capsys, more, rule):
    assert train_here(*flags(arrays, tmp_path / "out", "--max_steps", "2", *more)) == 2
    assert rule in " ".join(capsys.readouterr().err.split())


def test_floats_without_a_range_are_refused_with_their_values(arrays, tmp_path, capsys):
    how = ("--data_path", str(arrays), "--in_channels", "2", "--output_dir", str(tmp_path / "out"))
    assert train_here(*how, "--max_steps", "2") == 2
    error = capsys.readouterr().err
    assert "with values from -" in error
    assert "--value_range" in error


def test_conditions_from_arrays_are_learnt_and_shown(arrays, tmp_path):
    out = tmp_path / "out"
    more = ("--max_steps", "2", "--condition_from", "grey", "--sample_every_steps", "2", "--paired_every_steps", "0")
    assert train_here(*flags(arrays, out, *more)) == 0
    pipe = jit.load(out)
    assert pipe.transformer.config.condition_channels == 1
    values = np.random.default_rng(0).uniform(-5, 20, (28, 28, 1)).astype(np.float32)
    assert pipe("a", 1, condition_image=values, output_type="np").images.shape == (1, 28, 28, 2)


def test_grey_images_start_from_a_model_of_colour(images, tmp_path):
    how = ("--data_path", str(images), "--max_steps", "2")
    assert train_here(*how, "--output_dir", str(tmp_path / "colour")) == 0
    more = ("--in_channels", "1", "--init_from", str(tmp_path / "colour"), "--output_dir", str(tmp_path / "grey"))
    assert train_here(*how, *more) == 0
    assert jit.load(tmp_path / "grey")(0, 1).images[0].mode == "L"


def test_a_source_of_ones_own_says_its_channels(arrays, tmp_path):
    source = jit.open_images(arrays, in_channels=2, value_range=(-5, 20))
    config = jit.Config.of(data_path=str(arrays), output_dir=str(tmp_path / "out"), model="JiT-Ti/7", img_size=28)
    with pytest.raises(jit.UserError, match="in_channels 3: the images were opened before, with 2"):
        jit.fit(config, source=source)


def test_a_store_trains_as_its_source(run, arrays, tmp_path):
    from jit_accel.prepare import main

    store = tmp_path / "store"
    how = ("--in_channels", "2", "--value_range", *RANGE, "--img_size", "28")
    assert main(["--data_path", str(arrays), "--output_dir", str(store), *how]) == 0
    assert train_here(*flags(store, tmp_path / "out", "--max_steps", "2")) == 0
    assert jit.load(tmp_path / "out").config.value_range == [-5.0, 20.0]
