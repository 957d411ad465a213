"""Networks of rectangles: positions, sizes, and the same network as before for squares."""

import pytest
import torch
from diffusers import DiffusionPipeline

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.config.presets import forward_macs, plain_size, sides_of, sizes_near, usual_noise_scale
from jit_accel.model.functional import position_table, rope_table

CPU = torch.device("cpu")
SIZES = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "bottleneck_dim": 8, "num_classes": 3}
SIZES |= {"in_context_len": 2, "in_context_start": 1}


def network(size, **others) -> JiTTransformer2DModel:
    torch.manual_seed(0)
    model = JiTTransformer2DModel(size, **SIZES, **others)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def outputs(model, height, width, seed=0):
    z = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(z, 0.3, torch.tensor([0, 2])).sample


def test_a_square_by_two_numbers_is_the_one_by_one():
    one, two, written = network(16), network((16, 16)), network([16, 16])
    for size in ((16, 16), (8, 24)):
        assert torch.equal(outputs(one, *size), outputs(two, *size))
        assert torch.equal(outputs(one, *size), outputs(written, *size))
    assert torch.equal(position_table(32, (3, 5), 4, CPU), position_table(32, (3, 5), (4, 4), CPU))


def test_each_axis_has_its_own_positions():
    tall = position_table(32, (6, 3), (6, 3), CPU).reshape(6, 3, 32)
    square = position_table(32, (6, 6), 6, CPU).reshape(6, 6, 32)
    assert torch.equal(tall, square[:, :3])  # its own size: whole numbers, nothing is spread
    twice = position_table(32, (12, 6), (6, 3), CPU).reshape(12, 6, 32)
    assert torch.equal(twice[::2, ::2], tall)
    cos, sin = rope_table(16, (6, 3), (6, 3), 2, CPU)
    of_square = rope_table(16, (6, 6), 6, 2, CPU)
    for table, wide in zip((cos, sin), of_square):
        assert torch.equal(table[:2], wide[:2])
        assert torch.equal(table[2:].reshape(6, 3, -1), wide[2:].reshape(6, 6, -1)[:, :3])


def test_what_a_rectangle_is_spread_over_matters():
    rectangle, square = network((16, 8)), network(16)
    square.load_state_dict(rectangle.state_dict())
    assert torch.equal(outputs(rectangle, 16, 16), outputs(network((16, 8)), 16, 16))
    assert not torch.allclose(outputs(rectangle, 16, 8), outputs(square, 16, 8))


@pytest.mark.parametrize("inject", ["add", "tokens"])
def test_conditions_go_with_rectangles(inject):
    model = network((16, 8), condition_channels=3, condition_inject=inject)
    z, shown = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 16, 8)
    with torch.no_grad():
        found, other = (model(z, 0.3, None, condition_image=picture).sample for picture in (shown, -shown))
    assert found.shape == z.shape
    assert not torch.equal(found, other)


def test_carried_code_draws_the_same_rectangle(tmp_path):
    pipe = JiTPipeline(network((8, 16)), JiTScheduler())
    pipe.save_pretrained(tmp_path)
    carried = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    loaded = JiTPipeline.from_pretrained(tmp_path)
    assert list(loaded.transformer.config.img_size) == [8, 16]
    how = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = []
    for each in (pipe, carried, loaded):
        each.set_progress_bar_config(disable=True)
        drawn.append(each([0, 1], generator=torch.Generator().manual_seed(3), **how).images)
    assert drawn[0].shape == (2, 3, 8, 16)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    tiled = pipe(0, height=16, width=32, tile=8, **how).images
    assert tiled.shape == (1, 3, 16, 32)


def test_sizes_in_their_forms():
    assert sides_of(8) == sides_of((8, 8)) == sides_of([8, 8]) == (8, 8)
    assert (plain_size([8, 8]), plain_size([8, 4]), plain_size(8)) == (8, (8, 4), 8)
    assert [usual_noise_scale(size) for size in (64, 256, 300, (300, 300))] == [1.0, 1.0, 300 / 256, 300 / 256]
    assert usual_noise_scale((256, 1024)) == 2.0
    for size in (64, (64, 96), (16, 16)):
        assert sizes_near(size, 16) is None
    assert sizes_near((17, 16), 16) == "16 16 or 32 16"


def test_work_is_counted_by_the_patches():
    config = network(16).config
    assert forward_macs(config, 4, 8, 32) == forward_macs(config, 4, 16, 16)
