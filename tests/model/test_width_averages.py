"""The mathematics of power-function averages, against their definition (arXiv 2312.02696, section 3)."""

import numpy as np
import pytest

from jit_accel.base.errors import UserError
from jit_accel.config.groups import SNAPSHOT_WIDTHS, problem_of_width, width_name, width_of
from jit_accel.model.width_averages import Profile, decay_of_width, fit, gamma_of, inner_products, stored_snapshots

GRID = (np.arange(400_000) + 0.5) / 400_000


def density(profile: Profile, times: np.ndarray) -> np.ndarray:
    """Return the profile at these times by its definition."""
    gamma = gamma_of(profile.width)
    inside = (gamma + 1) / profile.step * (np.minimum(times, profile.step) / profile.step) ** gamma
    return np.where(times <= profile.step, inside, 0.0)


def tracked_every(steps: int, last: int) -> list[Profile]:
    return [Profile(step, width) for step in range(steps, last + 1, steps) for width in SNAPSHOT_WIDTHS]


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_width_is_the_standard_deviation_of_the_profile_in_lengths_of_the_run(width):
    weights = density(Profile(1, width), GRID) / len(GRID)
    mean = weights @ GRID
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert np.sqrt(weights @ (GRID - mean) ** 2) == pytest.approx(width, rel=1e-4)


def test_the_exponents_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("width", [0.05, 0.25])
def test_the_update_gives_each_step_the_integral_of_the_profile_over_it(width):
    shares = np.zeros(40)
    for step in range(1, 41):
        decay = decay_of_width(width, step)
        shares = decay * shares
        shares[step - 1] += 1 - decay
    power = gamma_of(width) + 1
    assert shares == pytest.approx(np.diff((np.arange(41) / 40) ** power), abs=1e-15)


def test_inner_products_are_those_of_the_integrals():
    first, second = [Profile(10, 0.05), Profile(7, 0.2)], [Profile(10, 0.1), Profile(4, 0.1), Profile(12, 0.25)]
    times = 12 * GRID
    products = [[density(a, times) @ density(b, times) * 12 / len(GRID) for b in second] for a in first]
    assert inner_products(first, second) == pytest.approx(np.array(products), rel=1e-4)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.2])
def test_the_error_of_a_fit_is_the_distance_of_the_profiles_and_more_snapshots_make_it_smaller(width):
    wanted, errors = Profile(120, width), []
    for every in (40, 20, 10, 5):
        stored = tracked_every(every, 120)
        found = fit(stored, wanted)
        assert sum(found.factors) == pytest.approx(1, abs=1e-9)
        times = 120 * GRID
        sought = density(wanted, times)
        made = sum(factor * density(profile, times) for factor, profile in zip(found.factors, stored))
        assert found.error == pytest.approx(np.linalg.norm(made - sought) / np.linalg.norm(sought), rel=0.01, abs=1e-4)
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_what_is_stored_is_found_again_alone():
    stored = tracked_every(10, 100)
    assert fit(stored, stored[-1]) == fit(stored, Profile(100, 0.1))
    assert fit(stored, stored[-1]).factors == (*[0.0] * 19, 1.0)
    assert fit(stored, stored[-1]).error == 0


def test_many_snapshots_that_are_nearly_alike_keep_the_factors_small():
    found = fit(tracked_every(1, 500), Profile(500, 0.15))
    assert found.error < 1e-3
    assert np.linalg.norm(found.factors) < 2


@pytest.mark.parametrize("width", [0.0, -0.1, 0.0001, 0.288, 0.5, float("inf"), float("nan")])
def test_other_widths_are_refused(width):
    assert "must be 0.001 or more and below 0.288" in problem_of_width(width)


def test_names_and_widths_are_the_same():
    assert [width_of(width_name(width)) for width in (0.05, 0.1, 0.123, 0.001)] == [0.05, 0.1, 0.123, 0.001]
    assert [width_of(name) for name in ("0.05", "auto", "model", "width_", "width_x", "width_0.1x")] == [None] * 6


def test_other_files_in_the_folder_are_passed_over(tmp_path):
    folder = tmp_path / "averages"
    folder.mkdir()
    for name in ("step_00000002-width_0.05", "step_00000002-auto", ".step_00000002-width_0.1.safetensors.7", "notes"):
        (folder / f"{name}.safetensors").touch()
    assert list(stored_snapshots(tmp_path)) == [Profile(2, 0.05)]


def test_an_error_is_one_of_users():
    from jit_accel.model.loading import average_name

    with pytest.raises(UserError, match=r"ema_width 0.05: says which average is taken, as --ema auto does"):
        average_name("auto", 0.05)
    with pytest.raises(UserError, match=r"ema_width 0.3: must be 0.001 or more and below 0.288"):
        average_name(None, 0.3)
