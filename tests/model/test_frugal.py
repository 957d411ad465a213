"""Inputs of layers that are made again instead of kept, and the paper's formulation, which keeps them all."""

import contextlib
import gc
import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from peft import LoraConfig
from test_model import SMALL, batch, gradients, small_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from jit_accel.model import blocks, functional
from jit_accel.model.transformer import JiTTransformer2DModel

_spec = importlib.util.spec_from_file_location("reference", Path(__file__).parents[2] / "benchmarks" / "reference.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def adapted(**options) -> JiTTransformer2DModel:
    """A network with an adapter that acts, whose layers take their input twice."""
    model = small_model()
    targets = ["qkv", "proj", "w12", "w3"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options))
    return model


def all_trained() -> JiTTransformer2DModel:
    return adapted().requires_grad_(True)


def partly_frozen() -> JiTTransformer2DModel:
    model = small_model()
    for name, p in model.named_parameters():
        p.requires_grad_("w3" in name or "blocks.2.attn.qkv" in name)
    return model


NETWORKS = {
    "plain": small_model,
    "dropout": lambda: small_model(proj_dropout=0.3, attn_dropout=0.3),
    "frozen": partly_frozen,
    "adapter": adapted,
    "adapter_dropout": lambda: adapted(lora_dropout=0.3),
    "adapter_and_base": all_trained,
    "bf16_weights": lambda: small_model().to(torch.bfloat16),
}


def results(build, around=contextlib.nullcontext, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Return the outputs, and the gradients of all that is trained, of a network that `build` returns."""
    torch.manual_seed(0)  # of the adapter
    model, inputs = build().train(), batch()
    torch.manual_seed(2)  # of the dropout
    with around():
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(*inputs).sample
        out.float().square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 1 and all(map(torch.equal, a, b))


def through_checkpoint(build):
    """Return a function that builds the network with its blocks below torch's own checkpointing."""

    def built():
        model = build()
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        return model

    return built


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_made_again_is_what_was_there(monkeypatch, kind, dtype):
    found = results(NETWORKS[kind], dtype=dtype)
    offloaded = results(NETWORKS[kind], around=torch.autograd.graph.save_on_cpu, dtype=dtype)
    below = results(through_checkpoint(NETWORKS[kind]), dtype=dtype)
    monkeypatch.setattr(blocks, "call_frugally", lambda layer, x: layer(x))
    expected = results(NETWORKS[kind], dtype=dtype)
    assert equal(found, expected)
    assert equal(offloaded, expected)
    assert equal(below, expected)


def test_a_graph_serves_several_backward_passes_and_parts_of_it():
    model, (x, t, labels) = small_model(), batch()
    expected, weights = gradients(model, (x, t, labels)), dict(model.named_parameters())
    loss = model(x, t, labels).sample.square().mean()
    some = [weights["blocks.1.mlp.w3.weight"], weights["blocks.2.attn.qkv.weight"]]
    part = torch.autograd.grad(loss, some, retain_graph=True)
    assert all(map(torch.equal, part, torch.autograd.grad(loss, some, retain_graph=True)))
    assert all(map(torch.equal, expected, torch.autograd.grad(loss, list(weights.values()), retain_graph=True)))
    assert all(map(torch.equal, expected, torch.autograd.grad(loss, list(weights.values()))))


def test_a_layer_that_changes_its_input_keeps_what_it_used():
    layer = nn.Linear(4, 4)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return layer(x.mul_(2))

    def gradient(call) -> torch.Tensor:
        x = functional.gated_silu(torch.arange(16.0).view(2, 8).requires_grad_())
        (found,) = torch.autograd.grad(call(doubled, x).square().sum(), layer.weight)
        return found

    assert torch.equal(gradient(functional.call_frugally), gradient(lambda call, x: call(x)))


@pytest.mark.parametrize("is_passed", [True, False])
def test_a_graph_ends_with_its_last_name_without_a_search_for_garbage(is_passed):
    mlp = small_model().blocks[0].mlp
    gc.disable()
    try:
        x = functional.modulated_rms_norm(torch.ones(2, 3, 48, requires_grad=True), *torch.ones(3, 2, 1, 48))
        node, out = weakref.ref(x.grad_fn), mlp(x)
        if is_passed:
            out.sum().backward()
        del x, out
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_papers_formulation_has_the_outputs_and_gradients_of_the_network(precision):
    model = small_model(num_heads=3)
    other = reference.ReferenceStep(model, lr=0.0, decays=(), precision=precision).model
    x, t, labels = batch()
    bound = 1e-5 if precision == "no" else 0.05
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        outs = model(x, t, labels).sample, other(x, t, labels)
    for out in outs:
        out.float().square().mean().backward()
    assert (outs[0] - outs[1]).norm() <= bound * outs[1].norm()
    others = dict(other.named_parameters())
    assert others.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert (p.grad - others[name].grad).norm() <= bound * others[name].grad.norm(), name


def test_a_step_of_the_papers_formulation_has_the_loss_of_the_objective(monkeypatch):
    """Of the same draws: the loss by the v-objective of x-prediction, and weights that have moved."""
    from jit_accel.model.objective import Objective

    model, (x, _, labels) = small_model(), batch()
    x = x.clamp(-1, 1)
    step = reference.ReferenceStep(model, lr=1e-3, decays=(0.5,), precision="no")
    torch.manual_seed(4)
    dropped = torch.rand(len(x)) < 0.1
    t, e = torch.sigmoid(torch.randn(len(x)) * 0.8 - 0.8), torch.randn_like(x)
    labels_kept = torch.where(dropped, torch.full_like(labels, SMALL["num_classes"]), labels)
    objective = Objective(prediction="x", loss_space="v", noise_scale=1.0)
    expected = objective.losses(model, x, t, e, labels_kept).mean().item()
    torch.manual_seed(4)
    before = [p.clone() for p in step.model.parameters()]
    assert step(x, labels) == pytest.approx(expected, rel=1e-5)
    ((_, average),) = step.averages
    for old, new, kept in zip(before, step.model.parameters(), average):
        assert torch.allclose(kept, (old + new) / 2, atol=1e-6)
    assert any(not torch.equal(old, new) for old, new in zip(before, step.model.parameters()))


@pytest.mark.parametrize("most", [2**22, 2 * 70**2, 1])
def test_attention_in_bf16_is_that_of_exact_numbers_up_to_rounding(monkeypatch, most):
    """Of inputs that bf16 holds, outputs and gradients differ from float64's by what bf16 rounds."""
    monkeypatch.setattr(functional._AttentionInBf16, "MOST_SCORES", most)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 70, 3, 16, generator=generator).bfloat16()
    kept = [x.clone().requires_grad_() for x in (q, k, v)]
    out = functional.attention_in_bf16(*kept)
    out.backward(grad)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    weights = torch.softmax(torch.einsum("bqhc,bkhc->bhqk", *exact[:2]) / 4, dim=-1)
    expected = torch.einsum("bhqk,bkhc->bqhc", weights, exact[2])
    expected.backward(grad.double())
    for found, true in zip([out, *(x.grad for x in kept)], [expected, *(x.grad for x in exact)], strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - true).norm() < 0.008 * true.norm()


def test_long_attention_of_a_network_in_bf16_is_close_to_float32(monkeypatch):
    """The gradients of a whole network in autocast are as close to float32's as with SDPA in float32."""
    exact = results(small_model)
    errors = {}
    for length in (1, 10**9):
        monkeypatch.setattr(functional, "LONG_ATTENTION", length)
        found = results(small_model, dtype=torch.bfloat16)
        errors[length] = torch.cat([(a - b).flatten() for a, b in zip(found, exact)]).norm()
    assert errors[1] != errors[10**9]  # both were tried
    assert errors[1] < 1.2 * errors[10**9]


def test_attention_in_bf16_is_made_again_and_takes_no_images():
    q, k, v = torch.randn(3, 2, 70, 3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for call in (
        functional.attention_in_bf16,
        lambda *given: checkpoint(functional.attention_in_bf16, *given, use_reentrant=False),
    ):
        kept = [x.clone().requires_grad_() for x in (q, k, v)]
        call(*kept).float().square().sum().backward()
        found.append([x.grad for x in kept])
    assert all(map(torch.equal, *found))
    none = [x[:0].clone().requires_grad_() for x in (q, k, v)]
    functional.attention_in_bf16(*none).sum().backward()
    assert [x.grad.shape for x in none] == [(0, 70, 3, 16)] * 3


@pytest.mark.parametrize(("backend", "is_ours"), [(None, True), ("native", True), ("_native_math", False)])
def test_a_kernel_that_diffusers_is_set_to_acts_on_long_attention(monkeypatch, backend, is_ours):
    monkeypatch.setattr(functional, "LONG_ATTENTION", 1)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    calls, attend = [], blocks.attention_in_bf16
    monkeypatch.setattr(blocks, "attention_in_bf16", lambda *given: calls.append(1) or attend(*given))
    with attention_backend(backend) if backend else contextlib.nullcontext():
        results(small_model, dtype=torch.bfloat16)
    assert bool(calls) == is_ours
    calls.clear()

    def model_of_this_backend():
        model = small_model()
        if backend:
            model.set_attention_backend(backend)
        return model

    results(model_of_this_backend, dtype=torch.bfloat16)
    assert bool(calls) == is_ours
