"""Rectangles: how they are cut out, stored and read; of squares nothing is changed."""

import json

import numpy as np
import pytest
import torch
from data_samples import image_folder
from helpers import as_parquet
from PIL import Image
from prepare_samples import FORMATS, prepare

import jit_accel as jit
from jit_accel.base.errors import UserError
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.formats.prepared import INDEX, read_index
from jit_accel.data.formats.sources import open_images
from jit_accel.data.reading.crop import center_crop, fast_crop
from jit_accel.data.reading.decode import decode_image

TALL, WIDE = (24, 16), (8, 24)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    planes = x + 0 * y, y + 0 * x, (x + y) / 2
    return Image.fromarray(np.stack(planes, 2).round().astype(np.uint8))


def adms(image: Image.Image, size: int) -> Image.Image:
    """ADM's own lines (guided-diffusion, image_datasets.py)."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return Image.fromarray(array[top : top + size, left : left + size])


def test_squares_are_cut_out_as_adm_does():
    draws = np.random.default_rng(1)
    for seed in range(60):
        size, width = int(draws.integers(2, 40)), int(draws.integers(2, 200))
        height = int(draws.integers(max(2, width // 15), 15 * width if width < 20 else 200))
        image = noise(width, height, seed)
        expected = adms(image, size).tobytes()
        assert center_crop(image, size).tobytes() == center_crop(image, (size, size)).tobytes() == expected


@pytest.mark.parametrize("size", [TALL, WIDE, (1, 7), (40, 3)])
def test_a_rectangle_is_covered_by_the_middle_of_any_picture(size):
    draws = np.random.default_rng(2)
    for _ in range(40):
        width, height = draws.integers(1, 300, 2).tolist()
        white = Image.new("RGB", (width, height), "white")
        for cropped in (center_crop(white, size), fast_crop(white, size, white.size)):
            assert cropped.size == size[::-1]
            assert np.asarray(cropped).min() == 255  # nothing is filled up with black


def test_nothing_is_cut_off_where_the_aspect_agrees():
    pixels = np.asarray(noise(32, 48)).astype(int)
    means = pixels.reshape(24, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(noise(32, 48), TALL)) - means).max() <= 1
    assert center_crop(image := noise(16, 24), TALL) is image


def test_only_the_side_that_is_too_long_is_cut():
    wide = np.asarray(center_crop(smooth(96, 24), TALL)).astype(int)  # the middle sixth of the width
    assert np.abs(wide - np.asarray(smooth(96, 24))[:, 40:56]).max() == 0
    tall = np.asarray(center_crop(smooth(32, 480), TALL)).astype(int)
    assert (tall[0, :, 1].mean(), tall[-1, :, 1].mean()) == pytest.approx((127.5 - 12.5, 127.5 + 12.5), abs=2)
    assert (tall[:, 0, 0].mean(), tall[:, -1, 0].mean()) == pytest.approx((4, 251), abs=4)


@pytest.mark.parametrize("size", [TALL, WIDE])
def test_a_turned_picture_has_the_turned_rectangle(size):
    for seed in range(10):
        image = noise(61 + 7 * seed, 83 - 5 * seed, seed)
        turned = center_crop(image.transpose(Image.Transpose.TRANSPOSE), size[::-1])
        pixels = np.asarray(turned).astype(int).transpose(1, 0, 2) - np.asarray(center_crop(image, size))
        assert np.abs(pixels).max() <= 2  # of rounding between the two axes


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [TALL, WIDE])
def test_the_fast_crop_is_close_also_of_what_the_camera_turned(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for width, height in ((700, 500), (301, 999), (90, 64)):
        smooth(width, height).save(tmp_path / "x.jpg", quality=95, exif=exif)
        exact, fast = (decode_image(str(tmp_path / "x.jpg"), size, fast=fast).astype(int) for fast in (False, True))
        assert exact.shape == (3, *size)
        assert np.abs(exact - fast).max() <= 12
        assert np.abs(exact - fast).mean() < 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(40 + number, 33 + 3 * number, number).save(path)
    return root


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_of_rectangles_holds_what_training_would_cut_out(folder, tmp_path, format, hf_cache):
    exactly = ("--quality", "100") if format == "webp" else ()
    index = prepare(folder, tmp_path / "store", "--img_size", "24", "16", "--format", format, *exactly)
    assert index["img_size"] == TALL
    assert json.loads((tmp_path / "store" / INDEX).read_text())["img_size"] == [24, 16]
    assert open_images(tmp_path / "store").img_size == TALL
    how = {"img_size": TALL, "batch_size": 12, "horizontal_flip": False}
    stored, direct = (next(jit.batches(open_images(path), **how)) for path in (tmp_path / "store", folder))
    assert stored.images.shape == direct.images.shape == (12, 3, 24, 16)
    assert stored.labels.bincount().tolist() == direct.labels.bincount().tolist()
    if format != "jpeg":
        both = ({image.numpy().tobytes() for image in batch.images} for batch in (stored, direct))
        assert next(both) == next(both)


def test_a_store_of_a_square_given_by_two_numbers_is_that_of_one(folder, tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    prepare(folder, one, "--img_size", "16")
    prepare(folder, two, "--img_size", "16", "16")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("format", ["uint8", "raw", "png"])
def test_a_store_serves_smaller_sizes_and_refuses_to_enlarge_a_side(folder, tmp_path, format, hf_cache):
    prepare(folder, tmp_path / "store", "--img_size", "24", "16", "--format", format)
    source = open_images(tmp_path / "store")
    for size in (16, 8, (12, 16), (24, 8)):
        batch = next(jit.batches(source, img_size=size, batch_size=4, horizontal_flip=False))
        assert tuple(batch.images.shape[2:]) == (size if isinstance(size, tuple) else (size, size))
    for size, given in ((24, "24"), ((16, 24), "16 24"), ((24, 17), "24 17")):
        with pytest.raises(UserError, match=f"^img_size {given}: .*prepared with 24x16 px.*or train at 24 16"):
            jit.batches(source, img_size=size, batch_size=4)


def test_a_stored_size_that_is_none_is_named(folder, tmp_path):
    prepare(folder, tmp_path / "store", "--img_size", "24", "16")
    path = tmp_path / "store" / INDEX
    for size in ([24], [24, 16, 3], [24, "x"], [24, -1], {}, 2.5):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"img_size": size}))
        with pytest.raises(UserError, match=r"is damaged .*prepare the images again"):
            read_index(path.parent)


def test_streams_and_folders_give_the_same_rectangles_and_resume(images, tmp_path, hf_cache):
    table = as_parquet(images, tmp_path / "table", 3)
    found = []
    for path in (images, table):
        loader = jit.batches(open_images(path), img_size=(28, 14), batch_size=11, horizontal_flip=False, seed=3)
        batches = [next(loader) for _ in range(4)]
        assert all(batch.images.shape == (11, 3, 28, 14) for batch in batches)
        found.append({image.numpy().tobytes() for batch in batches for image in batch.images})
    assert found[0] == found[1]
    again = jit.batches(open_images(table), img_size=(28, 14), batch_size=11, horizontal_flip=False, seed=3)
    next(again)
    state = again.state_dict()
    resumed = jit.batches(open_images(table), img_size=(28, 14), batch_size=11, horizontal_flip=False, seed=3)
    resumed.load_state_dict(state)
    assert torch.equal(next(resumed).images, batches[1].images)


@pytest.mark.parametrize("made_from", ["downscale:4", "grey", "blur:2", "noise:0.5", "mask:0.5", "jpeg:20"])
def test_conditions_of_rectangles_have_their_shape(images, made_from):
    batch = next(jit.batches(open_images(images), img_size=(28, 14), batch_size=4, condition_from=made_from))
    assert batch.condition.shape == (4, 1 if made_from == "grey" else 3, 28, 14)
    assert not torch.equal(batch.condition.expand_as(batch.images), batch.images)


def test_the_holdout_does_not_depend_on_the_size(images):
    held = [split_holdout(open_images(images), 0.2, max_images=99, img_size=size)[1] for size in (28, (28, 14))]
    assert held[1].images.shape[1:] == (3, 28, 14)
    assert torch.equal(held[0].labels, held[1].labels)
    assert torch.equal(held[0].images[..., 7:21], held[1].images)  # nothing is scaled, so that the middle is cut out


def test_sizes_that_are_none_are_refused(images):
    for size in ((28, 0), 0, (-1, 4)):
        with pytest.raises(UserError, match="img_size"):
            jit.batches(open_images(images), img_size=size, batch_size=4)
    with pytest.raises(ValueError, match="img_size 28 14 3: give the side of a square, or height and width"):
        jit.batches(open_images(images), img_size=(28, 14, 3), batch_size=4)


def test_numbered_folders_are_read_at_any_size(tmp_path):
    source = open_images(image_folder(tmp_path / "numbered", 6))
    assert next(jit.batches(source, img_size=(4, 12), batch_size=6)).images.shape == (6, 3, 4, 12)
