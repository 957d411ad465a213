import copy

import pytest
import torch
from torch import nn

from jit_accel.base.errors import UserError
from jit_accel.config.completion import complete
from jit_accel.config.facts import Facts, Plan
from jit_accel.config.groups import OptimConfig
from jit_accel.config.settings import Config
from jit_accel.model.transformer import build_model
from jit_accel.train.optimizers import build_optimizers, lr_at, make_moments, set_lr, take_step, trainable


@pytest.mark.parametrize(
    ("step", "cosine", "constant"),
    [(0, 0.0, 0.0), (5, 0.5, 0.5), (10, 1.0, 1.0), (60, 0.55, 1.0), (110, 0.1, 1.0), (200, 0.1, 1.0)],
)
def test_learning_rate_table(step, cosine, constant):
    plan = Plan(total_steps=110, warmup_steps=10, global_batch_size=1, num_images=1)
    for schedule, expected in (("cosine", cosine), ("constant", constant)):
        optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.1, lr_schedule=schedule)
        assert lr_at(step, optim, plan) == pytest.approx(expected)


def test_learning_rate_without_warm_up_starts_at_its_peak():
    optim, plan = OptimConfig(learning_rate=0.3), Plan(10, 0, global_batch_size=1, num_images=1)
    assert lr_at(0, optim, plan) == pytest.approx(0.3)
    assert lr_at(5, optim, plan) == pytest.approx(0.15)


def test_wsd_is_stable_until_its_decay_and_a_longer_run_only_begins_that_later():
    optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.1, lr_schedule="wsd", decay_fraction=0.4)
    short, long = (Plan(total, 10, global_batch_size=1, num_images=1) for total in (100, 200))
    found = [lr_at(step, optim, short) for step in (0, 5, 10, 59, 60, 70, 100, 300)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1 - 0.9 * 0.5, 0.1, 0.1])
    assert all(lr_at(step, optim, short) == lr_at(step, optim, long) for step in range(61))
    assert [lr_at(step, optim, long) for step in (120, 200)] == pytest.approx([1, 0.1])
    fallen = [lr_at(step, optim, short) for step in range(60, 101)]
    assert fallen == sorted(fallen, reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"decay_fraction": 0.1}, "decay_fraction 0.1: is of --lr_schedule wsd, and cosine is used"),
        ({"muon_scale": "original"}, "muon_scale original: is of Muon, and --optimizer adamw is used: choose muon"),
        ({"lr_schedule": "wsd", "decay_fraction": 0.0}, "decay_fraction 0: must be a share of the run above 0"),
        (
            {"lr_schedule": "wsd", "max_steps": 10, "warmup_steps": 9},
            "warmup_steps 9: the run has 10 steps, and the last",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        Config.of(data_path="x", **flags)


def test_the_decay_of_wsd_is_completed_and_only_there():
    for schedule, fraction in (("wsd", 0.2), ("cosine", None)):
        config, plan, _ = complete(Config.of(data_path="x", lr_schedule=schedule, max_steps=100), Facts(99, 1))
        assert config.optim.decay_fraction == fraction
        assert lr_at(99, config.optim, plan) < lr_at(75, config.optim, plan)


@pytest.fixture(scope="module")
def model():
    return build_model("JiT-Ti/7", img_size=28, num_classes=10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_belongs_to_one_optimizer(model, name):
    optimizers = build_optimizers(model, OptimConfig(optimizer=name, weight_decay=0.1))
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(trainable(model))


def test_weight_decay_spares_biases_norms_and_embeddings(model):
    names = {p: n for n, p in trainable(model)}
    (optimizer,) = build_optimizers(model, OptimConfig(optimizer="adamw", weight_decay=0.1))
    for group in optimizer.param_groups:
        for p in group["params"]:
            spared = names[p].endswith("bias") or "norm" in names[p] or "embedding_table" in names[p]
            spared |= names[p] == "in_context_posemb"
            assert (group["weight_decay"] == 0) == spared, names[p]


def test_unknown_optimizer_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"optimizer adamv: unknown; choose from adamw, muon. Did you mean 'adamw'"):
        build_optimizers(nn.Linear(2, 2), OptimConfig(optimizer="adamv", weight_decay=0))


def test_set_lr_reaches_every_group(model):
    optimizers = build_optimizers(model, OptimConfig(optimizer="muon", weight_decay=0.1))
    set_lr(optimizers, 0.25)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_made_before_the_first_step_are_those_that_it_makes(model, name):
    runs = []
    for makes in (True, False):
        network = copy.deepcopy(model)
        optimizers = build_optimizers(network, OptimConfig(optimizer=name))
        set_lr(optimizers, 0.1)
        if makes:
            make_moments(optimizers)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for p in list(network.parameters())[1:]:  # the first one is used nowhere
                p.grad = torch.randn(p.shape, generator=generator)
            take_step(optimizers)
        runs.append((network, {p: state for each in optimizers for p, state in each.state.items()}))
    (made, states), (stepped, own) = runs
    for a, b in zip(made.parameters(), stepped.parameters()):
        assert torch.equal(a, b)
        assert all(torch.equal(states[a][key], value) for key, value in own.get(b, {}).items())
        assert b not in own or states[a].keys() == own[b].keys()
