"""Losses of more than the predicted image: what they are of, and that they follow from positions."""

import numpy as np
import pytest
import torch

from jit_accel.model.batch_losses import Seen, contrastive, negatives
from jit_accel.model.spaces import SPACES, noised


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
