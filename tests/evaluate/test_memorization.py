"""Memorization: models that copy are found, and those that do not are not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Group, in_fresh_accelerate
from PIL import Image

from jit_accel.data.formats.sources import open_images
from jit_accel.evaluate import main
from jit_accel.evaluate.memorization import LooksTally, is_memorized, memorization, nearer_share, reduced

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Training images, held-out ones, as many others, and those of a model that copies every other image, as .npz."""
    pixels = np.empty((300, 3, 28, 28), np.uint8)
    open_images("builtin:fashion_mnist").images.read(np.arange(300), pixels)
    pixels = pixels.transpose(0, 2, 3, 1)
    training, held_out, others = pixels[:200], pixels[200:250], pixels[250:]
    copies = others.copy()
    # nearly copies: the noise of a model that has learnt them by heart
    noise = np.random.default_rng(0).integers(-3, 4, copies[::2].shape)
    copies[::2] = (training[:25] + noise).clip(0, 255)
    folder = tmp_path_factory.mktemp("sets")
    for name, images in {"training": training, "held_out": held_out, "others": others, "copies": copies}.items():
        np.savez(folder / f"{name}.npz", arr_0=images)
    (folder / "photos").mkdir()
    for number, image in enumerate(training):
        Image.fromarray(image).save(folder / "photos" / f"{number:03d}.png")
    return folder


def command(sets, images: str, out) -> list[str]:
    flags = ("--images", sets / f"{images}.npz", "--reference", sets / "photos", "--held_out", sets / "held_out.npz")
    return [*map(str, flags), "--features", "tiny", "--metrics", "fd", "--output", str(out)]


@pytest.fixture(scope="module")
def measured(sets, tmp_path_factory):
    """Records by the images that were measured."""
    found = {}
    for images in ("copies", "others"):
        file = tmp_path_factory.mktemp(images) / "found.json"
        with in_fresh_accelerate():
            assert main(command(sets, images, file)) == 0
        found[images] = json.loads(file.read_text())[0] | {"folder": file.parent}
    return found


def test_a_model_that_copies_half_of_its_images_is_found_out(measured):
    metrics, held_out = measured["copies"]["metrics"], measured["copies"]["held_out"]
    assert metrics["memorized_pixels"] == pytest.approx(0.5, abs=0.05)
    assert metrics["memorized_tiny"] > held_out["memorized"] + 0.3
    assert metrics["copying_tiny"] > 0.65
    assert held_out["memorized_pixels"] <= 0.02
    assert held_out["num_images"] == 50


def test_of_one_that_does_not_the_numbers_are_those_of_held_out_images(measured):
    metrics, held_out = measured["others"]["metrics"], measured["others"]["held_out"]
    assert metrics["memorized_pixels"] <= 0.02
    assert metrics["memorized_tiny"] == pytest.approx(held_out["memorized"], abs=0.12)
    assert metrics["copying_tiny"] == pytest.approx(0.5, abs=0.12)
    assert list(metrics)[3:] == ["memorized_tiny", "copying_tiny", "memorized_pixels"]


def test_the_sheet_shows_copies_beside_what_they_are_of(measured, sets):
    sheet = np.asarray(Image.open(measured["copies"]["folder"] / "nearest.png").convert("RGB"), np.int64)
    cell = sheet.shape[0] // 3
    cells = [[sheet[r * cell : r * cell + 84, -(8 - c) * 86 :][:, :84] for c in range(8)] for r in range(3)]
    assert all(np.abs(cells[0][c] - cells[2][c]).max() <= 3 for c in range(8))
    assert any(np.abs(cells[0][c] - cells[2][c]).max() > 0 for c in range(8))  # no copy of the first row


@pytest.mark.multiprocess
def test_two_processes_find_what_one_does(measured, sets, tmp_path):
    environment = {"TEST_MAIN": "jit_accel.evaluate:main", "TEST_SETUP": "tiny_features:install"}
    group = Group(command(sets, "copies", tmp_path / "two.json"), tmp_path / "log.txt", 2, environment)
    assert group.wait() == [0, 0], group.output()
    (record,) = json.loads((tmp_path / "two.json").read_text())
    assert record["num_processes"] == 2
    assert record["metrics"] == pytest.approx(measured["copies"]["metrics"], rel=1e-4)
    assert record["held_out"] == measured["copies"]["held_out"]
    one, two = (np.asarray(Image.open(path / "nearest.png")) for path in (measured["copies"]["folder"], tmp_path))
    assert (one == two).all()


def test_what_is_memorized_is_nearer_than_a_third_of_the_second_or_the_same():
    distances = torch.tensor([[1.0, 3.0], [1.1, 3.0], [0.0, 0.0], [0.01, 0.011], [5.0, 5.0]])
    assert is_memorized(distances, 0.02).tolist() == [True, False, True, True, False]


def test_copying_is_the_probability_of_being_nearer():
    assert nearer_share(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 1
    assert nearer_share(torch.tensor([3.0]), torch.tensor([3.0, 3.0])) == 0.5
    assert nearer_share(torch.tensor([2.0]), torch.tensor([1.0, 3.0, 3.0, 2.0])) == (2 + 0.5) / 4


def test_the_most_like_a_copy_comes_first():
    generated = {"features": torch.tensor([[1.0, 1.1], [0.1, 2.0], [1.0, 2.0]])}
    made, real, order = memorization(generated, {"features": torch.tensor([[1.0, 1.1], [1.0, 1.2]])})
    assert order.tolist() == [1, 2, 0]
    assert made == {"memorized": pytest.approx(1 / 3), "copying": pytest.approx((0.5 + 1 + 0.5) / 3)}
    assert real == {"memorized": 0}


def test_pictures_are_reduced_to_means_and_only_so_many_are_kept():
    images = torch.arange(4, dtype=torch.uint8).repeat_interleave(32)[None, None, :, None].expand(1, 3, 128, 128) * 60
    assert reduced(images, 64)[0, 0, :, 0].tolist() == [value for value in (0, 60, 120, 180) for _ in range(16)]
    assert reduced(images[..., :96], 64).shape == (1, 3, 64, 48)
    tally = LooksTally(10, 4, 2, (1, 8, 8))
    for numbers in torch.arange(12).split(5):
        layers = {"main": numbers[:, None].expand(-1, 2).float()}
        tally.add(numbers, numbers.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8), layers)
    looks = tally.finish(SimpleNamespace(num_processes=1))
    kept = looks.features[:, 0].tolist()
    assert kept == sorted(kept)
    assert len(kept) == 4
    assert looks.pictures[:, 0, 0, 0].tolist() == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held_out_split", "test"], "--held_out_split test: is of --held_out"),
        (["--held_out", "photos"], "--held_out photos: names the same images as --reference"),
        (["--held_out", "x", "--guidance_scale", "1,2"], "--held_out x: does not go with a sweep"),
        (["--held_out", "x", "--reference", "a.npz"], "--held_out x: is compared with the training images"),
        (["--held_out", "x", "--pairs", "y"], "does not go with --pairs"),
    ],
)
def test_held_out_images_that_have_nothing_to_be_compared_with_are_refused(capsys, flags, message):
    assert main(["--model", "m", "--reference", "photos", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_training_images_are_no_held_out_ones(sets, tmp_path, capsys):
    (tmp_path / "link").symlink_to(sets / "photos")
    flags = command(sets, "others", tmp_path / "a.json")
    flags[flags.index("--held_out") + 1] = str(tmp_path / "link")
    with in_fresh_accelerate():
        assert main(flags) == 2
    assert "holds the same images as --reference" in capsys.readouterr().err
