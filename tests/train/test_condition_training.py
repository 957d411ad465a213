"""Trainings whose network sees a condition beside the noise."""

import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_state, last_checkpoint, rows, state, train_group, train_here
from PIL import Image
from safetensors.torch import load_file

import jit_accel as jit
from jit_accel.base.image_rows import GAP_PIXELS
from jit_accel.data.batches.degradations import degradation_of

HOW = (
    "--condition_from",
    "downscale:4",
    "--condition_drop_prob",
    "0.5",
    "--save_every_steps",
    "2",
    "--holdout",
    "0.2",
    "--val_every_steps",
    "2",
)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The flags and the folder of a finished run of four steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(images), *HOW)
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "4", "--keep_checkpoints", "9") == 0
    return flags, out


def test_a_pipeline_comes_out_that_wants_a_condition(run):
    _, out = run
    pipe = jit.load(out)
    assert pipe.transformer.config.condition_channels == 3
    assert (pipe.config.guidance_scale, pipe.config.guidance_on) == (1.0, "both")
    with pytest.raises(ValueError, match="condition_image is not given"):
        pipe(0, 1)
    assert all("val/loss" in row for row in rows(out)[1::2])
    weights = load_file(last_checkpoint(out) / "model.safetensors")
    assert weights["condition_embedder.proj2.weight"].abs().sum() > 0
    assert weights["condition_embedder.none"].abs().sum() > 0


def test_sheets_show_condition_output_and_truth(run):
    _, out = run
    sheet = np.asarray(Image.open(out / "samples" / "step_00000004.png"))
    cell = sheet.shape[0] // 3
    condition, _, truth = (sheet[row * cell : (row + 1) * cell - GAP_PIXELS, -8 * cell :] for row in range(3))
    zoom = (cell - GAP_PIXELS) // 28
    made, true = (
        picture[zoom // 2 :: zoom, : cell - GAP_PIXELS][:, zoom // 2 :: zoom] for picture in (condition, truth)
    )
    tensor = torch.from_numpy(true.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    expected = (degradation_of("downscale:4")(tensor, np.zeros(1, np.int64))[0] + 1) * 127.5
    assert np.abs(expected.permute(1, 2, 0).numpy() - made).max() <= 1


def test_a_resume_goes_on_bit_for_bit(run, tmp_path):
    flags, out = run
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--resume", "auto") == 0
    assert_same_state(out, tmp_path / "out")


def test_two_processes_take_the_steps_of_one(images, tmp_path):
    flags = ("--data_path", str(images), "--condition_from", "noise:0.5", "--max_steps", "2", "--output_dir")
    one, two = (tmp_path / name for name in ("one", "two"))
    train_group(tmp_path, *flags, str(one), "--gradient_accumulation_steps", "2")
    train_group(tmp_path, *flags, str(two), num_processes=2)
    for name, tensor in state(one).items():
        if name.startswith("model/"):
            assert torch.allclose(state(two)[name], tensor, atol=1e-5), name


def test_a_training_starts_as_the_model_without_conditions(images, tmp_path):
    data = ("--data_path", str(images), "--holdout", "0.2", "--val_every_steps", "1", "--label_drop_prob", "0")
    assert train_here(*data, "--max_steps", "2", "--output_dir", str(tmp_path / "plain")) == 0
    start = (*data, "--init_from", str(tmp_path / "plain"), "--max_steps", "2")
    assert train_here(*start, "--output_dir", str(tmp_path / "as_it_is")) == 0
    conditioned = (*start, "--condition_from", "grey", "--output_dir")
    assert train_here(*conditioned, str(tmp_path / "shown")) == 0
    first = [rows(tmp_path / name)[0]["train/loss"] for name in ("as_it_is", "shown")]
    assert first[0] == first[1]
    again = str(tmp_path / "lora")
    assert train_here(*conditioned, again, "--lora_rank", "1", "--lora_targets", "mlp.w3") == 0
    assert rows(tmp_path / "lora")[0]["train/loss"] == first[0]
    trained = set(load_file(last_checkpoint(tmp_path / "lora") / "model.safetensors"))
    assert {name.partition(".")[0] for name in trained} == {"blocks", "condition_embedder"}
    whole = jit.load(again).transformer.state_dict()
    of_checkpoint = jit.load(last_checkpoint(tmp_path / "lora")).transformer.state_dict()
    assert all(torch.equal(whole[name], of_checkpoint[name]) for name in whole)
    assert whole["condition_embedder.proj2.weight"].shape[1] == 1
    assert whole["condition_embedder.proj2.weight"].abs().sum() > 0
    assert train_here(*conditioned, again, "--lora_rank", "1", "--lora_targets", "mlp.w3", "--resume", "auto") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--condition_from", "downscael:4"), "--condition_from downscael: unknown"),
        (("--condition_from", "downscale:29"), "leaves less than a pixel of 28 x 28"),
        (("--condition_from", "grey:1"), "takes no argument"),
        (("--condition_inject", "tokens"), "--condition_inject tokens: says how a condition enters"),
        (("--condition_bottleneck", "8"), "--condition_bottleneck 8: says how a condition enters"),
        (("--condition_channels", "3"), "--condition_channels 3: the data has no condition"),
        (("--condition_from", "grey", "--condition_channels", "3"), "the condition of this data has 1 channels"),
        (("--guidance_on", "condition"), "--guidance_on condition: there is no condition"),
        (("--condition_from", "grey", "--condition_drop_prob", "2"), "a probability between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(images, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
