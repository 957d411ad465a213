"""Signs of trouble: each found where it is, and none in the log of a healthy training."""

import json
import math
import random
import re
from dataclasses import fields

import pytest

from jit_accel.config.run_groups import HealthConfig
from jit_accel.config.settings import SETTINGS
from jit_accel.monitor.health import KINDS, Health


def rows_of(losses, norms=None, start=1):
    norms = norms or [1.0] * len(losses)
    return [
        {"step": step, "train/loss": loss, "train/grad_norm": norm}
        for step, (loss, norm) in enumerate(zip(losses, norms), start)
    ]


def found(rows):
    return {(row["step"], key.removeprefix("health/")) for row in rows for key in row if key.startswith("health/")}


def healthy_losses(count, seed=0):
    """A loss as it is: steep, then flat, with the heavy tail of small batches."""
    noise = random.Random(seed)
    return [(1.2 * math.exp(-step / 40) + 0.15) * noise.lognormvariate(0, 0.35) for step in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_training_gives_no_sign(seed):
    rows = rows_of(healthy_losses(3000, seed), [0.05 + 2 * math.exp(-step / 50) for step in range(3000)])
    assert Health(HealthConfig(), must_fall=True).examine(rows, 0.01) == []
    assert found(rows) == set()


def test_one_rare_batch_is_no_jump_but_a_loss_that_stays_up_is():
    losses = [0.2] * 50 + [0.2 * 5] + [0.2] * 50
    rows = rows_of(losses)
    assert Health(HealthConfig(), must_fall=False).examine(rows) == []
    rows = rows_of([0.2] * 50 + [1.0] * 10)
    (event,) = Health(HealthConfig(), must_fall=False).examine(rows)
    assert (event.kind, event.step) == ("loss_jump", 53)  # the mean of five: 0.68
    assert event.value == rows[52]["health/loss_jump"] == pytest.approx(3.4)
    assert "3.4 times its median" in str(event)


@pytest.mark.parametrize(
    ("norm", "kind"), [(100.5, "grad_exploding"), (0.0009, "grad_vanishing"), (99.0, None), (0.0011, None)]
)
def test_gradient_norms_have_a_range(norm, kind):
    rows = rows_of([1.0, 1.0], [1.0, norm])
    events = Health(HealthConfig(), must_fall=False).examine(rows)
    assert [event.kind for event in events] == [kind] * (kind is not None)
    if kind:
        assert rows[1][f"health/{kind}"] == norm
        assert events[0].step == 2


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_found(loss, norm):
    rows = rows_of([1.0, loss, 1.0], [1.0, norm, 1.0])
    (event,) = Health(HealthConfig(), must_fall=False).examine(rows)
    assert (event.kind, event.step) == ("loss_not_finite", 2)


def test_infinite_gradients_that_a_scaler_skips_are_no_sign():
    rows = rows_of([1.0] * 3, [1.0, math.inf, math.nan])
    assert Health(HealthConfig(), must_fall=False, has_scaler=True).examine(rows) == []


def test_a_loss_that_does_not_fall_from_the_start_is_flat():
    thresholds = HealthConfig(health_flat_steps=50)
    noise = random.Random(1)
    rows = rows_of([1.0 + noise.gauss(0, 0.05) for _ in range(200)])
    (event,) = Health(thresholds, must_fall=True).examine(rows)
    assert (event.kind, event.step) == ("loss_flat", 50)
    assert 0.95 < event.value < 1.05
    assert found(rows) == {(step, "loss_flat") for step in (50, 100, 150, 200)}
    assert Health(thresholds, must_fall=False).examine(rows_of([1.0] * 200)) == []  # goes on from a checkpoint
    falling = rows_of([1.0 / step for step in range(1, 20)] + [0.05] * 200)
    assert Health(thresholds, must_fall=True).examine(falling) == []


def test_a_loss_of_zero_is_no_trouble():
    assert Health(HealthConfig(health_flat_steps=50), must_fall=True).examine(rows_of([0.0] * 200)) == []


def test_waiting_for_data_names_what_helps_this_run():
    health = Health(HealthConfig(), must_fall=False)
    assert health.examine(rows_of([1.0]), 0.04, "more workers") == []
    assert health.examine(rows_of([1.0]), None, "more workers") == []
    rows = rows_of([1.0, 1.0])
    (event,) = health.examine(rows, 0.3, "more workers")
    assert str(event) == "step 2: the training waits for data 30% of the time: more workers"
    assert found(rows) == {(2, "data_starving")}


def test_each_kind_is_told_once_and_logged_each_time():
    health = Health(HealthConfig(), must_fall=False)
    told = [len(health.examine(rows_of([1.0], [500.0], start=step))) for step in range(1, 4)]
    assert told == [1, 0, 0]
    rows = rows_of([1.0, 1.0], [500.0, 500.0], start=4)
    health.examine(rows)
    assert found(rows) == {(4, "grad_exploding"), (5, "grad_exploding")}


def test_a_threshold_of_zero_switches_a_sign_off():
    off = HealthConfig(**{field.name: 0 for field in fields(HealthConfig)})
    losses, norms = [1.0] * 40 + [50.0] * 10, [1e6] * 25 + [0.0] * 25
    assert Health(off, must_fall=True).examine(rows_of(losses, norms), 1.0) == []
    assert len(Health(HealthConfig(health_flat_steps=30), must_fall=True).examine(rows_of(losses, norms), 1.0)) == 5


def test_remedies_name_flags_that_there_are():
    for kind in KINDS.values():
        flags = set(re.findall(r"--(\w+)", kind.remedy))
        assert flags <= set(SETTINGS) | {"resume"}
        assert kind.describe(0.5)
        assert kind.remedy.endswith(".")


@pytest.mark.parametrize("interrupted_after", [5, 30, 52, 70, 119])
def test_signs_are_the_same_over_an_interruption(interrupted_after):
    thresholds = HealthConfig(health_flat_steps=40)
    noise = random.Random(2)
    rows = rows_of([1.0 + noise.gauss(0, 0.05) for _ in range(90)] + [6.0] * 30)
    Health(thresholds).examine(rows)
    assert {kind for _, kind in found(rows)} == {"loss_flat", "loss_jump"}
    cut = [{key: row[key] for key in ("step", "train/loss", "train/grad_norm")} for row in rows]
    first, second = Health(thresholds), Health(thresholds)
    first.examine(cut[:interrupted_after])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.examine(cut[interrupted_after:])
    assert cut == rows


def test_a_single_step_is_not_flat():
    assert Health(HealthConfig(health_flat_steps=1)).examine(rows_of([1.0])) == []
    assert len(Health(HealthConfig(health_flat_steps=1)).examine(rows_of([1.0, 1.0]))) == 1
