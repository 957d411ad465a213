"""Images by number: nothing but the seed and the number decides what an image looks like."""

import pytest
import torch
from golden import load_golden

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.model.generation import SamplerSettings, generate, generate_batches, number_of, share_of

CLASSES = 10
SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=2.0)


def images_by_number(numbers, **options) -> dict[int, torch.Tensor]:
    pipe = JiTPipeline(load_golden("tiny").model(), JiTScheduler())
    pipe.set_progress_bar_config(disable=True)
    parts = generate_batches(pipe, numbers, settings=SETTINGS, **options)
    return {number: image for part, images in parts for number, image in zip(part, images)}


def almost_equal(one, other) -> bool:
    """Up to the rounding to uint8 of what floats in another batch come to."""
    return (one.int() - other.int()).abs().max() <= 1


def test_an_image_depends_on_seed_and_number_alone():
    whole = images_by_number(range(12))
    for numbers, batch_size in ((range(12), 5), ([11, 3, 7], 2), ([3], 1)):
        for number, image in images_by_number(numbers, batch_size=batch_size).items():
            assert almost_equal(image, whole[number]), number
    assert not almost_equal(images_by_number([3], seed=1)[3], whole[3])
    assert not almost_equal(whole[1], whole[11])  # one class, two images


def test_the_label_of_a_number_goes_round_the_classes():
    assert [number_of(label, index, CLASSES) for index in range(2) for label in range(CLASSES)] == list(range(20))
    given = images_by_number([13], labels=[3])
    assert almost_equal(given[13], images_by_number([13])[13])
    assert not almost_equal(images_by_number([13], labels=[None])[13], given[13])


def test_shares_of_the_processes_are_disjoint_whole_and_even():
    for world_size in (1, 2, 3, 8):
        shares = [list(share_of(range(20), rank, world_size)) for rank in range(world_size)]
        assert sorted(number for share in shares for number in share) == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_images_are_had_in_one_call():
    pipe = JiTPipeline(load_golden("tiny").model(), JiTScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, [7, 2, 5], batch_size=2, num_inference_steps=3, guidance_scale=2.0)
    assert images.dtype == torch.uint8
    expected = images_by_number(range(12))
    assert all(almost_equal(image, expected[number]) for number, image in zip((7, 2, 5), images, strict=True))
    with pytest.raises(ValueError, match="numbers is empty"):
        generate(pipe, [])
