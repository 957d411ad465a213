"""LoRA: trained beside frozen weights, kept alone, loaded by diffusers' own call."""

import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_state, last_checkpoint, rows, state, train_group, train_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_initial_weights import initial, network

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.base.errors import UserError
from jit_accel.model.loading import load_pipeline
from jit_accel.model.lora import Adapter, merged
from jit_accel.train.initial_weights import refuse_what_an_adapter_cannot_learn, transfer

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
TARGETS = ("attn.qkv", "mlp.w3")
Z, T, LABELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([0.1, 0.8]), [1, 3]


def predict(model, z=Z, t=T, labels=LABELS):
    with torch.no_grad():
        return model(z, t, torch.tensor(labels)).sample


def adapted(rank=2, alpha=3.0, targets=TARGETS):
    model = network()
    return model, Adapter(model, rank=rank, alpha=alpha, dropout=0.0, targets=targets)


def trained(model) -> dict[str, torch.Tensor]:
    """An adapter's tensors, as if it had been trained."""
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained():
    model, _ = adapted()
    assert torch.equal(predict(model), predict(network()))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2  # A and B, two targets, two blocks
    assert all(".lora_" in name for name in names)


def test_a_saved_adapter_loads_by_diffusers_call_and_does_what_was_trained(tmp_path):
    """Loaded = trained = merged = fused; at weight 0, unloaded or unfused it is the base again."""
    model, adapter = adapted()
    base = predict(network())
    weights = trained(model)
    assert (predict(model) - base).std() > 0.1 * base.std()
    adapter.save(weights, tmp_path / "lora")
    pipe = JiTPipeline(network(), JiTScheduler())
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    assert torch.equal(predict(pipe.transformer), predict(model))
    plain = network()
    plain.load_state_dict(merged(plain.state_dict(), weights, adapter.scale))
    assert torch.allclose(predict(plain), predict(model), atol=1e-5)
    pipe.fuse_lora()
    assert torch.allclose(predict(pipe.transformer), predict(model), atol=1e-5)
    pipe.unfuse_lora()
    assert torch.allclose(predict(pipe.transformer), predict(model), atol=1e-5)
    pipe.set_adapters("mine", 0.0)
    assert torch.allclose(predict(pipe.transformer), base, atol=1e-5)
    pipe.set_adapters(["mine"], [1.0])
    assert pipe.get_active_adapters() == ["mine"]
    pipe.disable_lora()
    assert torch.allclose(predict(pipe.transformer), base, atol=1e-5)
    pipe.unload_lora_weights()
    assert pipe.transformer.state_dict().keys() == network().state_dict().keys()
    assert torch.allclose(predict(pipe.transformer), base, atol=1e-5)


def test_two_adapters_add_up_and_one_can_be_taken_away(tmp_path):
    model, adapter = adapted()
    adapter.save(trained(model), tmp_path / "one")
    pipe = JiTPipeline(network(), JiTScheduler())
    pipe.load_lora_weights(tmp_path / "one", adapter_name="one")
    alone = predict(pipe.transformer)
    pipe.load_lora_weights(load_file(tmp_path / "one" / LORA_FILE), adapter_name="two")  # tensors know no alpha: rank
    pipe.set_adapters(["one", "two"], [0.4, 0.9])  # 0.4 x 3/2 + 0.9 x 1 = 1.5 = alpha / rank of the first
    assert torch.allclose(predict(pipe.transformer), alone, atol=1e-5)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert torch.allclose(predict(pipe.transformer), alone, atol=1e-5)


def test_what_the_pipeline_saves_it_loads(tmp_path):
    from peft.utils import get_peft_model_state_dict

    model, _ = adapted()
    trained(model)
    config = model.peft_config["default"].to_dict()
    weights = get_peft_model_state_dict(model)
    JiTPipeline.save_lora_weights(tmp_path, weights, transformer_lora_adapter_metadata=config)
    pipe = JiTPipeline(network(), JiTScheduler())
    pipe.load_lora_weights(str(tmp_path / LORA_FILE))
    assert torch.equal(predict(pipe.transformer), predict(model))


def test_a_pipeline_is_saved_with_its_adapter_merged_or_not_at_all(tmp_path):
    """diffusers alone would write weights under names that load as random ones."""
    model, adapter = adapted()
    adapter.save(trained(model), tmp_path / "lora")
    pipe = JiTPipeline(network(), JiTScheduler())
    pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapter is attached: fuse_lora\(\) and unload_lora_weights\(\) first"):
        pipe.save_pretrained(tmp_path / "pipeline")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipeline")
    assert torch.allclose(
        predict(JiTPipeline.from_pretrained(tmp_path / "pipeline").transformer), predict(model), atol=1e-5
    )


def test_files_without_an_adapter_for_this_network_are_refused(tmp_path):
    pipe = JiTPipeline(network(), JiTScheduler())
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=r"no LoRA weights of this network, whose names begin with transformer"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_lora_weights.bin").write_bytes(b"never opened")
    with pytest.raises(OSError, match=r"safetensors"):
        pipe.load_lora_weights(tmp_path / "pickle")


def test_without_peft_both_ends_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(ValueError, match=r"PEFT backend is required"):
        JiTPipeline(network(), JiTScheduler()).load_lora_weights(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora_rank 2: needs peft: pip install 'jit_accel\[lora\]'"):
        adapted()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 33}, r"lora_rank 33: must not be above 32"),
        ({"targets": ("attn.kqv",)}, r"lora_targets attn.kqv: must be the end .*attn.qkv.*Did you mean 'attn.qkv'"),
        ({"targets": ("attn.qkv", "x_embedder.proj1")}, r"lora_targets x_embedder.proj1: .*Linear"),
    ],
)
def test_adapters_that_fit_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        adapted(**options)


def data(names, is_labelled=True):
    return SimpleNamespace(name="photos", class_names=names, num_classes=len(names) or 2, is_labelled=is_labelled)


@pytest.mark.parametrize(
    ("source_names", "names", "labels", "class_names"),
    [
        (("a", "b", "c"), ("c", "a"), [2, 0, 2], ["a", "b", "c"]),  # a part of the classes, in another order
        (("a", "b", "c"), ("x", "y"), [0, 1, 2], ["x", "y", "c"]),  # new classes take the place of old ones
        (("a", "b", "c"), (), [0, 1, 2], ["a", "b", "c"]),
        (None, ("x", "y"), [0, 1, 2], ["x", "y"]),
        (("1", "2", "0"), ("0", "1", "2"), [2, 0, 1], ["1", "2", "0"]),  # numbers as names, in another order
        (("cafe\u0301", "b", "c"), ("caf\u00e9", "c"), [0, 2, 2], ["cafe\u0301", "b", "c"]),
    ],
)
def test_labels_of_an_adapters_data_are_the_sources_classes_of_those_names(source_names, names, labels, class_names):
    found, all_names = initial(source_names).labels_for(data(names))
    assert found.tolist() == labels
    assert all_names == class_names


def test_an_adapter_is_refused_where_it_would_have_to_learn_what_is_frozen():
    source = initial()
    with pytest.raises(UserError, match=r"photos has the classes x, .* learns no new class"):
        source.labels_for(data(("a", "x")))
    with pytest.raises(UserError, match=r"photos has 4 classes, and runs/source 3: "):
        source.labels_for(data(("a", "b", "c", "d")))
    for sizes in ({"num_classes": 4}, {"patch_size": 4}, {"in_context_start": 0}, {"bottleneck_dim": 8}):
        model = network(**sizes)
        with pytest.raises(UserError, match=r"an adapter needs all of runs/source as it is"):
            refuse_what_an_adapter_cannot_learn(source, transfer(source, model, None), model)


# --- real runs


@pytest.fixture(scope="module")
def base(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = ("--data_path", str(images), "--model", "JiT-Ti/7", "--max_steps", "12")
    assert train_here(*flags, "--output_dir", str(folder)) == 0
    return folder / "pipeline"


LORA = ["--lora_rank", "2", "--lora_alpha", "4", "--lora_dropout", "0.1", "--resume", "auto", "--learning_rate", "0.01"]
LORA += ["--lr_schedule", "constant", "--max_steps", "8", "--model", "JiT-Ti/7"]


@pytest.fixture(scope="module")
def run(images, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    two = folder.with_name("two")
    for name in ("Bag", "Trouser"):
        shutil.copytree(images / name, two / name)
    flags = ["--data_path", str(two), "--init_from", str(base), *LORA, "--save_every_steps", "4"]
    assert train_here(*flags, "--output_dir", str(folder)) == 0
    return folder


def weights_of(pipeline):
    return {name: p.detach() for name, p in pipeline.transformer.named_parameters()}


def test_a_run_trains_only_the_adapter_and_leaves_it_alone_and_merged(run, base):
    kept = state(run)
    assert all(".lora_" in name for name in kept)
    assert {name.split("/")[0] for name in kept} == {"model", "ema_auto", "optimizer"}
    sizes = [file.stat().st_size for file in last_checkpoint(run).iterdir()]
    assert sum(sizes) < 0.1 * (base / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    pipe, merged_pipe = JiTPipeline.from_pretrained(base), JiTPipeline.from_pretrained(run / "pipeline")
    assert merged_pipe.config.class_names == pipe.config.class_names  # all four, though two were trained on
    with safe_open(run / "lora" / LORA_FILE, "pt") as file:
        assert all(name.startswith("transformer.blocks.") for name in file.keys())  # noqa: SIM118 (not a dict)
    z, t, labels = torch.randn(2, 3, 28, 28), torch.tensor([0.1, 0.8]), [0, 4]
    before = predict(pipe.transformer, z, t, labels)
    pipe.load_lora_weights(run / "lora")
    after, wanted = (predict(p.transformer, z, t, labels) for p in (pipe, merged_pipe))
    assert torch.allclose(after, wanted, atol=1e-4)
    assert (after - before).abs().max() > 1e-2
    of_checkpoint = weights_of(load_pipeline(str(last_checkpoint(run))))
    for name, weight in weights_of(merged_pipe).items():
        assert torch.equal(of_checkpoint[name], weight), name


def test_a_resumed_adapter_equals_the_uninterrupted_one_and_its_base_must_be_the_same(run, base, tmp_path, capsys):
    flags = ["--data_path", str(run.with_name("two")), *LORA, "--output_dir", str(tmp_path / "out")]
    shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "out" / "checkpoints" / "step_00000004")
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    assert train_here(*flags, "--init_from", str(moved), "--gradient_checkpointing") == 0
    assert rows(tmp_path / "out") == rows(run)[4:]
    assert_same_state(tmp_path / "out", run)
    file = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["final_layer.linear.bias"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert train_here(*flags, "--init_from", str(moved), "--max_steps", "9") == 2
    assert f"--init_from {moved}: holds other weights (SHA-256" in capsys.readouterr().err
    assert train_here(*flags, "--init_from", str(base), "--lora_rank", "3") == 2
    assert "--lora_rank is 3, the checkpoint has 2" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharding", [{}, {"TEST_FSDP2_PRECISION": "no"}], ids=["ddp", "fsdp2"])
def test_two_processes_train_the_adapter_of_one(images, base, tmp_path, sharding):
    flags = ["--data_path", str(images), "--init_from", str(base), *LORA, "--lora_dropout", "0", "--max_steps", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_here(*flags, "--output_dir", str(one)) == 0
    train_group(tmp_path, *flags, "--batch_size", "2", "--output_dir", str(two), num_processes=2, environment=sharding)
    losses = [[row["train/loss"] for row in rows(folder)] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    a, b = (load_file(folder / "lora" / LORA_FILE) for folder in (one, two))
    assert a.keys() == b.keys()
    assert sum((a[name] - b[name]).norm() for name in a) < 0.02 * sum(tensor.norm() for tensor in a.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "4"], "lora_rank 4: an adapter needs trained weights to stand on: add --init_from FOLDER"),
        (["--lora_rank", "0", "--init_from", "x"], "lora_rank 0: must be at least 1"),
        (["--lora_rank", "-2", "--init_from", "x"], "lora_rank -2: must be at least 1"),
        (["--lora_alpha", "4", "--init_from", "x"], "lora_alpha 4.0: is for an adapter: add --lora_rank"),
        (["--lora_rank", "4", "--lora_alpha", "0", "--init_from", "x"], "lora_alpha 0: must be positive"),
        (["--lora_rank", "4", "--lora_dropout", "1", "--init_from", "x"], "lora_dropout 1: must be in [0, 1)"),
        (["--lora_rank", "4", "--optimizer", "muon", "--init_from", "x"], "optimizer muon: is for whole matrices"),
    ],
)
def test_wrong_settings_end_before_anything_is_loaded(tmp_path, capsys, flags, message):
    assert train_here("--data_path", "nowhere", "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")
