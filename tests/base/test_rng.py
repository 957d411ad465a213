import random

import numpy as np

from jit_accel.base import rng


def test_a_value_depends_on_seed_purpose_and_position_alone():
    positions = np.arange(1000)
    together = rng.hash64(3, "t", positions)
    assert np.array_equal(together[[7, 500]], rng.hash64(3, "t", [7, 500]))
    for other in (rng.hash64(4, "t", positions), rng.hash64(3, "noise", positions)):
        assert not np.any(together == other)


def test_values_never_change_between_versions():
    # A checkpoint made by an older version must continue with the same images and noise.
    assert rng.hash64(0, "order", [0, 1, 2**40]).tolist() == GOLDEN
    assert isinstance(int(rng.hash64(0, "order", 5)), int)


GOLDEN = [10382002499228208463, 7115117559775478229, 9942695957241583334]


def test_uniform_is_uniform_and_uncorrelated_between_neighbours():
    u = rng.uniform(0, "t", np.arange(200_000))
    assert u.min() > 0
    assert u.max() < 1
    counts, _ = np.histogram(u, bins=50, range=(0, 1))
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert ((counts - 4000) ** 2 / 4000).sum() < 49 + 5 * 9.9
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(len(u))
    # Nor between seeds, which differ by little.
    assert abs(np.corrcoef(u, rng.uniform(1, "t", np.arange(200_000)))[0, 1]) < 5 / np.sqrt(len(u))


def test_places_are_permuted_one_to_one_for_every_number_of_them():
    for n in (*range(1, 2500), 4095, 4096, 4097, 65_537, 1_000_003):
        assert np.array_equal(np.sort(rng.permuted(n, "order", np.arange(n), n)), np.arange(n)), n


def test_places_of_any_huge_number_are_permuted_one_to_one_and_each_for_itself():
    chance = random.Random(0)
    for n in [10**9, 2**40, 2**62, *(chance.randrange(2**20, 2 ** chance.randint(21, 62)) for _ in range(40))]:
        first = chance.randrange(n - 2**15)
        places = np.concatenate([first + np.arange(2**15), [0, n - 1]])  # neighbours, as in a batch, and both ends
        found = rng.permuted(7, "order", places, n)
        assert found.min() >= 0
        assert found.max() < n
        assert len(np.unique(found)) == len(np.unique(places))
        assert np.array_equal(rng.permuted(7, "order", places[[5, 90]].reshape(2, 1), n), found[[5, 90]].reshape(2, 1))


def test_permuted_places_never_change_between_versions():
    assert rng.permuted(7, "order/3", np.arange(10), 10).tolist() == PERMUTED_TEN
    assert rng.permuted(7, "order/3", [0, 1, 999_999_999], 10**9).tolist() == PERMUTED_OF_A_BILLION


PERMUTED_TEN = [1, 0, 5, 7, 3, 9, 4, 8, 2, 6]
PERMUTED_OF_A_BILLION = [581260219, 758355619, 301264804]


def chi_squared_excess(counts):
    """Return by how many standard deviations `counts`, which should be equal, differ more than chance would have it."""
    counts = np.asarray(counts).ravel()
    expected, freedom = counts.mean(), counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_permuted_places_are_as_uniform_as_chance():
    for n in (2**20 + 1, 14_197_122, 10**9, 2**50):
        place = np.arange(200_000)
        found = rng.permuted(0, "order/0", place, n) / n
        assert abs(chi_squared_excess(np.histogram(found, 500, (0, 1))[0])) < 5
        neighbours = np.histogram2d(found[::2], found[1::2], 20, ((0, 1), (0, 1)))[0]
        assert abs(chi_squared_excess(neighbours)) < 5
        by_place = np.histogram2d(place / len(place), found, 20, ((0, 1), (0, 1)))[0]
        assert abs(chi_squared_excess(by_place)) < 5
        for seed, epoch in ((0, 1), (1, 0)):
            other = rng.permuted(seed, f"order/{epoch}", place, n) / n
            assert abs(np.corrcoef(found, other)[0, 1]) < 5 / np.sqrt(len(place))
            assert abs(chi_squared_excess(np.histogram((other - found) % 1, 500, (0, 1))[0])) < 5


def test_every_place_is_put_everywhere_equally_often():
    n = 1009
    orders = np.array([rng.permuted(seed, "order/0", np.arange(n), n) for seed in range(2000)])
    assert abs(chi_squared_excess(np.bincount(orders[:, 0], minlength=n))) < 5
    assert abs(chi_squared_excess(np.bincount(orders[:, -1], minlength=n))) < 5
    at_home = (orders == np.arange(n)).sum(axis=1)  # a Poisson distribution with mean 1
    assert abs(at_home.mean() - 1) < 5 / np.sqrt(2000)
    ascents = (np.diff(orders, axis=1) > 0).sum(axis=1)  # mean (n - 1) / 2, variance (n + 1) / 12
    assert abs(ascents.mean() - (n - 1) / 2) < 5 * np.sqrt((n + 1) / 12 / 2000)
    assert 0.8 < ascents.var() / ((n + 1) / 12) < 1.2
