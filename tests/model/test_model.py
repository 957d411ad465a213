import math

import pytest
import torch
import torch.nn.functional as F
from golden import FILES, load_golden
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jit_accel.base.errors import UserError
from jit_accel.config.presets import forward_macs
from jit_accel.model import functional
from jit_accel.model.transformer import JiTTransformer2DModel, build_model

SMALL = {
    "img_size": 16,
    "patch_size": 4,
    "hidden_size": 48,
    "depth": 4,
    "num_heads": 2,
    "bottleneck_dim": 8,
    "in_context_len": 3,
    "in_context_start": 1,
    "num_classes": 5,
}
CPU = torch.device("cpu")


def small_model(seed: int = 0, **changes) -> JiTTransformer2DModel:
    """A network whose every weight matters: the zero-initialised ones are drawn too."""
    torch.manual_seed(seed)
    model = JiTTransformer2DModel(**SMALL | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(n: int = 3, size: int = 16, seed: int = 1):
    torch.manual_seed(seed)
    return torch.randn(n, 3, size, size), torch.rand(n), torch.arange(n) % 5


def gradients(model, inputs) -> list[torch.Tensor]:
    model.zero_grad()
    model(*inputs).sample.square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("file", FILES)
def test_forward_equals_the_reference(file):
    golden = load_golden(file)
    t = golden.tensors
    out = golden.model()(t["forward.x"], t["forward.t"], t["forward.y"]).sample
    assert (out - t["forward.out"]).abs().max() <= 1e-5 * t["forward.out"].std()


@pytest.mark.parametrize(
    ("name", "img_size", "parameters", "giga_macs"),
    [
        ("JiT-B/16", 256, 131_123_712, 25.2),
        ("JiT-L/16", 256, 458_877_664, 87.9),
        ("JiT-H/16", 256, 952_514_368, 181.9),
        ("JiT-G/16", 256, None, 383.7),
        ("JiT-B/32", 512, 133_190_400, 25.8),
        ("JiT-L/32", 512, 461_534_176, 88.6),
        ("JiT-H/32", 512, 956_055_616, 182.9),
        ("JiT-B/4", 64, None, 25.1),
        ("JiT-B/64", 1024, None, 27.9),
    ],
)
def test_presets_have_the_papers_parameters_and_multiply_adds(name, img_size, parameters, giga_macs):
    with torch.device("meta"):
        model = build_model(name, img_size, num_classes=1000)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert forward_macs(model.config, model.config.patch_size, img_size, img_size) / 1e9 == pytest.approx(
        giga_macs, abs=0.06
    )


def test_multiply_adds_are_those_that_pytorch_counts():
    model = small_model(img_size=24)
    # PyTorch's counter does not know the fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 24, 32), torch.rand(1), torch.tensor([0]))
    assert counter.get_total_flops() == 2 * forward_macs(model.config, model.config.patch_size, 24, 32)


def test_initial_weights_follow_their_laws():
    torch.manual_seed(0)
    model = build_model("JiT-Ti/7", 28, num_classes=200)
    normal = {
        "y_embedder.embedding_table.weight",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.weight",
        "in_context_posemb",
    }
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert (p == 0).all(), name
        elif name in normal:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        else:  # Xavier-uniform over the weight as a matrix
            matrix = p.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.98 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_a_new_network_predicts_zero():
    assert not build_model("JiT-Ti/4", 16, num_classes=3)(*batch()).sample.any()


def test_dropout_is_in_the_middle_half_only():
    model = JiTTransformer2DModel(**SMALL | {"depth": 9, "attn_dropout": 0.1, "proj_dropout": 0.2})
    for i, block in enumerate(model.blocks):
        expected = (0.1, 0.2, 0.2) if 2 <= i < 6 else (0.0, 0.0, 0.0)
        assert (block.attn.attn_dropout, block.attn.proj_dropout.p, block.mlp.dropout.p) == expected


@pytest.mark.parametrize("kind", ["attn_dropout", "proj_dropout"])
def test_dropout_acts_in_training_and_not_in_evaluation(kind):
    model, inputs = small_model(**{kind: 0.5}), batch()
    assert not torch.equal(model.train()(*inputs).sample, model(*inputs).sample)
    assert torch.equal(model.eval()(*inputs).sample, model(*inputs).sample)


def test_gradient_checkpointing_gives_the_same_gradients_and_recomputes_the_blocks():
    model, inputs = small_model(), batch()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients(model, inputs)
    assert len(calls) == 1
    model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model, inputs)))
    assert len(calls) == 3  # once more forward, once recomputed


def test_checkpointing_replays_the_dropout():
    model, inputs = small_model(proj_dropout=0.5, attn_dropout=0.5), batch()
    torch.manual_seed(3)
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model, inputs)))


def test_every_block_attends_through_sdpa_once(monkeypatch):
    calls = []
    sdpa = F.scaled_dot_product_attention

    def noted(*args, **kwargs):
        out = sdpa(*args, **kwargs)
        calls.append(out.dtype)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    assert calls == [torch.float32] * 4  # bf16 SDPA is slower on CPUs


def test_rotated_scores_depend_on_relative_positions_only():
    grid = (6, 7)
    cos, sin = functional.rope_table(16, grid, 7, 0, CPU)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (functional.rotate_pairs(x.expand(42, 1, 16), cos, sin)[:, 0] for x in (q, k))
    scores = (turned_q @ turned_k.T).unflatten(1, grid).unflatten(0, grid)  # (row, column, row', column')
    assert torch.allclose(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], atol=1e-5)
    assert (scores[0, 0] - scores[0, 0, 0, 0]).abs().flatten()[1:].min() > 1e-4  # each place has its own score
    assert torch.equal(functional.rope_table(16, grid, 7, 3, CPU)[1][:3], torch.zeros(3, 1, 8))


def test_the_hand_written_backwards_are_the_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    shift, scale = torch.randn(2, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    rope = tuple(torch.randn(3, 1, 4, dtype=torch.float64) for _ in range(2))
    check = torch.autograd.gradcheck
    assert check(functional.gated_silu, x)
    assert check(lambda x, w: functional.normalised_and_rotated(x, w, rope), (x, weight))
    assert check(functional.modulated_rms_norm, (x[:, :, 0], weight, shift, scale))


def test_the_compilers_formulas_are_those_of_eager(monkeypatch):
    model, inputs = small_model(), batch()
    by_hand = [model(*inputs).sample, *gradients(model, inputs)]
    monkeypatch.setattr(functional, "_by_hand", lambda x: False)
    plain = [model(*inputs).sample, *gradients(model, inputs)]
    for a, b in zip(by_hand, plain):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_regional_compilation_has_no_graph_break_and_two_graphs():
    model, inputs = small_model(), batch()
    expected = gradients(model, inputs)
    graphs = []

    def backend(graph, inputs):
        graphs.append([isinstance(n, int) for x in inputs for n in x.shape])
        return graph

    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    compiled = gradients(model, inputs)
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(expected, compiled))
    assert len(graphs) == 2  # without and with the in-context tokens, for all four blocks
    assert all(map(all, graphs))  # static shapes


def test_a_saved_model_comes_back_whole(tmp_path):
    model, inputs = small_model(proj_dropout=0.2).eval(), batch()
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = JiTTransformer2DModel.from_pretrained(tmp_path)  # through the meta device
    assert loaded.config.proj_dropout == 0.2
    assert torch.equal(model(*inputs).sample, loaded(*inputs).sample)


def test_a_model_from_the_meta_device_has_right_tables():
    model, inputs = small_model(), batch()
    for table in (functional.position_table, functional.rope_table, functional.time_frequencies):
        table.cache_clear()  # so that the first use could happen under the meta device
    with torch.device("meta"):
        empty = JiTTransformer2DModel(**SMALL)
        empty(*(x.to("meta") for x in inputs))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(*inputs).sample, model(*inputs).sample)


def test_tables_first_made_while_sampling_serve_training(monkeypatch):
    model, inputs = small_model(img_size=20), batch(size=20)
    monkeypatch.setattr(functional, "_by_hand", lambda x: False)  # here autograd keeps the tables
    functional.rope_table.cache_clear()
    with torch.inference_mode():
        model(*inputs)
    gradients(model, inputs)


def test_bf16_weights_leave_tables_time_and_residual_stream_in_float32():
    model, (x, t, y) = small_model().to(torch.bfloat16), batch()
    seen = []
    model.blocks[2].register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[2][0].dtype)))
    out = model(x, t, y).sample
    assert seen == [(torch.float32, torch.float32)]
    assert out.dtype == torch.bfloat16
    exact = small_model()(x, t, y).sample
    assert (out - exact).square().mean().sqrt() < 0.03 * exact.std()
    assert not {"pos_embed", "cos", "sin"} & {name.rpartition(".")[2] for name in model.state_dict()}
    assert list(model.buffers()) == []


def test_autocast_keeps_the_residual_stream_in_float32():
    model, inputs = small_model(), batch()
    seen = []
    model.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs).sample
        out.float().square().mean().backward()
    assert seen == [torch.float32]
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    exact = model(*inputs).sample
    assert (out - exact).square().mean().sqrt() < 0.03 * exact.std()


def test_another_image_size_sees_the_training_positions():
    half, full = functional.position_table(16, (4, 4), 8, CPU), functional.position_table(16, (8, 8), 8, CPU)
    assert torch.equal(full.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2), half)
    model = small_model()
    assert model(torch.randn(2, 3, 8, 24), 0.5, torch.tensor([0, 1])).sample.shape == (2, 3, 8, 24)
    with pytest.raises(ValueError, match="multiple of 4"):
        model(torch.randn(2, 3, 8, 22), 0.5)


def test_rows_and_columns_are_not_mixed_up():
    table = functional.position_table(16, (2, 3), 3, CPU).unflatten(1, (2, 3))[0]
    assert torch.equal(table[0, :, :8], table[1, :, :8])  # columns in the first half
    assert torch.equal(table[:, 0, 8:], table[:, 2, 8:])
    assert not torch.equal(table[:, 0, :8], table[:, 2, :8])


def test_no_labels_are_the_no_class_label_and_a_scalar_time_is_everyones():
    model, (x, _, _) = small_model(), batch()
    expected = model(x, torch.full((3,), 0.25), torch.full((3,), 5)).sample
    assert torch.equal(model(x, 0.25).sample, expected)
    assert torch.equal(model(x, torch.tensor(0.25), None, return_dict=False)[0], expected)
    assert not torch.equal(model(x, 0.25, torch.zeros(3, dtype=torch.long)).sample, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 18}, "use 16 or 20"),
        ({"num_heads": 5}, "use 4 heads"),
        ({"hidden_size": 36, "num_heads": 6}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_answered_with_some_that_do(changes, message):
    with pytest.raises(ValueError, match=message):
        JiTTransformer2DModel(**SMALL | changes)


def test_names_choose_sizes_and_dropout():
    with torch.device("meta"):
        assert build_model("JiT-H/16", 32, 2).config.proj_dropout == 0.2
        assert build_model("JiT-H/16", 32, 2, proj_dropout=0.0, attn_dropout=0.1).config.attn_dropout == 0.1
        assert build_model("JiT-H/16", 32, 2, proj_dropout=0.0).config.proj_dropout == 0.0
    with pytest.raises(UserError, match="JiT-B"):
        build_model("JiT-b/16", 32, 2)


def test_without_in_context_tokens_there_is_no_parameter_for_them():
    model = small_model(in_context_len=0)
    assert not hasattr(model, "in_context_posemb")
    assert all(g.abs().sum() > 0 for g in gradients(model, batch()))
