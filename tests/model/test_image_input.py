import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import count_calls, make_pipe, seeded

from jit_accel.model.picture_arguments import repaint_mask, start_images
from jit_accel.model.solvers import SOLVERS

METHODS = pytest.mark.parametrize("method", SOLVERS)


@pytest.fixture
def pipe():
    return make_pipe(guidance_scale=2.0, noise_scale=2.0)


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=seeded(9))


def draw(pipe, **settings) -> torch.Tensor:
    settings = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"} | settings
    return pipe([0, 8], **settings).images


@METHODS
def test_strength_1_forgets_the_image(pipe, picture, method):
    assert torch.equal(draw(pipe, image=picture, strength=1, method=method), draw(pipe, method=method))


def test_strength_is_the_share_of_the_steps_that_is_run(pipe, picture):
    calls, shown = count_calls(pipe), []
    pipe.set_progress_bar_config(disable=True)
    note = lambda p, step, t, kwargs: shown.append(step)  # noqa: E731
    draw(pipe, image=picture, strength=0.5, callback_on_step_end=note)
    assert [t for t, _ in calls] == [0.5, 0.75, 0.75]
    assert shown == [0, 1]
    for strength, first in ((0.01, 0.75), (0.29 / 0.58, 0.5), (0.75, 0.25)):
        calls.clear()
        draw(pipe, image=picture, strength=strength, method="euler")
        assert calls[0][0] == first


def test_a_start_is_the_image_noised_to_its_t(pipe, picture):
    """The network is shown t x + (1 - t) e, with the noise of the seed at the scheduler's scale."""
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:2]))
    draw(pipe, image=picture, strength=0.25, guidance_scale=1.0)
    noise = pipe.prepare_latents(2, seeded(), None, None, None)
    assert torch.allclose(seen[0], 0.75 * (2 * picture - 1) + 0.25 * noise, atol=1e-6)
    seen.clear()
    draw(pipe, image=picture, strength=0.25, guidance_scale=1.0, generator=None, latents=noise)
    assert torch.allclose(seen[0], 0.75 * (2 * picture - 1) + 0.25 * noise, atol=1e-6)


@METHODS
def test_an_all_black_mask_gives_the_image_back(pipe, picture, method):
    black = torch.zeros(16, 16)
    kept = draw(pipe, image=picture, mask_image=black, strength=1.0, method=method, output_type="pt")
    assert torch.allclose(kept, picture, atol=1e-6)


@METHODS
def test_an_all_white_mask_changes_nothing(pipe, picture, method):
    settings = {"image": picture, "strength": 0.75, "method": method}
    assert torch.equal(draw(pipe, mask_image=torch.ones(16, 16), **settings), draw(pipe, **settings))


@METHODS
def test_the_network_sees_the_kept_region_on_its_path_at_every_call(pipe, picture, method):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append((args[1].item(), args[0][:2])))
    out = draw(pipe, image=picture, mask_image=mask, strength=0.75, method=method)
    noise = pipe.prepare_latents(2, seeded(), None, None, None)
    assert [round(t, 2) for t, _ in seen] == ([0.25, 0.5, 0.5, 0.75, 0.75] if method == "heun" else [0.25, 0.5, 0.75])
    for t, z in seen:
        expected = t * (2 * picture - 1) + (1 - t) * noise
        assert torch.allclose(z[..., 8:], expected[..., 8:], atol=1e-5)
    assert torch.equal(out[..., 8:], (2 * picture - 1)[..., 8:])
    assert not torch.allclose(out[..., :8], (2 * picture - 1)[..., :8], atol=0.1)


def test_all_kinds_of_images_are_one():
    array = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    kinds = [
        Image.fromarray(array),
        array,
        array[None],
        array.astype(np.float32) / 255,
        torch.from_numpy(array).permute(2, 0, 1),
        torch.from_numpy(array).permute(2, 0, 1)[None].double() / 255,
        [Image.fromarray(array)] * 2,
        [torch.from_numpy(array).permute(2, 0, 1)] * 2,
        Image.fromarray(array).convert("RGBA"),
    ]
    for kind in kinds:
        out = start_images(kind, (8, 12), 2)
        assert out.shape == (2, 3, 8, 12)
        assert torch.allclose(out, expected.expand(2, -1, -1, -1), atol=1e-6)
    grey = start_images(Image.fromarray(array).convert("L"), (8, 12), 1)
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_another_size_is_cut_around_the_middle_and_resampled():
    wide = torch.zeros(3, 20, 60)
    wide[:, :, 20:40] = 1  # the square in the middle is white
    assert torch.allclose(start_images(wide, (10, 10), 1), torch.ones(1, 3, 10, 10), atol=0.1)
    assert start_images(wide, (10, 30), 1).mean() < 0


def test_masks_are_black_or_white():
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 200
    expected = torch.arange(8).expand(2, 1, 8, 8) >= 4
    for kind in (
        Image.fromarray(mask),
        mask,
        mask[..., None],
        torch.from_numpy(mask) / 255,
        torch.from_numpy(mask)[None],
    ):
        assert torch.equal(repaint_mask(kind, (8, 8), 2), expected)
    one_each = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])[:, None]
    assert repaint_mask(one_each, (8, 8), 2).flatten(1).all(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5}, "strength without image"),
        ({"mask_image": torch.ones(16, 16)}, "mask_image without image"),
        ({"image": torch.rand(3, 16, 16), "strength": 0}, "above 0"),
        ({"image": torch.rand(3, 16, 16), "strength": 1.5}, "at most 1"),
        ({"image": torch.rand(3, 16, 16) * 2 - 1}, "floats from 0 to 1"),
        ({"image": torch.full((3, 16, 16), float("nan"))}, "floats from 0 to 1"),
        ({"image": torch.rand(5, 16, 16)}, "has the shape"),
        ({"image": np.zeros((16, 16, 4), np.uint8)}, "alpha channel: give it as RGB"),
        ({"image": Image.fromarray(np.full((16, 16), 40000, np.uint16))}, "has the mode I;16: give 8 bits a channel"),
        ({"image": torch.rand(3, 16, 16), "mask_image": np.zeros((16, 16, 4), np.uint8)}, "black and white"),
        ({"image": torch.rand(3, 3, 16, 16)}, "3 pictures as image for 2 images"),
        ({"image": "cat.png"}, "image of str"),
        ({"image": []}, "0 pictures"),
    ],
)
def test_an_image_that_does_not_fit_is_told(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **settings)
