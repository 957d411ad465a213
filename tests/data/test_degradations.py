"""Conditions that are made from the images themselves."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from jit_accel import UserError
from jit_accel.data.batches.degradations import DEGRADATIONS, check_size, degradation_of

EACH = [f"{name}:{kind.example}".rstrip(":") for name, kind in DEGRADATIONS.items()]
KEYS = np.arange(5)


@pytest.fixture
def images():
    smooth = F.interpolate(torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 16, mode="bilinear")
    return smooth * 2 - 1


@pytest.mark.parametrize("text", EACH)
def test_an_image_and_its_key_alone_decide(text, images):
    degrade = degradation_of(text, seed=3)
    whole = degrade(images, KEYS)
    assert whole.shape == (5, degrade.channels(3), 16, 16)
    assert whole.dtype == torch.float32
    assert whole.min() >= -1
    assert whole.max() <= 1
    assert not torch.allclose(whole, images if degrade.channels(3) == 3 else images.mean(1, keepdim=True), atol=1e-3)
    assert torch.allclose(degrade(images[3:], KEYS[3:]), whole[3:], atol=1e-6)
    assert torch.equal(degrade(images, KEYS), whole)


@pytest.mark.parametrize("text", ["noise:0.1", "mask:0.5"])
def test_what_is_random_changes_with_key_and_seed(text, images):
    one = degradation_of(text, seed=0)(images, KEYS)
    for other in (degradation_of(text, seed=1)(images, KEYS), degradation_of(text, seed=0)(images, KEYS + 5)):
        assert not any(torch.equal(a, b) for a, b in zip(one, other))


def test_they_do_what_they_say(images):
    bytes_of = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    enlarged = (degradation_of("downscale:2")(images, KEYS) + 1) * 127.5
    pillows = np.stack([np.asarray(Image.fromarray(one).resize((8, 8)).resize((16, 16))) for one in bytes_of])
    assert np.abs(enlarged.permute(0, 2, 3, 1).numpy() - pillows).mean() < 3  # whose cubic is a little softer
    grey = degradation_of("grey")(torch.from_numpy(bytes_of).permute(0, 3, 1, 2) / 127.5 - 1, KEYS)
    pillows = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in bytes_of])
    assert np.abs((grey[:, 0].numpy() + 1) * 127.5 - pillows).max() <= 1
    blurred = (degradation_of("blur:1.5")(images, KEYS) + 1) * 127.5
    pillows = np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(1.5))) for one in bytes_of])
    inner = (slice(None), slice(5, 11), slice(5, 11))
    assert np.abs(blurred.permute(0, 2, 3, 1).numpy()[inner] - pillows[inner]).mean() < 1.5
    flat = torch.zeros(64, 3, 32, 32)
    assert degradation_of("noise:0.1")(flat, np.arange(64)).std().item() == pytest.approx(0.2, rel=0.02)
    masked = degradation_of("mask:0.25")(flat + 0.5, np.arange(64)) == 0
    assert masked.float().mean().item() == pytest.approx(0.25)
    assert masked.any(0).all(0).float().mean() > 0.95  # anywhere


def test_a_jpeg_is_pillows(images):
    made = (degradation_of("jpeg:20")(images, KEYS) + 1) * 127.5
    bytes_of = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for one, found in zip(bytes_of, made.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(one).save(file := io.BytesIO(), "JPEG", quality=20)
        assert np.abs(np.asarray(Image.open(file)) - found).max() < 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("downscael:4", "downscale"),
        ("downscale", "wants a factor above 1, such as downscale:4"),
        ("downscale:1", "wants a factor above 1"),
        ("grey:2", "takes no argument: write grey"),
        ("blur:0", "wants the standard deviation in pixels"),
        ("blur:nan", "wants the standard deviation in pixels"),
        ("noise:inf", "wants the standard deviation"),
        ("mask:1", "wants the share of the area"),
        ("jpeg:101", "wants a whole quality from 1 to 100"),
        ("jpeg:x", "wants a whole quality"),
    ],
)
def test_what_means_nothing_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        degradation_of(text)


def test_a_pixel_must_be_left():
    check_size(degradation_of("downscale:28"), (28, 56))
    with pytest.raises(UserError, match="leaves less than a pixel of 28 x 56"):
        check_size(degradation_of("downscale:29"), (28, 56))
