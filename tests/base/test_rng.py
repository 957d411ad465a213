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
