"""Augmentation: what it does to images, what it says of that, and what it follows from."""

import numpy as np
import pytest
import torch

from jit_accel.config.presets import AUGMENT_SIZE
from jit_accel.data.batches.augmentation import Augmentation, moved, told
from jit_accel.data.batches.batch import Batch

MANY = np.arange(4000) + 123
NONE = np.zeros((1, 8))


def drawn_of(**columns):
    names = ("mirrored", "upside_down", "scale", "angle", "stretch", "axis", "x", "y")
    drawn = np.zeros((1, len(names)))
    for name, value in columns.items():
        drawn[0, names.index(name)] = value
    return drawn


def batch_of(positions, height=8, width=8):
    images = torch.rand(len(positions), 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, torch.zeros(len(positions), dtype=torch.int64), positions, [], None, None)


def test_it_follows_from_seed_and_position_alone():
    batch = batch_of(MANY[:64])
    whole = Augmentation(0.5, 3)(batch)
    part = Augmentation(0.5, 3)(Batch(batch.images[10:20], batch.labels[10:20], MANY[10:20], [], None, None))
    assert torch.equal(whole.augmentation[10:20], part.augmentation)
    assert torch.allclose(whole.images[10:20], part.images, atol=1e-5)
    other = Augmentation(0.5, 4)(batch)
    assert not torch.equal(whole.augmentation, other.augmentation)
    assert whole.augmentation.shape == (64, AUGMENT_SIZE)
    assert whole.images.abs().max() <= 1


def test_images_are_as_they_were_where_the_network_is_told_nothing():
    batch = batch_of(MANY[:256])
    before, found = batch.images.clone(), Augmentation(0.1, 0)(batch)
    assert torch.equal(batch.images, before)
    is_told = found.augmentation.any(1)
    assert torch.equal(found.images[~is_told], before[~is_told])
    assert (found.images != before)[is_told].flatten(1).any(1).all()
    assert 0.2 < (~is_told).float().mean() < 0.5  # half are mirrored


def test_each_kind_is_as_frequent_and_as_strong_as_asked_for():
    drawn = Augmentation(0.2, 0).drawn(MANY)
    mirrored, upside_down, scale, angle, stretch, _, x, y = drawn.T
    shares = [np.mean(column != 0) for column in (mirrored, upside_down, scale, angle, stretch, x, y)]
    assert shares == pytest.approx([0.5, 0.1, *[0.2] * 5], abs=0.03)
    deviations = [column[column != 0].std() for column in (scale, stretch, x, y)]
    assert deviations == pytest.approx([0.2, 0.2, 0.125, 0.125], rel=0.1)
    assert np.abs(angle).max() <= np.pi


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_known_movements(size):
    images = batch_of([0], *size).images
    assert torch.allclose(moved(images, NONE), images, atol=1e-5)
    half = moved(images, drawn_of(angle=np.pi))
    assert torch.allclose(half, images.flip(-1, -2), atol=1e-5)
    shifted = moved(images, drawn_of(x=2 / size[1], y=1 / size[0]))
    assert torch.allclose(shifted[..., 1:, 2:], images[..., :-1, :-2], atol=1e-5)
    if size[0] == size[1]:  # from x towards y, which points down
        quarter = moved(images, drawn_of(angle=np.pi / 2))
        assert torch.allclose(quarter, images.rot90(-1, (-2, -1)), atol=1e-5)


def test_scaling_and_stretching_are_about_the_middle():
    spot = torch.full((1, 1, 32, 32), -1.0)
    spot[..., 12:20, 12:20] = 1.0

    def sides(**how):
        is_lit = moved(spot, drawn_of(**how))[0, 0, 8:24, 8:24] > 0  # beyond are mirror images
        return int(is_lit.any(0).sum()), int(is_lit.any(1).sum())

    assert sides() == (8, 8)
    assert sides(scale=1.0) == (16, 16)
    assert sides(stretch=1.0) == (16, 4)
    assert sides(stretch=1.0, axis=np.pi / 2) == (4, 16)


def test_what_is_told():
    drawn = drawn_of(mirrored=1, upside_down=1, scale=0.3, angle=np.pi / 2, stretch=0.5, axis=np.pi, x=0.1, y=-0.2)
    assert told(drawn)[0].tolist() == pytest.approx([1, 1, 0.3, -1, 1, -0.5, 0, 0.1, -0.2], abs=1e-6)
    assert told(NONE).tolist() == [[0.0] * AUGMENT_SIZE]
