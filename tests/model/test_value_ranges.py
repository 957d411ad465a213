"""Pipelines of other channels than three, and arrays in the units of the data."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_conditions import build

from jit_accel import JiTPipeline, JiTScheduler, generate

CT = [-1024.0, 3071.0]


def make_pipe(channels=1, value_range=None, **sizes):
    pipe = JiTPipeline(build(in_channels=channels, **sizes), JiTScheduler(), value_range=value_range)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded():
    return {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}


def test_one_channel_is_a_grey_picture():
    pipe = make_pipe()
    picture = pipe(0, **seeded()).images[0]
    assert (picture.mode, picture.size) == ("L", (8, 8))
    as_tensor = pipe(0, output_type="pt", **seeded()).images
    assert as_tensor.shape == (1, 1, 8, 8)
    assert (np.asarray(picture) == (as_tensor[0, 0].numpy() * 255).round()).all()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_channels_are_arrays_and_no_pictures(channels):
    pipe = make_pipe(channels)
    with pytest.raises(ValueError, match=rf"'pil': images of {channels} channels are no pictures: use 'np'"):
        pipe(0, 1)
    assert pipe(0, output_type="np", **seeded()).images.shape == (1, 8, 8, channels)
    assert generate(pipe, [0, 1], num_inference_steps=1).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_are_in_the_units_of_the_data_in_and_out(channels, tmp_path):
    pipe, plain = make_pipe(channels, CT), make_pipe(channels)
    plain.transformer.load_state_dict(pipe.transformer.state_dict())
    share = plain(0, output_type="np", **seeded()).images
    found = pipe(0, output_type="np", **seeded()).images
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, share * (CT[1] - CT[0]) + CT[0], rtol=1e-6, atol=1e-2)
    assert torch.equal(pipe(0, output_type="pt", **seeded()).images, plain(0, output_type="pt", **seeded()).images)
    values = np.random.default_rng(0).uniform(*CT, (1, 8, 8, channels))
    as_tensor = torch.from_numpy((values - CT[0]) / (CT[1] - CT[0])).float().permute(0, 3, 1, 2)
    how = {"strength": 0.5, "output_type": "pt"}
    expected = plain(0, image=as_tensor, **how, **seeded()).images
    torch.testing.assert_close(pipe(0, image=values, **how, **seeded()).images, expected)
    torch.testing.assert_close(pipe(0, image=as_tensor, **how, **seeded()).images, expected)
    beyond = values + 1e6 * (values > 0)  # cut off, as in the training
    cut = plain(0, image=as_tensor.where(as_tensor < 0.25005, torch.ones(())), **how, **seeded()).images
    torch.testing.assert_close(pipe(0, image=beyond, **how, **seeded()).images, cut, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path)
    again = JiTPipeline.from_pretrained(tmp_path)
    assert again.config.value_range == CT
    assert (again(0, output_type="np", **seeded()).images == found).all()
    assert JiTPipeline(**again.components).config.value_range == CT


def test_the_code_that_a_folder_carries_knows_units_too(tmp_path):
    pipe = make_pipe(4, CT)
    pipe.save_pretrained(tmp_path)
    expected = pipe(0, output_type="np", **seeded()).images
    program = (
        "import sys, numpy, torch, diffusers\n"
        "sys.modules['jit_accel'] = None\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "how = {'num_inference_steps': 2, 'generator': torch.Generator().manual_seed(0)}\n"
        "numpy.save(sys.argv[1] + '/found.npy', pipe(0, output_type='np', **how).images)\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-2)


def test_a_folder_of_before_is_in_shares():
    pipe = make_pipe(3)
    assert pipe.config.value_range is None
    found = pipe(0, output_type="np", **seeded()).images
    assert 0 <= found.min() <= found.max() <= 1


def test_conditions_have_channels_and_ranges_of_their_own():
    pipe = make_pipe(1, CT, condition_channels=3)
    torch.nn.init.normal_(pipe.transformer.condition_embedder.proj2.weight)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    how = {"output_type": "pt"}
    by_bytes = pipe(0, condition_image=pixels, **how, **seeded()).images
    torch.testing.assert_close(pipe(0, condition_image=Image.fromarray(pixels), **how, **seeded()).images, by_bytes)
    in_units = pixels.astype(np.float32) / 255 * (CT[1] - CT[0]) + CT[0]
    found = pipe(0, condition_image=in_units, **how, **seeded()).images
    torch.testing.assert_close(found, by_bytes, atol=1e-4, rtol=1e-4)
    wide = (pixels.astype(np.uint16) * 257).astype(np.uint16)
    torch.testing.assert_close(pipe(0, condition_image=wide, **how, **seeded()).images, by_bytes)
    with pytest.raises(ValueError, match=r"condition_image has the shape .*\(H, W, 3\)"):
        pipe(0, 1, condition_image=np.zeros((8, 8, 5), np.float32))


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), "01", (0,), (0, float("inf")), (0, float("nan")), 3])
def test_ranges_that_are_none_are_refused(value_range):
    with pytest.raises(ValueError, match="value_range"):
        make_pipe(1, value_range)


@pytest.mark.parametrize(("channels", "value_range", "saves"), [(1, None, "png"), (4, None, "npy"), (1, CT, "npy")])
def test_a_card_shows_a_call_that_works(channels, value_range, saves):
    from jit_accel.model.card import conversion_card

    pipe = make_pipe(channels, value_range)
    card = conversion_card(pipe, "JiT", "model", {})
    program = card.split("```python")[1].split("```")[0]
    assert (f'"sample.{saves}"' in program, ('output_type="np"' in program)) == (True, saves == "npy")


def test_features_of_grey_pictures_are_those_of_their_colour():
    from jit_accel.base.errors import UserError
    from jit_accel.evaluate.features import in_colour

    grey = torch.arange(32).view(2, 1, 4, 4)
    assert torch.equal(in_colour(grey), torch.cat([grey] * 3, 1))
    with pytest.raises(UserError, match="2 channels"):
        in_colour(torch.zeros(1, 2, 4, 4))
