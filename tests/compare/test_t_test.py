"""The t distribution, the paired test and Holm's correction have their known values."""

import math

import pytest

from jit_accel.compare.t_test import holm, paired_test, t_quantile, two_sided_p

# Printed tables of the t distribution, 97.5 %.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_tables(degrees):
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=6e-5)
    assert two_sided_p(t_quantile(degrees), degrees) == pytest.approx(0.05, abs=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 50.0])
def test_few_degrees_of_freedom_have_their_closed_forms(t):
    assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
    assert two_sided_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)


@pytest.mark.parametrize("degrees", [3, 4, 7, 12])
def test_p_is_the_integral_of_the_density(degrees):
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    steps, end = 20_000, 1.7
    middles = ((index + 0.5) * end / steps for index in range(steps))
    inside = 2 * end / steps * math.fsum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in middles)
    assert two_sided_p(end, degrees) == pytest.approx(1 - inside, abs=1e-8)


def test_scipy_finds_the_same():
    stats = pytest.importorskip("scipy.stats")
    differences = [0.3, -0.1, 0.7, 0.45, 0.2]
    theirs = stats.ttest_1samp(differences, 0.0)
    ours = paired_test(differences)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-10)


def test_a_paired_test_by_hand():
    found = paired_test([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt(3)
    assert found.mean == 2
    assert found.p == pytest.approx(two_sided_p(2 * math.sqrt(3), 2))
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_no_difference_has_the_p_value_1_and_too_few_have_none():
    assert paired_test([0.0, 0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0)
    assert paired_test([1.5, 1.5, 1.5]).p == 0.0
    assert paired_test([1.0, 3.0]) == (2.0, None, None, None)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
