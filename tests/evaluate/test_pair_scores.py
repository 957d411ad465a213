"""Scores of images against those that they should be."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch

from jit_accel.base.errors import UserError
from jit_accel.data.batches.degradations import degradation_of
from jit_accel.data.formats.sources import open_images
from jit_accel.evaluate.pair_scores import PairScores, import_torchmetrics, means, untouched, with_intervals
from jit_accel.evaluate.perceptual import ALEXNET_FILE, alexnet


@pytest.fixture(scope="module")
def photos():
    """Smooth random images, uint8 (5, 3, 20, 24), and noisy ones of them."""
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(5, 3, 5, 6, generator=draws)
    clean = torch.nn.functional.interpolate(coarse, (20, 24), mode="bilinear") * 200 + 20
    noisy = clean + 10 * torch.randn(clean.shape, generator=draws)
    return clean.round().to(torch.uint8), noisy.round().clamp(0, 255).to(torch.uint8)


def test_scores_are_torchmetrics_of_each_image_in_the_range_of_1(photos):
    truths, images = photos
    found, theirs = PairScores()(images, truths), import_torchmetrics()
    assert (found.shape, found.dtype) == ((5, 3), torch.float64)
    for row, image, truth in zip(found.tolist(), images.double() / 255, truths.double() / 255):
        pair = image[None], truth[None]
        assert row[0] == pytest.approx(float(theirs.image.peak_signal_noise_ratio(*pair, data_range=1.0)), abs=1e-4)
        assert row[1] == pytest.approx(
            float(theirs.image.structural_similarity_index_measure(*pair, data_range=1.0)), abs=1e-5
        )
        assert row[2] == pytest.approx(float(theirs.mean_absolute_error(*pair)), rel=1e-5)


def test_of_a_known_difference_they_are_the_closed_form():
    truths = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    images = truths.clone()
    images[0] += 10
    images[1, 0, 0, 0] += 255 - 100  # one value of 768, as wrong as it can be upwards
    (shifted, dotted) = PairScores(("psnr", "mae"))(images, truths).tolist()
    assert shifted == pytest.approx([20 * math.log10(255 / 10), 10 / 255], rel=1e-6)
    assert dotted == pytest.approx([10 * math.log10(768 * (255 / 155) ** 2), 155 / 255 / 768], rel=1e-6)


def test_equal_images_have_a_psnr_of_100_that_leaves_means_finite(photos):
    truths, images = photos
    scores = PairScores()
    assert scores(truths, truths).tolist() == [[100, pytest.approx(1), 0]] * 5
    mixed = scores(torch.cat([truths[:1], images[1:]]), truths)
    assert math.isfinite(means(scores.names, mixed)["psnr"])
    least = truths.clone()
    least[:, 0, 0, 0] += 1  # one value, by the least that 8 bits can show
    assert (scores(least, truths)[:, 0] < 100).all()


def test_means_do_not_depend_on_order(photos):
    scores = PairScores()
    rows = scores(*photos)
    assert means(scores.names, rows) == means(scores.names, rows.flip(0))
    assert means(scores.names, rows)["mae"] == pytest.approx(float(rows[:, 2].mean()))


@pytest.mark.parametrize("count", [1, 2, 300])
def test_intervals_contain_the_mean_and_are_as_wide_as_theory_says(count):
    rows = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) * 3 + 20
    found = with_intervals(("psnr", "other"), rows)
    assert found == with_intervals(("psnr", "other"), rows)
    assert list(found) == ["psnr", "psnr_low", "psnr_high", "other", "other_low", "other_high"]
    for name, column in zip(("psnr", "other"), rows.T):
        assert found[name + "_low"] <= found[name] <= found[name + "_high"]
        if count == 300:
            width = found[name + "_high"] - found[name + "_low"]
            assert width == pytest.approx(2 * 1.96 * float(column.std()) / count**0.5, rel=0.1)


def test_intervals_of_normal_scores_hold_the_truth_in_about_95_of_100_cases():
    draws = torch.Generator().manual_seed(1)
    found = [with_intervals(("x",), torch.randn(60, 1, dtype=torch.float64, generator=draws)) for _ in range(100)]
    assert 88 <= sum(one["x_low"] <= 0 <= one["x_high"] for one in found) <= 99


def test_an_untouched_condition_is_an_image_of_the_truths_form():
    truths = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    grey = torch.rand(2, 1, 8, 12)
    assert torch.equal(untouched(grey, truths), (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1))
    small = untouched(torch.full((2, 3, 4, 6), 0.25), truths)
    assert small.shape == truths.shape
    assert (small == 64).all()
    assert untouched(torch.rand(2, 5, 8, 12), truths) is None
    assert untouched(torch.rand(2, 3, 8, 12), truths[:, :1]) is None


@pytest.mark.parametrize(("factor", "decibels"), [(4, 16.03), (2, 19.34)])
def test_the_untouched_scores_of_enlarged_clothes_are_known(factor, decibels):
    """The ones that a training of super-resolution must beat, of all images of the embedded test split."""
    source = open_images("builtin:fashion_mnist_test")
    pixels = np.empty((source.num_images, 3, 28, 28), np.uint8)
    source.images.read(np.arange(source.num_images), pixels)
    truths = torch.from_numpy(pixels)
    conditions = degradation_of(f"downscale:{factor}")(truths / 127.5 - 1, np.zeros(len(truths), np.int64))
    scores = PairScores(("psnr",))
    found = means(scores.names, scores(untouched((conditions + 1) / 2, truths), truths))
    assert found["psnr"] == pytest.approx(decibels, abs=0.05)


@pytest.fixture
def alexnet_weights(tmp_path, monkeypatch):
    """Random weights in the place of AlexNet's; returns the layers."""
    torch.manual_seed(0)
    layers = alexnet()
    file = tmp_path / "checkpoints" / ALEXNET_FILE
    file.parent.mkdir()
    torch.save({f"features.{name}": tensor for name, tensor in layers.state_dict().items()}, file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return layers


def test_lpips_is_torchmetrics_with_the_same_weights(alexnet_weights, monkeypatch):
    theirs = importlib.import_module(import_torchmetrics().__name__ + ".image.lpips")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: alexnet_weights)
    network = theirs._LPIPS(net="alex", pnet_rand=True)
    draws = torch.Generator().manual_seed(1)
    images, truths = (torch.randint(0, 256, (4, 3, 40, 31), dtype=torch.uint8, generator=draws) for _ in range(2))
    expected = network(images / 255, truths / 255, normalize=True).flatten()
    found = PairScores(("lpips",))(images, truths)[:, 0]
    assert torch.allclose(found, expected.double(), rtol=1e-4)
    assert (PairScores(("lpips",))(truths, truths) == 0).all()


def test_lpips_refuses_what_it_cannot_do(alexnet_weights, tmp_path):
    with pytest.raises(UserError, match="metrics lpips: is for images of 31 pixels and more, and these have 28"):
        PairScores(("lpips",), side=28)
    file = tmp_path / "checkpoints" / ALEXNET_FILE
    torch.save({"other": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"metrics .*not weights of AlexNet"):
        PairScores(("lpips",))
    file.unlink()
    with pytest.raises(UserError, match=r"metrics lpips: its weights are not in .*never downloaded"):
        PairScores(("lpips",))


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"metrics psrn: unknown.*Did you mean 'psnr'"):
        PairScores(("psrn",))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(UserError, match=r"pip install 'jit_accel\[eval\]'"):
        PairScores()
