"""Signs in sample sheets: each found where it is, and none in healthy pictures and trainings."""

import json

import numpy as np
import pytest
from helpers import train_here

from jit_accel.config.run_groups import HealthConfig
from jit_accel.data.formats.sources import open_images
from jit_accel.monitor import health as signs_of_trouble
from jit_accel.monitor.health import Health
from jit_accel.monitor.log import read_metrics
from jit_accel.monitor.pictures import contrast, patch_seams, saturated_channel


@pytest.fixture(scope="module")
def clothes():
    """The first 640 images of Fashion-MNIST, uint8 (640, 28, 28, 3)."""
    pixels = np.empty((640, 3, 28, 28), np.uint8)
    open_images("builtin:fashion_mnist").images.read(np.arange(640), pixels)
    return pixels.transpose(0, 2, 3, 1)


def photos(count: int, side: int, seed: int) -> np.ndarray:
    """Coloured pictures with edges anywhere and noise: overlapping discs and slopes, uint8 (n, side, side, 3)."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    found = []
    for _ in range(count):
        image = draws.uniform(0, 255, 3) + (x[..., None] - 0.5) * draws.uniform(-150, 150, 3)
        for _ in range(6):
            centre, radius = draws.uniform(0, 1, 2), draws.uniform(0.05, 0.4)
            image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = draws.uniform(0, 255, 3)
        found.append(image + draws.normal(0, 4, image.shape))
    return np.stack(found).clip(0, 255).astype(np.uint8)


def gridded(images: np.ndarray, patch_size: int, strength: float, seed: int = 0) -> np.ndarray:
    """Shift the brightness of each patch on its own, as patches that do not fit together have it."""
    count, height, width, _ = images.shape
    shape = (count, height // patch_size, width // patch_size, 1)
    shifts = np.random.default_rng(seed).normal(0, strength, shape)
    return (images + shifts.repeat(patch_size, 1).repeat(patch_size, 2)).clip(0, 255).astype(np.uint8)


def signs(health: Health, images: np.ndarray, patch_size: int, done: float) -> list[str]:
    return [event.kind for event in health.examine_samples(round(10_000 * done), images, patch_size, done)[1]]


@pytest.mark.parametrize("patch_size", [2, 4, 7])
def test_sheets_of_real_images_give_no_sign(clothes, patch_size):
    health = Health(HealthConfig())
    for place, start in enumerate(range(0, 640, 8)):
        assert signs(health, clothes[start : start + 8], patch_size, 0.25 + place / 110) == []


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_sheets_of_coloured_pictures_give_no_sign(patch_size):
    health = Health(HealthConfig())
    for seed in range(10):
        assert signs(health, photos(8, 64, seed), patch_size, 0.3 + seed / 20) == []


@pytest.mark.parametrize(("side", "patch_size"), [(64, 8), (64, 16)])
def test_a_grid_that_comes_back_is_found_once(side, patch_size):
    health, good = Health(HealthConfig()), photos(16, side, 0)
    assert signs(health, good, patch_size, 0.3) == []
    bad = gridded(good, patch_size, 20)
    row, (event,) = health.examine_samples(4000, bad, patch_size, 0.4)
    assert row == {"health/patch_grid": event.value}
    assert "the grid of the patches" in str(event)
    assert event.value > 1.6
    assert signs(health, bad, patch_size, 0.45) == []  # told already
    assert signs(health, good, patch_size, 0.5) == []


def test_a_grid_that_fades_is_a_young_models_and_one_that_never_does_is_found(clothes):
    health = Health(HealthConfig())
    for done, strength in ((0.01, 90), (0.1, 70), (0.25, 40), (0.5, 30), (0.75, 25), (1.0, 20)):
        assert signs(health, gridded(clothes[:80], 7, strength), 7, done) == []
    smooth = np.full((16, 28, 28, 3), 128, np.uint8) + np.arange(28, dtype=np.uint8)[:, None]
    assert signs(Health(HealthConfig()), gridded(smooth, 7, 40), 7, 0.4) == []
    assert signs(Health(HealthConfig()), gridded(smooth, 7, 40), 7, 0.6) == ["patch_grid"]


def test_what_has_collapsed_to_grey_is_found_in_the_second_half():
    grey = (128 + np.random.default_rng(0).normal(0, 2, (16, 28, 28, 3))).astype(np.uint8)
    assert contrast(grey) == pytest.approx(2, abs=0.3)
    assert signs(Health(HealthConfig()), grey, 7, 0.4) == []
    assert signs(Health(HealthConfig()), grey, 7, 0.6) == ["grey_samples"]


def test_a_channel_at_its_limit_is_found_and_black_and_white_are_not(clothes):
    red = photos(16, 32, 0)
    red[..., 0] = 255
    assert signs(Health(HealthConfig()), red, 4, 0.6) == ["saturated_channel"]
    assert saturated_channel((clothes > 100) * np.uint8(255)) == 0
    assert signs(Health(HealthConfig()), red, 4, 0.4) == []


def test_noise_and_early_steps_give_no_sign():
    noise = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 3), np.uint8)
    assert signs(Health(HealthConfig()), noise, 7, 0.9) == []
    grey = np.full((8, 28, 28, 3), 128, np.uint8)
    assert Health(HealthConfig()).examine_samples(100, grey, 7, 1.0) == ({}, [])  # a training of a hundred steps
    assert patch_seams(grey, 7) is None
    assert patch_seams(noise, 14) is None  # too few patches to tell
    assert patch_seams(noise, 1) is None


def test_a_limit_of_zero_switches_a_sign_off(clothes):
    off = HealthConfig(health_patch_grid=0, health_min_contrast=0, health_max_saturated=0)
    grey, red = np.full((8, 28, 28, 3), 128, np.uint8), photos(16, 28, 0)
    red[..., 0] = 255
    for images in (grey, red, gridded(clothes[:8], 7, 90)):
        assert signs(Health(off), images, 7, 0.9) == []


def test_the_best_sheet_is_remembered_over_an_interruption_and_old_states_load():
    good = photos(16, 64, 0)
    first, second = Health(HealthConfig()), Health(HealthConfig())
    signs(first, good, 8, 0.3)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert signs(second, gridded(good, 8, 20), 8, 0.4) == ["patch_grid"]
    third = Health(HealthConfig())
    third.load_state_dict({name: value for name, value in state.items() if name != "least_seams"})
    assert signs(third, gridded(good, 8, 20), 8, 0.4) == []  # nothing better is known


def test_a_training_whose_samples_are_grey_says_so_and_logs_it(images, tmp_path, monkeypatch, capsys):
    """Its average is that of the first weights, which draw nothing."""
    monkeypatch.setattr(signs_of_trouble, "YOUNG_STEPS", 0)
    flags = ("--max_steps", "4", "--sample_every_steps", "1", "--ema_decays", "0.999999", "--log_every_steps", "1")
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "run"), *flags) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "samples are nearly flat" in line]
    assert "step 2: " in warning
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "health/grey_samples" in row] == [2, 3, 4]


def test_what_the_training_images_have_as_well_is_no_sign():
    """Pixel art with blocks as large as the patches, stars in a black sky, and images of one colour."""
    draws = np.random.default_rng(0)
    blocks = draws.integers(0, 250, (32, 7, 7, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    blocks = blocks + draws.integers(0, 6, blocks.shape, np.uint8)
    stars = np.zeros((32, 28, 28, 3), np.uint8)
    stars[:, ::14, ::14] = 40
    green = photos(32, 28, 0)
    green[..., [0, 2]] = 0
    for images, kind in ((blocks, "patch_grid"), (stars, "grey_samples"), (green, "saturated_channel")):
        health = Health(HealthConfig())
        assert kind in signs(health, images[:16], 4, 0.6)
        health = Health(HealthConfig())
        health.real = images[16:]
        assert signs(health, images[:16], 4, 0.6) == []
