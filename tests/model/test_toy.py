"""The toy experiment is what it says: an orthogonal embedding, three predictions of one velocity, and x that wins."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jit_accel.model.objective import Objective
from jit_accel.model.spaces import SPACES, convert

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).parents[2] / "benchmarks" / "toy.py")
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

DIMENSIONS = [2, 8, 16, 512]


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_the_embedding_has_orthonormal_columns_and_depends_on_the_seed(dimensions):
    matrix = toy.embedding(dimensions, 0)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(2), atol=1e-6, rtol=0)
    assert torch.equal(matrix, toy.embedding(dimensions, 0))
    assert not torch.allclose(matrix, toy.embedding(dimensions, 1), atol=0.01)


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_exact_predictions_of_x_e_and_v_are_one_velocity_in_training_and_in_sampling(dimensions):
    x = toy.as_images(toy.spiral(0, np.arange(7)) @ toy.embedding(dimensions, 0).T)
    e = toy.noise(0, 0, 7, dimensions)
    t = torch.linspace(0.06, 0.94, 7)[:, None, None, None]
    z = t * x + (1 - t) * e
    truth = {"x": x, "e": e, "v": x - e}
    for space in SPACES:
        torch.testing.assert_close(convert(truth[space], z, t, space, "v"), x - e, atol=1e-4, rtol=1e-4)
        loss = Objective(prediction=space).losses(always(truth[space]), x, t.flatten(), e, None)
        assert (loss == 0).all()
        off = Objective(prediction=space).losses(always(truth[space] + 1), x, t.flatten(), e, None)
        slope = {"x": 1 / (1 - t), "e": 1 / t, "v": torch.ones_like(t)}[space]  # of the velocity by the prediction
        torch.testing.assert_close(off, slope.flatten() ** 2, atol=1e-3, rtol=1e-3)


def always(prediction):
    return lambda z, t, labels: SimpleNamespace(sample=prediction)


@pytest.mark.parametrize("prediction", SPACES)
def test_sampling_with_the_perfect_network_for_data_of_one_point_ends_on_that_point(prediction):
    point = toy.as_images(torch.tensor([[1.0, -2.0, 0.5]]))

    def perfect(z, t):
        space = torch.as_tensor(t)[:, None, None, None]
        return SimpleNamespace(sample=convert(point.expand_as(z), z, space, "x", prediction, t_eps=1e-6))

    samples = toy.sample(perfect, prediction, 3, seed=0, points=5)
    torch.testing.assert_close(samples, point.flatten(1).expand(5, 3), atol=1e-4, rtol=0)


def test_the_distances_are_those_of_points_moved_by_known_amounts():
    matrix = toy.embedding(16, 0)
    points = toy.spiral(3, np.arange(500))
    away = torch.zeros(16, 1)
    away[0] = 1
    away = away - matrix @ (matrix.T @ away)  # out of the plane
    moved = points @ matrix.T + 3 * (away / away.norm()).T
    assert toy.distance_from_spiral(points @ matrix.T, matrix, 1) < 0.001
    assert toy.distance_from_spiral(moved, matrix, 1) == pytest.approx(3, abs=1e-3)
    assert toy.sliced_wasserstein(points, points.flip(0)) == 0
    assert toy.sliced_wasserstein(points + torch.tensor([3.0, 4.0]), points) == pytest.approx(5 * 2 / np.pi, abs=0.01)


def test_in_512_dimensions_x_prediction_comes_near_the_spiral_and_e_and_v_do_not():
    matrix = toy.embedding(512, 0)
    distance = {}
    for prediction in SPACES:
        points = toy.sample(toy.train(prediction, matrix, 25, 0), prediction, 512, 0, points=128)
        distance[prediction] = toy.distance_from_spiral(points, matrix, 1)
    assert distance["x"] < 1
    assert min(distance["e"], distance["v"]) > 10 * distance["x"]
