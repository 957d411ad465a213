"""Intervals of distances: they hold what other draws of as many images give on average, as often as they say."""

import math

import pytest
import torch

from jit_accel.evaluate.moments import Gaussian, Moments
from jit_accel.evaluate.statistics import frechet_distance
from jit_accel.evaluate.uncertainty import (
    GROUPS,
    T_QUANTILE,
    groups_of,
    jackknife,
    kernel_distances,
)

DRAWS = 150


def draw(count: int, size: int, seed: int, scale: float = 1.2, shift: float = 0.3) -> torch.Tensor:
    """Return features of a Gaussian whose deviations fall from 1, float64 (count, size)."""
    deviations = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
    noise = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (noise * scale + shift) * deviations


def exact_reference(size: int) -> Gaussian:
    variances = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    return Gaussian(torch.zeros(size, dtype=torch.float64), variances.diag())


def grouped(features: torch.Tensor) -> Moments:
    moments = Moments(features.shape[1], groups=GROUPS)
    moments.add(features, groups_of(len(features), 1))
    return moments


# Far more images than features, hardly more, fewer, and a model that is perfect, where the distance is all bias.
@pytest.mark.parametrize(
    ("count", "size", "scale", "shift"),
    [(300, 6, 1.2, 0.3), (40, 24, 1.2, 0.3), (24, 40, 1.2, 0.3), (300, 6, 1.0, 0.0)],
)
def test_of_100_intervals_about_95_hold_the_mean_distance_of_as_many_images(count, size, scale, shift):
    reference, found = exact_reference(size), []
    for seed in range(DRAWS):
        moments = grouped(draw(count, size, seed, scale, shift))
        value = frechet_distance(moments.gaussian(), reference)
        without_each = [frechet_distance(one, reference) for one in moments.without_each()]
        ends = jackknife("fd", value, without_each, moments.counts, least=0)
        found.append((value, ends["fd_low"], ends["fd_high"]))
    check(found, 2 if shift == 0 else 1.4)


def check(found: list[tuple[float, float, float]], most: float) -> None:
    """The intervals (value, low, high) of many draws hold the mean, and are hardly wider than the noise asks for."""
    values, lows, highs = torch.tensor(found, dtype=torch.float64).T
    held = ((lows <= values.mean()) & (values.mean() <= highs)).double().mean()
    assert held >= 0.89  # of 150 draws of 95 % fewer come once in two thousand
    half = float((highs - values).square().mean().sqrt() / values.std())
    assert 0.8 * T_QUANTILE < half < most * T_QUANTILE


def test_what_is_left_without_a_group_is_the_gaussian_of_the_others():
    features, groups = draw(45, 5, 0), groups_of(45)
    moments = Moments(5, groups=GROUPS)
    for part in torch.arange(45).split(7):
        moments.add(features[part], groups[part])
    whole = moments.gaussian()
    assert torch.allclose(whole.covariance, features.T.cov())
    for group, left in enumerate(moments.without_each()):
        others = features[groups != group]
        assert torch.allclose(left.mean, others.mean(0))
        assert torch.allclose(left.covariance, others.T.cov())


@pytest.mark.parametrize("in_turn", [10, None])
def test_groups_are_of_equal_size_and_hold_all_classes(in_turn):
    groups, numbers = groups_of(200, in_turn), torch.arange(200)
    assert groups.bincount().tolist() == [20] * GROUPS
    labels = numbers % 10 if in_turn else numbers // 100
    assert all(len(labels[groups == group].unique()) == len(labels.unique()) for group in range(GROUPS))
    assert groups_of(19, in_turn) is None


def test_groups_of_few_rounds_of_the_classes_hold_classes_of_all_kinds():
    """Of 1,000 classes, those of a kind side by side, as in ImageNet."""
    groups = groups_of(5000, 1000)
    assert groups.bincount().tolist() == [500] * GROUPS
    for group in range(GROUPS):
        labels = torch.arange(5000)[groups == group] % 1000
        assert len(labels.unique()) == 500
        assert (labels // 100).bincount().tolist() == [50] * 10


def test_kernel_distances_without_a_group_are_those_of_the_other_images():
    features, real = draw(60, 5, 0).float(), draw(50, 5, 1).float()
    groups = groups_of(60)

    def kernel(one, other):
        return ((one @ other.T).double() / 5 + 1) ** 3

    whole, found = kernel_distances(features, real, groups)
    inside = kernel(features, features)
    pairs = (inside.sum() - inside.trace()) / (60 * 59)
    assert whole == pytest.approx(float(pairs - 2 * kernel(features, real).mean()), rel=1e-5)
    for group in range(GROUPS):
        others = features[groups != group]
        inside = kernel(others, others)
        pairs = (inside.sum() - inside.trace()) / (len(others) * (len(others) - 1))
        assert found[group] == pytest.approx(float(pairs - 2 * kernel(others, real).mean()), rel=1e-5)


def test_intervals_of_kernel_distances_hold_the_mean_in_about_95_of_100_cases():
    real, found = draw(2000, 5, 10_000, 1, 0).float(), []
    inside = ((real @ real.T).double() / 5 + 1) ** 3
    constant = float((inside.sum() - inside.trace()) / (2000 * 1999))
    for seed in range(DRAWS):
        features = draw(200, 5, seed).float()
        groups = groups_of(200) if seed % 2 else groups_of(230)[:200]  # of equal size, or not
        whole, without_each = kernel_distances(features, real, groups)
        counts = groups.bincount(minlength=GROUPS).tolist()
        ends = jackknife("kd", whole + constant, without_each, counts, of_all=whole)
        found.append((whole + constant, ends["kd_low"], ends["kd_high"]))
    check(found, 1.4)


def test_of_what_is_not_finite_there_is_no_interval():
    assert jackknife("fd", math.nan, [1.0] * GROUPS, [5] * GROUPS) == {}
    assert jackknife("fd", 1.0, [math.inf] * GROUPS, [5] * GROUPS) == {}
    assert jackknife("fd", 1.0, [1.0] * GROUPS, [5] * 9 + [0]) == {}
    assert jackknife("fd", 0.1, [0.0, 1.0], [5, 5], least=0)["fd_low"] == 0


def test_of_a_mean_it_is_the_interval_of_the_groups_means_also_where_they_differ_in_size():
    values = torch.tensor([3.0, 4, 7, 1], dtype=torch.float64)
    without_each = [float(values[torch.arange(4) != group].mean()) for group in range(4)]
    half = jackknife("x", float(values.mean()), without_each, [1] * 4)["x_high"] - float(values.mean())
    assert half == pytest.approx(2.262 * float(values.std()) / 2)
    values = draw(25, 1, 0)[:, 0]
    parts = [values[:7], values[7:12], values[12:]]
    without_each = [float(torch.cat(parts[:i] + parts[i + 1 :]).mean()) for i in range(3)]
    half = jackknife("x", float(values.mean()), without_each, [7, 5, 13])["x_high"] - float(values.mean())
    weighted = sum(len(part) * (part.mean() - values.mean()) ** 2 / (25 - len(part)) for part in parts) / 3
    assert half == pytest.approx(2.262 * float(weighted) ** 0.5)
