import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from jit_accel.evaluate.drawing import METHODS
from jit_accel.model.scheduler import JiTScheduler, time_grid
from jit_accel.model.solvers import SOLVERS
from jit_accel.model.spaces import convert
from jit_accel.sample.settings import SampleConfig

DATA_STD, DATA_MEAN = 0.7, 0.4


def gaussian_x(z, t):
    """E[x | z] for x ~ N(DATA_MEAN, DATA_STD^2), z = t x + (1 - t) e: the perfect prediction of x."""
    variance = t**2 * DATA_STD**2 + (1 - t) ** 2
    return DATA_MEAN + t * DATA_STD**2 / variance * (z - t * DATA_MEAN)


def integrate(scheduler, z, steps, method, predict=gaussian_x, **how):
    scheduler.set_timesteps(steps, method=method, **how)
    for t in scheduler.timesteps:
        z = scheduler.step(predict(z, t.double()), t, z).prev_sample
    return z


@pytest.mark.parametrize("time_shift", [1, 2.5, 0.5])
@pytest.mark.parametrize("method", SOLVERS)
def test_solvers_converge_at_their_order(method, time_shift):
    # The flow of a Gaussian is affine: z at t = 1 is mean + std * z at t = 0. Small t_eps: the clamp is not the flow.
    scheduler = JiTScheduler(t_eps=1e-4)
    z0 = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    errors = [
        (integrate(scheduler, z0, n, method, time_shift=time_shift) - (DATA_MEAN + DATA_STD * z0)).abs().max().item()
        for n in (64, 128, 256)
    ]
    observed = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert observed == pytest.approx([SOLVERS[method].order] * 2, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_three_kinds_of_prediction_take_the_same_path(solver):
    z0 = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gaussian_e(z, t):  # e = (z - t x) / (1 - t)
        return (z - t * gaussian_x(z, t)) / (1 - t)

    def gaussian_v(z, t):
        return (gaussian_x(z, t) - z) / (1 - t)

    ends = {
        kind: integrate(JiTScheduler(kind, t_eps=1e-9, solver=solver), z0, 8, None, predict)
        for kind, predict in (("x", gaussian_x), ("v", gaussian_v))
    }
    assert torch.allclose(ends["x"], ends["v"], atol=1e-6)
    # at t = 0 a prediction of e says nothing about x, so e is compared where it does
    z, t = z0 * 0.8, torch.tensor(0.3, dtype=torch.float64)
    for kind, predict in (("x", gaussian_x), ("e", gaussian_e)):
        assert torch.allclose(convert(predict(z, t), z, t, kind, "v", 0.05), gaussian_v(z, t))


def test_velocities_are_clamped_where_they_would_diverge():
    one, zero = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert convert(one, zero, 0.99, "x", "v", 0.05).unique().item() == pytest.approx(20)
    assert convert(zero, one, 0.01, "e", "v", 0.05).unique().item() == pytest.approx(20)
    assert convert(one, zero, torch.tensor([[[[0.99]]]]), "x", "v", 0.05).unique().item() == pytest.approx(20)
    assert convert(one, zero, 0.99, "v", "v", 0.05) is one


@pytest.mark.parametrize("method", SOLVERS)
def test_timesteps_are_the_model_calls(method):
    scheduler = JiTScheduler()
    scheduler.set_timesteps(4, method=method)
    expected = [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75] if method == "heun" else [0, 0.25, 0.5, 0.75]
    assert scheduler.timesteps.tolist() == expected == scheduler.call_times
    assert scheduler.order == (2 if method == "heun" else 1)


def test_a_shift_of_time_multiplies_the_ratio_of_noise_to_image():
    equal, finer = (torch.tensor(time_grid(8, shift)) for shift in (1, 3))
    assert torch.equal(equal, torch.linspace(0, 1, 9))
    assert torch.allclose((1 - finer[1:]) / finer[1:], 3 * (1 - equal[1:]) / equal[1:])
    assert (finer[0], finer[-1]) == (0, 1)
    assert (finer[1:-1] < equal[1:-1]).all()  # shorter steps near the noise
    scheduler = JiTScheduler()
    scheduler.set_timesteps(8, method="euler", time_shift=3)
    assert scheduler.call_times == finer[:-1].tolist()


def test_all_programs_know_the_same_solvers():
    def choices(kind):
        return {kind} if isinstance(kind, str) else set().union(*map(choices, get_args(kind)))

    assert set(METHODS) == choices(SampleConfig.__annotations__["method"]) == set(SOLVERS)


@pytest.mark.parametrize("steps", [2, 3, 8, 40])
def test_etd2_is_exact_where_x_changes_linearly_with_t(steps):
    """The first step knows no slope: there x stays."""
    z, x, slope = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler, first = JiTScheduler(), 1 / steps
    scheduler.set_timesteps(steps, method="etd2")
    for t in scheduler.call_times:
        z = scheduler.step(x + slope * t, t, z).prev_sample
        if t == 0:
            at_first = z
        elif scheduler.next_time < 1:  # z / (1 - t) grows by the integral of x / (1 - t)^2
            end, t0 = scheduler.next_time, scheduler.call_times[1]
            grown = (x + slope) * (1 / (1 - end) - 1 / (1 - t0)) - slope * math.log((1 - t0) / (1 - end))
            assert torch.allclose(z, (1 - end) * (at_first / (1 - first) + grown), atol=1e-5)
    assert torch.allclose(z, x + slope, atol=1e-6)


def test_etd2_ends_on_an_x_that_stays_and_a_clamped_velocity_near_it():
    z, x = torch.randn(2, 5, dtype=torch.float64)
    for steps in (1, 7, 50):
        assert torch.allclose(integrate(JiTScheduler(), z, steps, "etd2", lambda z, t: x), x, atol=1e-6)
    left = math.exp(-1) * 0.05
    found = integrate(JiTScheduler(), z, 2000, "ab2", lambda z, t: x)
    assert torch.allclose(found, left * z + (1 - left) * x, atol=1e-3)


@pytest.mark.parametrize("method", ["ab2", "etd2"])
def test_a_forgotten_history_makes_the_next_step_a_first_one(method):
    z = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    scheduler = JiTScheduler()
    scheduler.set_timesteps(4, method=method)
    kept = scheduler.step(gaussian_x(z, 0.0), 0.0, z).prev_sample
    scheduler.forget_history()
    found = scheduler.step(gaussian_x(kept, 0.25), 0.25, kept).prev_sample
    scheduler.set_timesteps(4, method=method, skip_steps=1)
    assert torch.equal(found, scheduler.step(gaussian_x(kept, 0.25), 0.25, kept).prev_sample)
    scheduler.set_timesteps(4, method="euler", skip_steps=1)
    euler = scheduler.step(gaussian_x(kept, 0.25), 0.25, kept).prev_sample
    assert torch.allclose(found, euler, atol=1e-6)  # t_eps is far


def test_many_steps_in_bf16_are_not_worse_than_few():
    def rounded(z, t):
        return gaussian_x(z.bfloat16().double(), t).bfloat16()

    z = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    for method in SOLVERS:
        exact = integrate(JiTScheduler(), z, 4000, method)
        few, many = (
            (integrate(JiTScheduler(), z.float(), steps, method, rounded).double() - exact).square().mean().sqrt()
            for steps in (50, 300)
        )
        assert many < 1.05 * few, method


def test_euler_is_that_of_diffusers():
    steps = 7
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    ours = JiTScheduler(prediction_type="v", solver="euler")
    ours.set_timesteps(steps)
    z_theirs = z_ours = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, (sigma_time, t) in enumerate(zip(theirs.timesteps, ours.timesteps)):
        # sigma = 1 - t, and their velocity points from data to noise
        assert sigma_time / 1000 == pytest.approx(1 - t.item(), abs=1e-6)
        v = torch.sin(z_ours * (i + 1))
        z_theirs = theirs.step(-v, sigma_time, z_theirs).prev_sample
        z_ours = ours.step(v, t, z_ours).prev_sample
    assert torch.allclose(z_ours, z_theirs, atol=1e-6)


def test_the_state_is_float32_whatever_the_network_gives():
    scheduler = JiTScheduler()
    scheduler.set_timesteps(3)
    z = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16)
    for t in scheduler.timesteps:
        z = scheduler.step(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), t, z).prev_sample
        assert z.dtype == torch.float32


def test_a_new_trajectory_forgets_the_old_one():
    scheduler, z = JiTScheduler(), torch.ones(1, 3, 2, 2)
    whole = integrate(scheduler, z, 5, "heun")
    scheduler.set_timesteps(5)
    scheduler.step(z, scheduler.timesteps[0], z)  # left in the middle of a step
    assert scheduler.mid_step
    assert torch.equal(integrate(scheduler, z, 5, "heun"), whole)
    assert not scheduler.mid_step
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(z, 1.0, z)


def test_noise_is_added_along_the_line_from_noise_to_data():
    scheduler = JiTScheduler(noise_scale=2.0)
    x, e = torch.randn(2, 3, 3, 4, 4)
    z = scheduler.add_noise(x, e, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(z[0], e[0])
    assert torch.equal(z[1], x[1])
    assert torch.allclose(z[2], 0.25 * x[2] + 0.75 * e[2])
    assert scheduler.init_noise_sigma == 2.0


def test_a_saved_scheduler_comes_back_whole(tmp_path):
    JiTScheduler("e", t_eps=0.02, noise_scale=4.0, solver="euler").save_pretrained(tmp_path)
    loaded = JiTScheduler.from_pretrained(tmp_path)
    settings = {name: loaded.config[name] for name in ("prediction_type", "t_eps", "noise_scale", "solver")}
    assert settings == {"prediction_type": "e", "t_eps": 0.02, "noise_scale": 4.0, "solver": "euler"}
    loaded.set_timesteps(3)
    assert len(loaded.timesteps) == 3


def test_unknown_settings_are_answered_with_the_choices():
    with pytest.raises(ValueError, match="x, e, v"):
        JiTScheduler(prediction_type="eps")
    with pytest.raises(ValueError, match="Did you mean 'heun'"):
        JiTScheduler().set_timesteps(5, method="huen")
    with pytest.raises(ValueError, match="at least 1"):
        JiTScheduler().set_timesteps(0)
    for shift in (0, -1, math.nan, math.inf, "2", True):
        with pytest.raises(ValueError, match=r"time_shift .* must be a positive number"):
            JiTScheduler().set_timesteps(5, time_shift=shift)
