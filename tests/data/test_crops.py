"""Crops at random places: a function of (seed, position) alone, whatever reads the images; the centre is as before."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import as_parquet
from PIL import Image
from prepare_samples import prepare

import jit_accel as jit
from jit_accel.base.errors import UserError
from jit_accel.data.batches import order
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.formats.source import source_of
from jit_accel.data.formats.sources import open_images
from jit_accel.data.reading.crop import center_crop, has_room
from jit_accel.data.reading.images import SomeImages

SIDE, LONG, COUNT = 4, 12, 12
ROOM = LONG - SIDE
HOW = {"img_size": SIDE, "seed": 5, "horizontal_flip": False}


def ruler(number: int, *, is_tall: bool = False, scale: int = 1) -> Image.Image:
    """A picture that is as high as the images and three times as long; each pixel tells its place, and the picture."""
    pixels = np.zeros((SIDE, LONG, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(LONG) * 10, number
    pixels = pixels.transpose(1, 0, 2) if is_tall else pixels
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


@pytest.fixture(scope="module")
def rulers(tmp_path_factory):
    root = tmp_path_factory.mktemp("crops") / "rulers"
    for number in range(COUNT):
        path = root / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ruler(number, is_tall=number % 3 == 0).save(path)
    return root


def in_bytes(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().numpy().astype(int)


def places(batch) -> list[int]:
    """Where each image of a batch begins in its picture."""
    return (in_bytes(batch.images)[:, 0, 0, 0] // 10).tolist()


def expected(positions, seed: int = HOW["seed"]) -> list[int]:
    return [int(at * (ROOM + 1)) for at in order.anywhere(seed, positions)]


def taken(source, count: int, **how) -> list:
    loader = jit.batches(source, **HOW | {"crop": "random", "batch_size": COUNT // 2} | how)
    found = [next(loader) for _ in range(count)]
    loader.close()
    return found


@pytest.fixture(params=["folder", "parquet", "random access to parquet"])
def source(request, rulers, tmp_path, hf_cache):
    if request.param == "folder":
        return open_images(rulers)
    return open_images(as_parquet(rulers, tmp_path / "table", 3), streaming=request.param == "parquet" or False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_crop_follows_from_seed_and_position_alone(source, num_workers):
    batches = taken(source, 6, num_workers=num_workers)
    for batch in batches:
        assert places(batch) == expected(batch.positions)
    halves = [taken(source, 6, batch_size=COUNT // 4, rank=rank, world_size=2) for rank in range(2)]
    by_position = {}
    for batch in (batch for half in halves for batch in half):
        assert places(batch) == expected(batch.positions)
        by_position |= dict(zip(batch.positions.tolist(), in_bytes(batch.images)))
    assert len(by_position) == 6 * (COUNT // 2)
    if not source.streaming:  # of a stream the lanes depend on the number of processes, unless given
        for batch in batches:
            assert np.array_equal(in_bytes(batch.images), [by_position[p] for p in batch.positions.tolist()])


def test_each_epoch_cuts_elsewhere_also_of_images_that_could_be_kept(source):
    seen = {}
    for batch in taken(source, 40):
        for number, place in zip(in_bytes(batch.images)[:, 1, 0, 0].tolist(), places(batch)):
            seen.setdefault(number, set()).add(place)
    assert len(seen) == COUNT
    assert all(len(found) > 3 for found in seen.values())
    assert set.union(*seen.values()) == set(range(ROOM + 1))


def test_a_resumed_run_cuts_as_the_uninterrupted_one(source):
    whole = taken(source, 5, lanes=3)
    first = jit.batches(source, **HOW, crop="random", batch_size=COUNT // 2, lanes=3)
    next(first), next(first)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = [jit.batches(source, **HOW, crop="random", batch_size=3, rank=r, world_size=2) for r in range(2)]
    for loader in resumed:
        loader.load_state_dict(state)
    for batch in whole[2:]:
        parts = [next(loader) for loader in resumed]
        images = {p: image for part in parts for p, image in zip(part.positions.tolist(), part.images)}
        assert all(torch.equal(image, images[p]) for p, image in zip(batch.positions.tolist(), batch.images))


def test_the_centre_is_as_before(source):
    unsaid, center = (next(jit.batches(source, **HOW | how, batch_size=COUNT)) for how in ({}, {"crop": "center"}))
    assert torch.equal(unsaid.images, center.images)
    assert places(center) == [ROOM // 2] * COUNT
    assert np.array_equal(unsaid.positions, taken(source, 1, batch_size=COUNT)[0].positions)
    at_random = in_bytes(taken(source, 1, batch_size=COUNT)[0].images)
    assert np.array_equal(at_random[:, 1], in_bytes(unsaid.images)[:, 1])  # the order is the same


def test_another_image_for_a_broken_one_is_cut_at_its_place(rulers, tmp_path, hf_cache):
    table = as_parquet(rulers, tmp_path / "table", 3)
    for number in range(0, COUNT, 2):
        path = tmp_path / "folder" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"damaged")
        ruler(number + 1).save(path.with_name(f"{number + 1:02d}.png"))
    for path in (tmp_path / "folder", table):
        batch = taken(open_images(path), 1, batch_size=COUNT)[0]
        assert places(batch) == expected(batch.positions)
        assert len(batch.bad_images) == (0 if path == table else COUNT // 2)


@pytest.mark.parametrize("stored", [None, "uint8", "raw", "png"])
def test_a_condition_has_the_crop_of_its_image(tmp_path, stored, hf_cache):
    for number in range(COUNT):
        for name, scale in (("images", 2), ("conditions", 1)):
            (tmp_path / name).mkdir(exist_ok=True)
            ruler(number, is_tall=not stored and number % 2 == 0, scale=scale).save(tmp_path / name / f"{number}.png")
    conditions = str(tmp_path / "conditions")
    if stored:
        flags = "--img_size", str(SIDE), str(LONG), "--format", stored, "--condition_path", conditions
        prepare(tmp_path / "images", tmp_path / "store", *flags)
        source = open_images(tmp_path / "store")
    else:
        source = open_images(tmp_path / "images", condition_path=conditions)
    batch = taken(source, 1, batch_size=COUNT)[0]
    assert torch.equal(batch.images, batch.condition)
    assert places(batch) == expected(batch.positions)


def test_arrays_are_cut_in_all_channels_alike(tmp_path):
    numbers = np.arange(LONG, dtype=np.float32)[None, :, None] + np.zeros((SIDE, LONG, 5), np.float32)
    for number in range(COUNT):
        np.save(tmp_path / f"{number}.npy", numbers)
    source = open_images(tmp_path, in_channels=5, value_range=(0.0, 255.0))
    batch = taken(source, 1, batch_size=COUNT)[0]
    for channel in in_bytes(batch.images).swapaxes(0, 1):
        assert channel[:, 0, 0].tolist() == expected(batch.positions)


def test_the_holdout_is_the_centre(rulers):
    _, held = split_holdout(open_images(rulers), 0.5, max_images=99, img_size=SIDE)
    assert len(held.images)
    assert (held.images[:, 0, 0, 0] // 10 == ROOM // 2).all()


@pytest.mark.parametrize("format", ["uint8", "raw", "png"])
def test_of_a_store_longer_images_are_cut_at_random_and_others_refused(rulers, tmp_path, format, hf_cache):
    store = tmp_path / "store"
    prepare(rulers, store, "--img_size", str(SIDE), str(2 * SIDE), "--format", format)
    source = open_images(store)
    found = [place for batch in taken(source, 4) for place in places(batch)]
    assert len(set(found)) > 2
    assert all(taken(source, 1, crop="center", img_size=(SIDE, 2 * SIDE)))
    for size, given, longer in (((SIDE, 2 * SIDE), "4 8", "4 12"), ((2, 4), "2 4", "2 6")):
        message = f"crop random: .*prepared with 4x8 px, of which --img_size {given} cuts nothing off.*{longer}, or"
        with pytest.raises(UserError, match=message):
            jit.batches(source, img_size=size, batch_size=2, crop="random")


class OldImages:
    """Images of one's own that know of no crops."""

    is_encoded, is_labelled = False, True

    def __len__(self):
        return 4

    def read(self, indices, out):
        out[:] = 7
        return np.zeros(len(indices), np.int64), {}


def test_images_of_ones_own_need_to_know_of_crops_at_random_places_alone():
    source = source_of("mine", "memory", OldImages(), ("one",), "mine")
    for images in (source, replace(source, images=SomeImages(source.images, np.arange(3)), num_images=3)):
        assert (in_bytes(next(jit.batches(images, img_size=SIDE, batch_size=2)).images) == 7).all()
        with pytest.raises(UserError, match=r"crop random: the `read` of mine takes no places .* use --crop center"):
            jit.batches(images, img_size=SIDE, batch_size=2, crop="random")


def test_an_unknown_crop_is_answered_with_the_choices(rulers):
    with pytest.raises(UserError, match=r"crop randon: unknown; choose from center, random\. Did you mean 'random'\?"):
        jit.batches(open_images(rulers), img_size=SIDE, batch_size=2, crop="randon")


@pytest.mark.parametrize(("width", "height"), [(61, 20), (20, 61), (300, 9), (9, 300), (64, 64), (500, 3)])
def test_the_crops_of_a_picture_lie_between_its_ends(width, height):
    """Of a smooth picture: the mean of what is cut out is where it lies."""
    side = 8
    long = np.linspace(0, 255, max(width, height)).round().astype(np.uint8)
    pixels = np.broadcast_to(long if width >= height else long[:, None], (height, width))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    means = [np.asarray(center_crop(image, side, at)).mean() for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    middle = np.asarray(center_crop(image, side)).mean()
    half = 127.5 * min(width, height) / max(width, height)
    wanted = np.linspace(half, 255 - half, 5)
    assert means == pytest.approx(wanted.tolist(), abs=255 / max(8, max(width, height) * 8 // min(width, height)) + 2)
    assert middle == pytest.approx(127.5, abs=2)
    assert has_room((height, width), side) == (width != height)
