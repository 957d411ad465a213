"""Density and coverage, by hand and by their definitions."""

import numpy as np
import pytest
import torch

from jit_accel.evaluate.neighbours import density_and_coverage


def on_a_line(*places: float) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


def test_by_hand_on_a_line():
    real = on_a_line(0, 1, 2, 10)  # with one neighbour the radii are 1, 1, 1 and 8
    assert density_and_coverage(on_a_line(0.5, 0.5), real, 1) == (2, 0.5)  # within 0 and 1
    assert density_and_coverage(on_a_line(100), real, 1) == (0, 0)
    assert density_and_coverage(on_a_line(0.1, 1.9, 11), real, 1) == (pytest.approx(5 / 3), 1)
    # 1.9 is nearer than 8.9 to 10 as well: hence what an odd real image does to density, and not to coverage
    assert density_and_coverage(on_a_line(2.5), real, 1) == (2, 0.5)


def test_they_are_the_papers_definitions_beyond_one_chunk():
    draws = np.random.default_rng(0)
    real, images = draws.normal(size=(1100, 6)) + 5, draws.normal(size=(1050, 6)) * 0.9 + 5.3
    apart = np.linalg.norm(real[:, None] - real[None], axis=-1)
    radii = np.sort(apart, axis=1)[:, 5]
    lies_in = np.linalg.norm(images[:, None] - real[None], axis=-1) < radii
    found = density_and_coverage(torch.from_numpy(images).float(), torch.from_numpy(real).float())
    assert found == pytest.approx((lies_in.sum() / 5 / len(images), lies_in.any(0).mean()), abs=2e-3)


def test_of_one_distribution_both_are_what_the_paper_expects():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(600, 8, generator=generator) for _ in range(2))
    density, coverage = density_and_coverage(one, other)
    assert density == pytest.approx(1, abs=0.15)
    assert coverage == pytest.approx(1 - 1 / 2**5, abs=0.03)  # of as many images (the paper's equation 8)
    assert density_and_coverage(one[:1].expand(600, -1), other)[1] < 0.2  # the mode has collapsed
