"""Losses of more than the predicted image: what they are of, and what they follow from."""

import numpy as np
import pytest
import torch

from jit_accel.model.aux_losses import AuxLosses, aux_losses_of
from jit_accel.model.batch_losses import Seen, contrastive, layersync, negatives, synced_blocks
from jit_accel.model.spaces import SPACES, noised
from jit_accel.model.transformer import JiTTransformer2DModel


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_negative_is_of_another_class_where_there_is_one_and_never_the_image_itself():
    labels, positions = torch.tensor([0, 0, 1, 0, 2, 1, 0]), np.arange(70, 77)
    found = negatives(labels, positions, seed=1)
    assert (labels[found] != labels).all()
    assert (negatives(torch.zeros(7, dtype=torch.int64), positions, 1) != torch.arange(7)).all()
    several = torch.tensor([[0, 1], [0, 1], [0, -1]])
    assert negatives(several, [1, 2, 3], 0)[:2].tolist() == [2, 2]
    assert negatives(labels[:1], positions[:1], 1).tolist() == [0]


def test_negatives_follow_from_seed_and_positions_in_whatever_order_the_images_stand():
    labels, positions, order = torch.arange(16) % 3, np.arange(16) + 5, np.random.default_rng(0).permutation(16)
    found = positions[negatives(labels, positions, 4)]
    assert np.array_equal(positions[order][negatives(labels[order], positions[order], 4)], found[order])
    assert not np.array_equal(positions[negatives(labels, positions, 5)], found)
    assert len(set(found)) > 6


@pytest.mark.parametrize("prediction", SPACES)
def test_it_is_minus_the_error_against_the_velocity_of_the_other(prediction):
    x, e, t = drawn(3, 3, 4, 4).clamp(-1, 1), drawn(3, 3, 4, 4, seed=1), torch.tensor([0.1, 0.5, 0.9])
    truth = {"x": x, "e": e, "v": x - e}[prediction]
    labels, positions = torch.tensor([0, 1, 0]), [3, 4, 5]
    found = contrastive(Seen(truth, prediction, noised(x, e, t), t, 0.05, x, labels, positions, 7))
    v = x - e
    expected = -(v - v[negatives(labels, positions, 7)]).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_image_alone_has_no_negative():
    x = drawn(1, 3, 4, 4)
    assert contrastive(Seen(x, "v", x, torch.tensor([0.5]), 0.05, x, torch.tensor([0]), [0], 0)).tolist() == [0]


def test_what_is_least_lies_away_from_the_mean():
    """Of images whose velocities are u1 and u2 the least is at (u1 - w u2) / (1 - w)."""
    weight, x, e = 0.3, drawn(2, 1, 2, 2).double(), drawn(2, 1, 2, 2, seed=1).double()
    t = torch.full((2,), 0.5, dtype=torch.float64)
    v, z = x - e, noised(x, e, t)
    predicted = ((v - weight * v.flip(0)) / (1 - weight)).requires_grad_()
    seen = Seen(predicted, "v", z, t, 0.05, x, torch.tensor([0, 1]), [0, 1], 0)
    ((predicted - v).square().mean((1, 2, 3)) + weight * contrastive(seen)).sum().backward()
    assert predicted.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("depth", "blocks"), [(2, (0, 1)), (6, (0, 2)), (12, (2, 5)), (24, (5, 12)), (28, (7, 15))])
def test_the_synced_blocks_of_a_depth(depth, blocks):
    assert synced_blocks(depth) == blocks


def test_layersync_draws_the_early_tokens_alone_and_is_least_where_they_point_the_same_way():
    early, late = drawn(2, 5, 4).requires_grad_(), drawn(2, 5, 4, seed=1).requires_grad_()
    x, t = drawn(2, 1, 1, 1), torch.ones(2)
    found = layersync(Seen(x, "x", x, t, 0.05, x, tokens=(early, late)))
    assert torch.allclose(found, 1 - torch.nn.functional.normalize(early, dim=-1).mul(
        torch.nn.functional.normalize(late, dim=-1)).sum(-1).mean(1))  # fmt: skip
    found.sum().backward()
    assert late.grad is None
    assert early.grad.abs().max() > 0
    assert layersync(Seen(x, "x", x, t, 0.05, x, tokens=(late * 3, late))).abs().max() < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("start", [0, 1])
def test_tokens_are_kept_for_one_call_and_their_gradient_ends_at_the_early_block(checkpointing, start):
    torch.manual_seed(0)
    network = JiTTransformer2DModel(8, 2, 16, 4, 2, 8, in_context_len=3, in_context_start=start, num_classes=2)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    if checkpointing:
        network.enable_gradient_checkpointing()
    aux, found = AuxLosses(aux_losses_of(["layersync=0.5"]), network=network), {}
    x, t, labels = drawn(2, 3, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([0, 1])
    plain = network(x, t, labels).sample
    model = aux.watched(network, 1)
    assert torch.equal(model(x, t, labels).sample, plain)
    assert [tokens.shape for tokens in network.tokens_after.values()] == [(2, 16, 16)] * 2
    aux.added_to(torch.zeros(()), x, found.__setitem__, labels, [0, 1]).backward()
    assert 0 < found["layersync"] < 2
    assert [block.mlp.w3.weight.grad is not None for block in network.blocks] == [True, False, False, False]
    network(x, t, labels)
    assert network.tokens_after == {}
