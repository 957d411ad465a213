import math

import pytest
import torch
from torch import nn

from jit_accel.base.errors import UserError
from jit_accel.config.completion import Plan
from jit_accel.config.settings import OptimConfig
from jit_accel.model.transformer import build_model
from jit_accel.train.optimizers import Muon, build_optimizers, lr_at, orthogonalise, set_lr, split_stacked, trainable


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


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalised_matrix_keeps_its_directions_and_levels_its_scales(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrix)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = left.mT @ result @ right.mT
    scales = in_its_basis.diagonal(dim1=-2, dim2=-1)
    # Five iterations cannot lift what is next to nothing.
    assert scales[singular > 0.05 * singular.max()].min() > 0.6
    assert scales.max() < 1.3
    torch.testing.assert_close(in_its_basis, torch.diag_embed(scales), atol=1e-4, rtol=0)


def test_a_stack_of_maps_is_split_into_them():
    assert [m.shape for m in split_stacked(torch.empty(3 * 8, 8))] == [(8, 8)] * 3  # q, k, v
    assert [m.shape for m in split_stacked(torch.empty(2 * 21, 8))] == [(21, 8)] * 2  # SwiGLU
    assert [m.shape for m in split_stacked(torch.empty(8, 21))] == [(8, 21)]


def test_muon_steps_like_torch_where_nothing_is_stacked():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(16, 24)), None
    theirs = nn.Parameter(ours.detach().clone())
    a = Muon([ours], lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradient = torch.randn(16, 24)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    # Theirs iterates in bf16, with three significant digits.
    moved = 0.02 * 0.2 * math.sqrt(24) * 5
    torch.testing.assert_close(ours, theirs, atol=0.03 * moved, rtol=0)
    assert not torch.equal(a.state[ours]["momentum_buffer"], torch.zeros(16, 24))
