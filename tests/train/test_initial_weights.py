"""Starting from trained weights: what fits is kept, what does not is told, and it helps."""

import shutil

import pytest
import torch
from helpers import assert_same_state, last_checkpoint, rows, state, train_here
from safetensors.torch import load_file

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.base.errors import UserError
from jit_accel.config.completion import complete
from jit_accel.config.facts import Facts
from jit_accel.config.settings import Config
from jit_accel.data.batches.batch import Batch
from jit_accel.model.transformer import build_model
from jit_accel.train.initial_weights import Initial, Tuning, real_names, resample_patches, transfer

SIZES = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "bottleneck_dim": 12,
    "in_context_len": 2,
    "in_context_start": 1,
}


def network(**sizes) -> JiTTransformer2DModel:
    """A small one in which no weight is zero."""
    torch.manual_seed(0)
    model = JiTTransformer2DModel(**{**SIZES, "img_size": 8, "patch_size": 2, "num_classes": 3, **sizes})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def initial(names=("a", "b", "c"), **sizes) -> Initial:
    source = network(**sizes)
    names = names and [*names, *map(str, range(len(names), source.config.num_classes))][: source.config.num_classes]
    return Initial("runs/source", JiTPipeline(source, JiTScheduler(), class_names=names))


def fresh(**sizes) -> JiTTransformer2DModel:
    torch.manual_seed(1)
    return JiTTransformer2DModel(**{**SIZES, "img_size": 8, "patch_size": 2, "num_classes": 3, **sizes})


def test_weights_that_fit_are_all_kept_and_nothing_is_said_to_be_new():
    source, model = initial(), fresh()
    done = transfer(source, model, ("a", "b", "c"))
    assert not done.new
    assert not done.dropped
    assert done.kept.keys() == model.state_dict().keys()
    assert all(torch.equal(p, source.network.state_dict()[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("source_names", "names", "num_classes", "rows_of"),
    [
        (("a", "b", "c"), ("c", "new", "a", "b"), 4, [2, None, 0, 1]),  # by name, wherever it stands
        (("a", "b", "c"), ("x", "y", "z"), 3, [None] * 3),  # as many, but others
        (("a", "b", "c"), None, 3, [0, 1, 2]),  # no names: by number
        (None, ("x", "y", "z"), 3, [0, 1, 2]),
        (None, None, 5, [None] * 5),  # other numbers mean other classes
        (("a", "b", "c"), ("b", "a"), 4, [1, 0, None, None]),
    ],
)
def test_rows_of_the_label_table_go_by_name_and_no_class_is_always_kept(source_names, names, num_classes, rows_of):
    source, model = initial(source_names), fresh(num_classes=num_classes)
    before = model.y_embedder.embedding_table.weight.detach().clone()
    done = transfer(source, model, names)
    table, old = model.y_embedder.embedding_table.weight, source.network.y_embedder.embedding_table.weight
    assert torch.equal(table[-1], old[-1])
    for row, from_row in enumerate(rows_of):
        assert torch.equal(table[row], before[row] if from_row is None else old[from_row])
    assert bool(done.new) == (None in rows_of)
    kept = sum(row is not None for row in rows_of) + 1
    assert done.kept["y_embedder.embedding_table.weight"] == 32 * kept
    assert bool(done.dropped) == (kept < 4)


def test_numbers_and_single_classes_are_no_names():
    assert real_names(["0", "1", "2"]) is None
    assert real_names(["photos"]) is None
    assert real_names(None) is None
    assert real_names(["0", "cat"]) == ("0", "cat")


@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 6), (3, 4)])
def test_a_larger_patch_sees_and_draws_the_enlarged_patch(old, new):
    """With images enlarged patch by patch the resampled network does exactly what the source does, enlarged."""
    source = initial(img_size=4 * old, patch_size=old)
    model = fresh(img_size=4 * new, patch_size=new).eval()
    done = transfer(source, model, ("a", "b", "c"))
    assert sorted(done.resampled) == ["final_layer.linear.bias", "final_layer.linear.weight", "x_embedder.proj1.weight"]
    z, t, labels = torch.randn(2, 3, 4 * old, 4 * old), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    with torch.no_grad():
        small, large = source.network(z, t, labels).sample, model(enlarged(z, old, new), t, labels).sample
    assert small.std() > 0.1
    assert torch.allclose(large, enlarged(small, old, new), atol=1e-4)


def enlarged(images, old, new):
    """Each patch resized by itself."""
    cut = images.unflatten(3, (-1, old)).unflatten(2, (-1, old)).permute(0, 2, 4, 1, 3, 5)  # B rows columns 3 p p
    big = torch.nn.functional.interpolate(cut.flatten(0, 2), size=(new, new), mode="bilinear", antialias=True)
    return big.unflatten(0, cut.shape[:3]).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def test_a_smaller_patch_sees_as_much_the_same_as_it_can():
    """Smooth patches, which lose nothing when they shrink, are seen alike; white noise cannot be."""
    weights = {name: tensor.detach() for name, tensor in network(img_size=16, patch_size=8).state_dict().items()}
    shrunk = resample_patches(weights, 8, 4)["x_embedder.proj1.weight"]
    ramp = torch.linspace(-1, 1, 8)
    patch = torch.stack([ramp[:, None].expand(8, 8), ramp.expand(8, 8), torch.ones(8, 8)])
    small = torch.nn.functional.interpolate(patch[None], size=(4, 4), mode="bilinear", antialias=True)[0]
    before = torch.einsum("bcij,cij->b", weights["x_embedder.proj1.weight"], patch)
    after = torch.einsum("bcij,cij->b", shrunk, small)
    assert (after - before).norm() < 0.5 * before.norm()


def test_tensors_of_other_shapes_and_names_are_told():
    model = fresh(bottleneck_dim=8, in_context_len=0)
    done = transfer(initial(), model, ("a", "b", "c"))
    assert done.new["x_embedder.proj2.weight"] == "32 x 12 x 1 x 1 in the source, 32 x 8 x 1 x 1 here"
    assert "in_context_posemb" in done.dropped
    words = done.in_words("runs/source")
    assert "From runs/source: kept " in words
    assert "new: x_embedder.proj1.weight (12 x 3 x 2 x 2 in the source, 8 x 3 x 2 x 2 here)" in words


# --- real runs


@pytest.fixture(scope="module")
def base(images, tmp_path_factory):
    """A run of 30 steps on the four classes, of a network that learns from them."""
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = ["--data_path", str(images), "--max_steps", "30", "--batch_size", "8", "--noise_scale", "0.8"]
    flags += ["--guidance_scale", "1.5", "--model", "JiT-Ti/7"]
    assert train_here(*flags, "--output_dir", str(folder)) == 0
    return folder


def first_losses(output_dir, count=3):
    return sum(row["train/loss"] for row in rows(output_dir)[:count]) / count


def test_a_run_from_trained_weights_begins_where_the_other_ended(images, base, tmp_path, capsys):
    """Model, image size, noise and guidance are the source's; the loss is far below an untrained network's."""
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "3", "--batch_size", "8"]
    scratch = first_losses(base)
    assert train_from(base, *flags) == 0
    assert first_losses(tmp_path) < 0.65 * scratch
    assert first_losses(tmp_path) < 1.3 * sum(row["train/loss"] for row in rows(base)[-10:]) / 10
    printed = capsys.readouterr().out
    assert f"From {base}: kept 70 tensors" in printed
    assert "new:" not in printed
    assert "hardly move" not in printed
    settings = (tmp_path / "config.yaml").read_text()
    assert "model: JiT-Ti/7" in settings
    assert "noise_scale: 0.8" in settings
    assert "guidance_scale: 1.5" in settings
    assert str(base) not in (tmp_path / "pipeline" / "README.md").read_text()


def train_from(source, *flags) -> int:
    """Train without naming the model or the image size."""
    import helpers

    given = helpers.TINY
    helpers.TINY = given[4:]
    try:
        return train_here("--init_from", str(source), *flags)
    finally:
        helpers.TINY = given


def test_an_adapter_for_data_of_other_classes_is_refused_for_that_reason(base, tmp_path, capsys):
    flags = ("--data_path", "builtin:fashion_mnist", "--output_dir", str(tmp_path / "out"), "--lora_rank", "2")
    assert train_from(base, *flags, "--dry_run") == 2
    assert "has 10 classes" in (printed := capsys.readouterr().err)
    assert "an adapter learns no new class" in printed


def test_other_classes_size_and_patch_train_from_it_too(images, base, tmp_path, capsys):
    data = tmp_path / "two"
    for name in ("Bag", "Trouser"):
        shutil.copytree(images / name, data / name)
    flags = ["--data_path", str(data), "--output_dir", str(tmp_path / "out"), "--num_classes", "3", "--dry_run"]
    assert train_here(*flags, "--init_from", str(base), "--model", "JiT-Ti/14", "--img_size", "56") == 0
    printed = capsys.readouterr().out
    assert "resampled to the new patch size: x_embedder.proj1.weight" in printed
    assert "new: 1 of 3 rows of y_embedder.embedding_table.weight (classes the source does not have: 2)" in printed
    assert "dropped: 2 of 5 rows of y_embedder.embedding_table.weight" in printed
    assert "56 px instead of 28" in printed
    assert "--noise_scale 1 instead of 0.8" in printed


def test_a_resumed_run_needs_its_source_no_more_and_equals_the_uninterrupted_one(images, base, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(base / "pipeline", source)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--data_path", str(images), "--resume", "auto", "--lr_schedule", "constant"]
    assert train_from(source, *flags, "--output_dir", str(whole)) == 0
    assert train_from(source, *flags, "--output_dir", str(broken), "--max_steps", "3") == 0
    shutil.rmtree(source)
    assert train_from(source, *flags, "--output_dir", str(broken)) == 0
    assert rows(broken) == rows(whole)
    assert_same_state(whole, broken)


def test_the_first_step_sees_the_weights_of_a_checkpoint_and_so_do_the_averages(images, base, tmp_path):
    """At a learning rate of 0, which the first step of a warm-up has, everything is the source's average still."""
    flags = ["--data_path", str(images), "--max_steps", "1", "--warmup_steps", "1", "--output_dir", str(tmp_path)]
    assert train_from(last_checkpoint(base), *flags) == 0
    source = load_file(base / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    first = state(tmp_path)
    for stem in ("model", "ema_auto"):
        assert all(torch.equal(first[f"{stem}/{name}"], tensor) for name, tensor in source.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from", "nowhere"], "--init_from nowhere: holds no pipeline (model_index.json) and no checkpoint"),
        (["--init_from", ""], "--init_from: is empty"),
        (["--init_from", "{images}"], "--init_from {images}: holds no pipeline"),
        (["--init_from", "{weights}"], "is a file: make a pipeline folder of it first, python -m jit_accel.convert"),
        (
            ["--init_from", "{base}", "--model", "JiT-S/7"],
            "is of another size than --model JiT-S/7: depth 4, hidden_size 192, num_heads 3, mlp_ratio 4 against "
            "depth 12, hidden_size 384, num_heads 6, mlp_ratio 4: leave --model out",
        ),
        (
            ["--init_from", "{base}", "--model", "JiT-Ti/7", "--prediction", "v"],
            "predicts x, and --prediction is v: .*use --prediction x",
        ),
        (["--init_from", "{broken}"], "--init_from {broken}: the pipeline cannot be loaded"),
    ],
)
def test_sources_that_cannot_be_used_are_refused(images, base, tmp_path, capsys, flags, message):
    broken = tmp_path / "broken"
    if "{broken}" in flags:
        shutil.copytree(base / "pipeline", broken)
        (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    weights = base / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    places = {"images": images, "base": base, "weights": weights, "broken": broken}
    flags = [flag.format(**places) for flag in flags]
    out = tmp_path / "out"
    assert train_here("--data_path", str(images), "--output_dir", str(out), *flags) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert all(part in printed for part in message.format(**places).split(".*")), printed
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_a_network_of_no_known_size_is_refused_with_the_sizes():
    config = Config.of(data_path="x", init_from="runs/source")
    with pytest.raises(UserError, match=r"depth 2, hidden_size 32.* is none of the sizes .*JiT-Ti"):
        complete(config, Facts(num_images=100, start=initial().start))


def test_a_pipeline_without_a_run_or_names_serves_as_source(images, tmp_path, capsys):
    model = build_model("JiT-Ti/7", img_size=28, num_classes=4)
    JiTPipeline(model, JiTScheduler()).save_pretrained(tmp_path / "mine")
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert train_from(tmp_path / "mine", *flags) == 0
    printed = capsys.readouterr().out
    assert f"From {tmp_path}/mine: kept 70 tensors" in printed
    assert "new:" not in printed


def test_labels_are_looked_up_on_the_device_of_the_batch():
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    batch = Batch(torch.empty(3, 3, 4, 4), labels, torch.arange(3), [], None, None)
    assert Tuning((), torch.arange(5)).labels_of(batch).device.type == "meta"
