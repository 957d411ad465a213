"""Pictures larger than the training's, seen through windows."""

from itertools import pairwise

import pytest
import torch
from test_conditions import build

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.model.tiles import TiledNetwork, starts


@pytest.mark.parametrize("overlap", [0, 3, 7])
@pytest.mark.parametrize("side", [8, 9, 15, 16, 17, 40])
def test_windows_cover_a_side_and_overlap_enough(side, overlap):
    found = starts(side, 8, overlap)
    assert (found[0], found[-1]) == (0, side - 8)
    assert all(8 - (b - a) >= overlap for a, b in pairwise(found))


@pytest.mark.parametrize(("tile", "overlap"), [(8, 3), ((8, 12), 3), ((12, 4), (5, 0)), ([20, 8], (0, 7))])
def test_what_looks_at_single_pixels_does_not_see_the_windows(tile, overlap):
    class Pixelwise:
        config = build().config

        def __call__(self, z, t, *, condition_image, class_labels, return_dict):
            return (z * 2 + condition_image * t[:, None, None, None] + class_labels[:, None, None, None],)

    z, condition, labels = torch.randn(2, 3, 20, 13), torch.randn(2, 3, 20, 13), torch.tensor([1, 5])
    given = {"condition_image": condition, "class_labels": labels, "return_dict": False}
    t = torch.tensor([0.25, 0.5])
    found = TiledNetwork(Pixelwise(), tile, overlap)(z, t, **given)[0]
    assert torch.allclose(found, Pixelwise()(z, t, **given)[0], atol=1e-5)


def test_pixels_near_the_edge_of_a_window_count_less():
    class Numbered:
        config = build().config

        def __call__(self, z, t, return_dict):
            return (torch.arange(len(z)).float()[:, None, None, None].expand_as(z),)

    (found,) = TiledNetwork(Numbered(), 8, 4)(torch.zeros(1, 1, 8, 12), torch.tensor(0.0))
    row = found[0, 0, 0]
    assert torch.equal(row[:4], torch.zeros(4))
    assert torch.equal(row[8:], torch.ones(4))
    assert (row[4:8].diff() > 0).all()


@pytest.fixture
def pipe():
    pipe = JiTPipeline(build(condition_channels=3), JiTScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, height, width, **how):
    picture = torch.linspace(0, 1, 3 * height * width).view(3, height, width)
    how = {"condition_image": picture, "guidance_scale": 2.0, "output_type": "pt", "num_inference_steps": 2} | how
    return pipe([0, 1], height=height, width=width, generator=torch.Generator().manual_seed(0), **how).images


def test_one_window_is_the_picture(pipe):
    assert torch.allclose(draw(pipe, 8, 8, tile=8, overlap=2), draw(pipe, 8, 8), atol=1e-6)


def test_one_rectangle_is_the_picture(pipe):
    assert torch.allclose(draw(pipe, 8, 12, tile=(8, 12)), draw(pipe, 8, 12), atol=1e-6)


def test_a_side_alone_is_that_of_a_square(pipe):
    assert torch.equal(draw(pipe, 16, 12, tile=(8, 8), overlap=(2, 2)), draw(pipe, 16, 12, tile=8))


@pytest.mark.parametrize(("tile", "overlap"), [(8, 4), ((12, 8), (4, 2))])
def test_windows_at_once_change_nothing(pipe, monkeypatch, tile, overlap):
    found = draw(pipe, 24, 16, tile=tile, overlap=overlap)
    assert found.shape == (2, 3, 24, 16)
    for count in (1, 3, 100):
        monkeypatch.setattr("jit_accel.model.tiles.WINDOWS_AT_ONCE", count)
        assert torch.allclose(draw(pipe, 24, 16, tile=tile, overlap=overlap), found, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tile": 6}, "tile 6 must be a multiple of the patch, 4, such as 8"),
        ({"tile": 8, "overlap": 8}, "overlap 8 must be at least 0 and below the tile, 8"),
        ({"tile": 24}, "tile 24 is larger than the picture, 24 x 16"),
        ({"overlap": 4}, "overlap without tile"),
        ({"tile": 8.5}, "tile 8.5 must be a whole number"),
        ({"tile": (8, 6)}, "tile 8 6 must be a multiple of the patch, 4"),
        ({"tile": (8, 12), "overlap": (2, 12)}, "overlap 2 12 must be at least 0 and below the tile, 8 12"),
        ({"tile": (8, 8, 8)}, r"tile 8 8 8 must be a whole number of pixels, or \(height, width\)"),
        ({"tile": (8, 20)}, "tile 8 20 is larger than the picture, 24 x 16"),
    ],
)
def test_what_makes_no_windows_is_refused(pipe, how, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, 24, 16, **how)
