"""Between the reference's checkpoints, pipeline folders and safetensors files."""

import argparse
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import FILES, load_golden
from helpers import last_checkpoint, state, train_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import serialization

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.base.errors import UserError
from jit_accel.config.presets import PRESETS, sides_of
from jit_accel.config.run_groups import HubConfig
from jit_accel.convert import main
from jit_accel.convert.run import written_whole
from jit_accel.convert.settings import FOLDER, NetworkFlags, SamplingFlags, read_class_names
from jit_accel.convert.sizes import from_arguments, network_config, sampling_settings
from jit_accel.model.functional import position_table
from jit_accel.model.loading import load_pipeline
from jit_accel.model.transformer import JiTTransformer2DModel

CONTEXT = ("--in_context_start", "1")  # of the golden network, which has no preset's sizes


def golden_weights(prefix: str = "net.", shift: float = 0.0) -> dict[str, torch.Tensor]:
    weights = {name.removeprefix("net."): tensor for name, tensor in load_golden("tiny").weights.items()}
    return {prefix + name: t + shift * (name != "pos_embed") for name, t in weights.items()}


def arguments(**more) -> argparse.Namespace:
    told = {"model": "JiT-X/4", "img_size": 16, "class_num": 10, "noise_scale": 2.0, "sampling_method": "heun"}
    told |= {"cfg": 2.9, "interval_min": 0.2, "interval_max": 0.9, "P_mean": -0.8, "output_dir": "/home/me/out"}
    return argparse.Namespace(**told | more)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A checkpoint as the reference writes it; its three sets of weights differ."""
    path = tmp_path_factory.mktemp("reference") / "checkpoint-last.pth"
    sets = {
        "model": golden_weights(shift=0.5),
        "model_ema1": golden_weights(),
        "model_ema2": golden_weights(shift=0.25),
    }
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({**sets, "optimizer": optimizer, "epoch": 199, "args": arguments()}, path)
    return path


@pytest.fixture(scope="module")
def folder(reference) -> Path:
    folder = reference.parent / "pipeline"
    assert convert(reference, folder, *CONTEXT) == 0
    return folder


def convert(source, target, *flags: str) -> int:
    return main(["--input", str(source), "--output", str(target), *map(str, flags)])


def refusal(capsys, source, target, *flags: str) -> str:
    """What is said where a conversion is refused; nothing is left of it then."""
    there = set(Path(target).parent.iterdir())
    assert convert(source, target, *flags) == 2
    assert set(Path(target).parent.iterdir()) == there
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_help_needs_no_torch():
    code = (
        "import sys, jit_accel.convert\n"
        "try: jit_accel.convert.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'diffusers', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    names = [field.name for group in (NetworkFlags, SamplingFlags, HubConfig) for field in fields(group)]
    assert [name for name in (*names, "input", "output", "weights", "dtype") if f"--{name}" not in shown] == []


# --- round trips


def test_a_reference_checkpoint_becomes_a_pipeline_with_its_outputs(folder):
    golden, pipe = load_golden("tiny"), JiTPipeline.from_pretrained(folder)
    assert {name: pipe.transformer.config[name] for name in golden.config} == golden.config
    inputs = [golden.tensors[f"forward.{name}"] for name in "xty"]
    expected = golden.tensors["forward.out"]
    with torch.no_grad():
        out = pipe.transformer(*inputs).sample
    assert (out - expected).abs().max() <= 1e-5 * expected.std()
    assert pipe.scheduler.config.noise_scale == 2.0
    assert (pipe.config.guidance_scale, pipe.config.guidance_interval) == (2.9, [0.2, 0.9])


@pytest.mark.parametrize(("kind", "flags"), [("back.pth", ()), ("one.safetensors", ())])
def test_a_pipeline_goes_back_bit_for_bit(folder, reference, tmp_path, kind, flags):
    target = tmp_path / kind
    assert convert(folder, target, *flags) == 0
    expected = golden_weights()  # with the fixed table
    if target.suffix == ".pth":
        content = torch.load(target, weights_only=True)
        assert set(content) == {"model", "model_ema1", "model_ema2", "epoch", "args"}
        assert content["args"]["img_size"] == 16
        assert content["args"]["cfg"] == 2.9
        written = [content["model"], content["model_ema1"], content["model_ema2"]]
        assert target.stat().st_size < 1.1 * sum(t.numel() * 4 for t in expected.values())  # stored once
    else:
        written = [load_file(target)]
        with safe_open(target, "pt") as file:
            assert json.loads(file.metadata()["config"])["num_heads"] == 4
    for weights in written:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # And once more, without any flag: the file tells what shapes do not.
    assert convert(target, tmp_path / "again") == 0
    one, other = (JiTPipeline.from_pretrained(place) for place in (folder, tmp_path / "again"))
    assert dict(one.transformer.config) | {"_name_or_path": ""} == dict(other.transformer.config) | {
        "_name_or_path": ""
    }
    assert one.scheduler.config.noise_scale == other.scheduler.config.noise_scale
    assert one.config.guidance_interval == other.config.guidance_interval


@pytest.mark.parametrize(
    ("weights", "shift"), [(None, 0.0), ("model", 0.5), ("ema1", 0), ("ema2", 0.25), ("0.9996", 0.25)]
)
def test_the_weights_asked_for_are_taken(reference, tmp_path, weights, shift):
    target = tmp_path / "one.safetensors"
    assert convert(reference, target, *CONTEXT, *(("--weights", weights) if weights else ())) == 0
    written, expected = load_file(target), golden_weights(shift=shift)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        *(("plain", prefix) for prefix in ("", "net.", "module.net.", "net._orig_mod.", "_orig_mod.module.")),
        *((kind, prefix) for kind in ("state_dict", "legacy", "safetensors") for prefix in ("", "net.")),
    ],
)
def test_plain_weights_under_any_prefix_are_read(tmp_path, kind, prefix):
    weights, source = golden_weights(prefix), tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(weights, source)
    else:
        content = {"state_dict": weights} if kind == "state_dict" else weights
        torch.save(content, source, _use_new_zipfile_serialization=kind != "legacy")
    assert convert(source, tmp_path / "out.safetensors", *CONTEXT) == 0
    written, expected = load_file(tmp_path / "out.safetensors"), golden_weights()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_run_and_its_checkpoints_are_converted_by_decay(images, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--data_path", str(images), "--output_dir", str(run), "--max_steps", "2", "--num_inference_steps", "1"]
    assert train_here(*flags, "--ema_decays", "0.5", "0.9996", "0.9999") == 0
    saved = state(run)
    # In the reference's sense, where the run has both; else by their order.
    for weights, stem in (("ema1", "ema_0.9999"), ("ema2", "ema_0.9996"), ("0.5", "ema_0.5"), ("model", "model")):
        target = tmp_path / f"{weights}.safetensors"
        assert convert(run, target, "--weights", weights) == 0
        written = load_file(target)
        assert all(
            torch.equal(written[f"net.{n}"], t)
            for n, t in load_file(last_checkpoint(run) / f"{stem}.safetensors").items()
        )
    assert convert(run, tmp_path / "pipeline.safetensors") == 0  # the run's pipeline has its first average
    written = load_file(tmp_path / "pipeline.safetensors")
    assert all(
        torch.equal(written["net." + n.partition("/")[2]], t) for n, t in saved.items() if n.startswith("ema_0.5/")
    )
    assert "0.5, 0.9996" not in refusal(capsys, run, tmp_path / "x.pth", "--weights", "ema7")
    file = last_checkpoint(run) / "model.safetensors"
    file.write_bytes(b"\xff" * 100 + file.read_bytes()[100:])
    assert "cannot be read" in refusal(capsys, run, tmp_path / "x.pth", "--weights", "model")


THEIR_NAMES = {  # of the JiT proposed for diffusers, in its pull request 13098
    "final_layer.norm_final": "norm_final",
    "final_layer.linear": "linear_final",
    "final_layer.adaLN_modulation.1": "adaLN_modulation_final",
    "adaLN_modulation.1": "adaLN_modulation",
}
LATER_NAMES = {"attn.q_norm": "attn.norm_q", "attn.k_norm": "attn.norm_k", "attn.proj": "attn.to_out.0"}
LATER_NAMES |= THEIR_NAMES


def diffusers_weights(*, three: bool) -> dict[str, torch.Tensor]:
    """The golden network under the names of the pull request: q, k and v in one matrix at first, in three later."""
    renamed = {}
    for name, tensor in golden_weights("").items():
        for ours, theirs in (LATER_NAMES if three else THEIR_NAMES).items():
            name = name.replace(ours, theirs)
        if three and ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("qkv", f"to_{part}")] = third.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def diffusers_folder(folder: Path, weights: dict[str, torch.Tensor], **config) -> Path:
    """A pipeline folder as that class would be saved."""
    sizes = {"_class_name": "JiTTransformer2DModel", "sample_size": 16, "patch_size": 4, "num_attention_heads": 4}
    sizes |= {"in_context_start": 1, "dropout": 0.2, "norm_eps": 1e-6, "num_classes": 10}
    labels = {str(i): f"name {i}, other name {i}" for i in range(10)}
    solver = "FlowMatchEulerDiscreteScheduler"
    parts = {"transformer": ["diffusers", "JiTTransformer2DModel"], "scheduler": ["diffusers", solver]}
    index = {"_class_name": "JiTPipeline", **parts, "id2label": labels}
    files = {"model_index.json": index, "transformer/config.json": sizes | config}
    files["scheduler/scheduler_config.json"] = {"_class_name": solver, "shift": 1.0}
    for place, content in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(json.dumps(content))
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("three", [False, True], ids=["qkv in one", "qkv in three"])
@pytest.mark.parametrize("given", ["pipeline", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_the_layout_proposed_for_diffusers_becomes_a_pipeline(folder, tmp_path, three, given):
    theirs = diffusers_folder(tmp_path / "pipeline", diffusers_weights(three=three))
    assert convert(theirs if given == "pipeline" else theirs / given, tmp_path / "new") == 0
    new, old = load_pipeline(tmp_path / "new"), load_pipeline(folder)
    assert state_equal(new.transformer, old.transformer)
    assert new.transformer.config.proj_dropout == 0.2
    assert new.transformer.config.in_context_start == 1
    assert new.config.class_names == [f"name {i}" for i in range(10)]


def state_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def test_weights_of_that_layout_in_several_files_variants_or_pickles_are_read(folder, tmp_path, capsys):
    theirs = diffusers_folder(tmp_path / "pipeline", weights := diffusers_weights(three=True))
    place, (name,) = theirs / "transformer", ["diffusion_pytorch_model"]
    (place / f"{name}.safetensors").unlink()
    names = sorted(weights)
    for number, part in ((1, names[::2]), (2, names[1::2])):
        save_file({n: weights[n] for n in part}, place / f"{name}.fp16-0000{number}-of-00002.safetensors")
    assert convert(theirs, tmp_path / "shards") == 0
    save_file(weights, place / f"{name}.bf16.safetensors")
    assert "fp16" in refusal(capsys, theirs, tmp_path / "new")
    for file in place.glob("*.safetensors"):
        file.unlink()
    assert "no weights" in refusal(capsys, theirs, tmp_path / "new")
    torch.save(weights, place / f"{name}.bin")
    assert convert(theirs, tmp_path / "pickle") == 0
    for made in ("shards", "pickle"):
        assert state_equal(load_pipeline(tmp_path / made).transformer, load_pipeline(folder).transformer)


def test_the_network_of_a_pipeline_folder_is_read_with_the_settings_beside_it(folder, tmp_path):
    assert convert(folder / "transformer", tmp_path / "new") == 0
    new, old = load_pipeline(tmp_path / "new"), load_pipeline(folder)
    assert state_equal(new.transformer, old.transformer)
    assert dict(new.scheduler.config) == dict(old.scheduler.config)
    assert new.config.guidance_scale == old.config.guidance_scale


def test_a_repository_of_that_layout_is_read(folder, tmp_path, monkeypatch):
    theirs = diffusers_folder(tmp_path / "cached", diffusers_weights(three=True))
    monkeypatch.setattr(JiTPipeline, "download", lambda place: str(theirs))
    assert convert("owner/name", tmp_path / "new") == 0
    assert state_equal(load_pipeline(tmp_path / "new").transformer, load_pipeline(folder).transformer)


def test_what_that_layout_cannot_say_here_is_told(tmp_path, capsys):
    weights = diffusers_weights(three=True)
    other = diffusers_folder(tmp_path / "eps", weights, norm_eps=1e-5)
    assert "norm_eps" in refusal(capsys, other, tmp_path / "new")
    del weights["blocks.0.attn.to_k.weight"]
    theirs = diffusers_folder(tmp_path / "lost", weights)
    assert "only q, v" in refusal(capsys, theirs, tmp_path / "new")
    with pytest.raises(UserError, match=r"jit_accel\.convert --input") as refused:  # other programs name it
        load_pipeline(theirs)
    assert refused.value.value == theirs


def test_types_are_kept_or_changed_as_asked(folder, tmp_path, capsys):
    assert convert(folder, tmp_path / "half", "--dtype", "bfloat16") == 0
    assert convert(tmp_path / "half", tmp_path / "same.safetensors", "--dtype", "same") == 0
    assert convert(tmp_path / "half", tmp_path / "wide.pth") == 0
    same, wide = load_file(tmp_path / "same.safetensors"), torch.load(tmp_path / "wide.pth", weights_only=True)["model"]
    assert {t.dtype for t in same.values()} == {torch.bfloat16}
    assert all(torch.equal(wide[name], same[name].float()) for name in same if not name.endswith("pos_embed"))
    assert convert(tmp_path / "same.safetensors", tmp_path / "again") == 0  # its table is as good as its type
    weights = golden_weights()
    weights["net.final_layer.linear.bias"] = weights["net.final_layer.linear.bias"] + 1e6
    torch.save(weights, tmp_path / "large.pth")
    told = refusal(capsys, tmp_path / "large.pth", tmp_path / "x", *CONTEXT, "--dtype", "float16")
    assert "use bfloat16" in told


# --- malicious and broken files


class Call:
    """Pickles to a call of this function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, object]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, code),
        "numpy": Call(np.fromfile, str(marker)),
        "getattr": argparse.Namespace(img_size=Call(getattr, "x", "upper")),
        "nested": argparse.Namespace(model=Call(exec, code)),
        "array": np.zeros(3),
    }


ATTACKS = list(attacks(Path("marker")))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "old_pickle", "tar"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_nothing_is_run(tmp_path, capsys, attack, form):
    marker, source = tmp_path / "marker", tmp_path / "checkpoint.pth"
    content = {"model": golden_weights(), "args": attacks(marker)[attack]}
    if form in ("zip", "legacy"):
        torch.save(content, source, _use_new_zipfile_serialization=form == "zip")
    elif form == "tar":
        with tarfile.open(source, "w") as tar:
            for name in ("sys_info", "storages", "tensors", "pickle"):
                data = pickle.dumps(content["args"], protocol=2)
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        source.write_bytes(pickle.dumps(content["args"], protocol=4 if form == "pickle" else 2))
    assert "refused" in refusal(capsys, source, tmp_path / "out", *CONTEXT)
    assert not marker.exists()


def test_what_other_libraries_allow_is_not_allowed_here(reference, tmp_path, capsys):
    source = tmp_path / "array.pth"
    torch.save({"model": golden_weights(), "args": Call(os.path.join, "a", "b")}, source)
    with serialization.safe_globals([os.path.join]):
        assert "posixpath.join" in refusal(capsys, source, tmp_path / "out", *CONTEXT)
        assert os.path.join in serialization.get_safe_globals()


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -9])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_cut_off_file_is_told(tmp_path, capsys, kept, form):
    whole = tmp_path / "whole"
    if form == "safetensors":
        save_file(golden_weights(), whole)
    else:
        torch.save(golden_weights(), whole, _use_new_zipfile_serialization=form == "zip")
    source = tmp_path / ("cut.safetensors" if form == "safetensors" else "cut.pth")
    source.write_bytes(whole.read_bytes()[:kept])
    told = refusal(capsys, source, tmp_path / "out", *CONTEXT)
    assert "cannot be read" in told or "refused" in told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "holds no pipeline"),
        (lambda path: os.mkfifo(path), "neither a file nor a folder"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git lfs pull"),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path), "TorchScript"),
        (lambda path: torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, path), "holds no weights of a JiT"),
        (lambda path: torch.save([1, 2], path), "holds no weights of a JiT (found list"),
        (lambda path: path.write_text("<html>"), "refused"),
        (lambda path: None, "no such file or folder"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_checkpoint_is_told(tmp_path, capsys, make, message):
    make(tmp_path / "source.pth")
    assert message in refusal(capsys, tmp_path / "source.pth", tmp_path / "out", *CONTEXT)


def test_what_one_of_several_processes_wrote_of_a_checkpoint_is_told_from_a_network(tmp_path, capsys):
    file = tmp_path / "model-00001-of-00002.safetensors"
    save_file(golden_weights(""), file)
    assert convert(file, tmp_path / "out", *CONTEXT) == 0  # as others divide a network
    (tmp_path / "manifest.json").touch()
    told = refusal(capsys, file, tmp_path / "other", *CONTEXT)
    assert f"is what one of several processes wrote of a checkpoint: give its folder, {tmp_path}." in told


def test_a_compressed_archive_is_read_as_it_was_meant(tmp_path):
    torch.save(golden_weights(), tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as a, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    assert convert(tmp_path / "z.pth", tmp_path / "out.safetensors", *CONTEXT) == 0
    written, expected = load_file(tmp_path / "out.safetensors"), golden_weights()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


# --- sizes and settings


def empty_weights(**sizes) -> tuple[dict[str, torch.Tensor], dict]:
    with torch.device("meta"):
        model = JiTTransformer2DModel(**sizes)
    return model.state_dict(), sizes


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_known_again_by_its_shapes_alone(name):
    preset = PRESETS[name]
    sizes = {field: getattr(preset, field) for field in preset.__dataclass_fields__}
    weights, expected = empty_weights(**sizes, img_size=512, patch_size=32, num_classes=7)
    config, notes = network_config(weights, None, {}, {})
    assert {key: config[key] for key in expected} == expected
    assert any("16 patches" in note for note in notes)  # there was no pos_embed
    paper = {"JiT-B": 3.0, "JiT-L": 2.5, "JiT-H": 2.3}.get(name)
    settings = sampling_settings(config, {}, {})
    assert settings["noise_scale"] == 2.0
    assert paper is None or settings["guidance_scale"] == paper


@pytest.mark.parametrize("mlp_ratio", [4.0, 2.0, 2.5, 1.3, 8 / 3, 0.9])
def test_any_width_of_the_mlp_is_found(mlp_ratio):
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 3, "bottleneck_dim": 8, "in_context_len": 0}
    sizes |= {"patch_size": 2, "num_classes": 1, "in_context_start": 0, "img_size": 8, "mlp_ratio": mlp_ratio}
    weights, _ = empty_weights(**sizes)
    config, _ = network_config(weights, None, {}, {"img_size": 8})
    rebuilt, _ = empty_weights(**config)
    assert {n: t.shape for n, t in rebuilt.items()} == {n: t.shape for n, t in weights.items()}


@pytest.mark.parametrize("img_size", [(8, 12), (12, 8), (4, 20), (20, 4), 8, 4])
def test_sizes_of_rectangles_are_found_and_stated(img_size):
    sizes = {"hidden_size": 48, "depth": 1, "num_heads": 3, "bottleneck_dim": 8, "in_context_len": 0}
    sizes |= {"patch_size": 4, "num_classes": 1, "in_context_start": 0, "img_size": img_size}
    weights, _ = empty_weights(**sizes)
    grid = tuple(side // 4 for side in sides_of(img_size))
    for dtype in (torch.float32, torch.bfloat16):
        positions = position_table(48, grid, grid, torch.device("cpu")).to(dtype)
        assert network_config(weights, positions, {}, {})[0]["img_size"] == img_size
    assert network_config(weights, None, {}, {"img_size": img_size})[0]["img_size"] == img_size


@pytest.mark.parametrize("suffix", ["", ".pth", ".safetensors"])
@torch.no_grad()
def test_a_network_without_positions_gets_those_of_the_height_and_width(folder, tmp_path, suffix):
    target, back = tmp_path / f"wide{suffix}", tmp_path / "back"
    assert convert(folder, target, "--img_size", "8", "24") == 0
    wide = JiTTransformer2DModel(**load_golden("tiny").config | {"img_size": (8, 24)}).eval()
    if suffix:
        held = torch.load(target, weights_only=True)["model"] if suffix == ".pth" else load_file(target)
        table = position_table(wide.config.hidden_size, (2, 6), (2, 6), torch.device("cpu"))
        assert torch.equal(held["net.pos_embed"], table)
    assert convert(target, back) == 0
    before, after = (JiTPipeline.from_pretrained(place).transformer for place in (folder, back))
    assert list(after.config.img_size) == [8, 24]
    wide.load_state_dict(before.state_dict())
    given = torch.randn(1, 3, 8, 24), torch.tensor([0.4]), torch.tensor([1])
    assert torch.equal(after(*given).sample, wide(*given).sample)
    assert not torch.allclose(after(*given).sample, before(*given).sample)  # its grid is another
    assert convert(back, tmp_path / "square", "--img_size", "16", "16") == 0
    assert JiTPipeline.from_pretrained(tmp_path / "square").transformer.config.img_size == 16


def test_a_side_that_cannot_be_cut_into_patches_is_refused(folder, tmp_path, capsys):
    message = refusal(capsys, folder, tmp_path / "out", "--img_size", "8", "18")
    assert "--img_size 8 18: must be a multiple of the patch size 4: use 8 16 or 8 20" in message


@pytest.mark.parametrize("file", FILES)
def test_the_golden_networks_sizes_are_found(file):
    golden = load_golden(file)
    weights = {name.removeprefix("net."): tensor for name, tensor in golden.weights.items()}
    positions = weights.pop("pos_embed")
    config, notes = network_config(weights, positions, {}, {"in_context_start": golden.config["in_context_start"]})
    assert {name: config[name] for name in golden.config} == golden.config
    assert notes == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--in_context_start: needed"),
        (("--in_context_start", "4"), "below the number of blocks, 4"),
        ((*CONTEXT, "--num_heads", "3"), "the weights say 4"),
        ((*CONTEXT, "--img_size", "32"), "the weights say 16"),
        ((*CONTEXT, "--img_size", "16", "32"), "the weights say 16"),
        ((*CONTEXT, "--img_size", "8", "32"), "--img_size 8 32: the weights say 16 (pos_embed)"),  # of as many patches
        ((*CONTEXT, "--img_size", "0", "16"), "--img_size 0 16: must be at least 1 and at most 16,384"),
        ((*CONTEXT, "--patch_size", "8"), "the weights say 4"),
        ((*CONTEXT, "--weights", "ema3"), "model, ema1 (decay 0.9999), ema2 (decay 0.9996)"),
        ((*CONTEXT, "--noise_scale", "0"), "must be positive"),
        ((*CONTEXT, "--guidance_interval", "0.9", "0.1"), "LOW <= HIGH"),
        ((*CONTEXT, "--class_names", "missing.txt"), "cannot be read"),
        ((*CONTEXT, "--in_context_strat", "1"), "Did you mean '--in_context_start'"),
    ],
)
def test_a_wrong_flag_is_told_with_its_remedy(reference, tmp_path, capsys, flags, message):
    assert message in refusal(capsys, reference, tmp_path / "out", *flags)


def test_flags_win_and_contradictions_are_told(tmp_path, capsys):
    odd = arguments(model="JiT-B/16", img_size=32, class_num="ten", noise_scale=float("nan"), cfg=None, t_eps=True)
    assert not {"guidance_interval"} & from_arguments({"interval_min": 0.1, "interval_max": 100}).keys()
    assert from_arguments({"cfg": 10**400, "noise_scale": -(10**400)}) == {}
    torch.save({"model": golden_weights(), "args": odd}, tmp_path / "c.pth")
    (tmp_path / "names.json").write_text(json.dumps({str(i): [f"n{i}", f"kind {i}"] for i in range(10)}))
    flags = ["--class_names", tmp_path / "names.json", "--prediction", "v", "--guidance_interval", "0", "0.5"]
    assert convert(tmp_path / "c.pth", tmp_path / "p", *CONTEXT, *flags, "--t_eps", "0.1") == 0
    told = capsys.readouterr().err
    assert "says img_size 32, its weights have 16" in told
    assert "says JiT-B/16" in told
    pipe = JiTPipeline.from_pretrained(tmp_path / "p")
    assert pipe.config.class_names == [f"kind {i}" for i in range(10)]
    scheduler = pipe.scheduler.config
    assert (scheduler.prediction_type, scheduler.t_eps, scheduler.noise_scale) == ("v", 0.1, 1.0)
    assert (pipe.config.guidance_scale, pipe.config.guidance_interval) == (2.0, [0.0, 0.5])
    card = (tmp_path / "p" / "README.md").read_text()
    assert "/home/me" not in card


def test_places_that_cannot_be_are_told(reference, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in ("file/x", "file/x.pth", 300 * "x", f"{300 * 'x'}.pth"):
        assert convert(reference, tmp_path / place, *CONTEXT) == 2
        told = capsys.readouterr().err
        assert "cannot be written" in told
        assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_types_in_which_nothing_computes_are_refused(tmp_path, capsys):
    weights = {
        name: tensor.to(torch.float8_e4m3fn) for name, tensor in golden_weights().items() if name != "net.pos_embed"
    }
    torch.save(weights, tmp_path / "w.pth")
    message = refusal(capsys, tmp_path / "w.pth", tmp_path / "out", *CONTEXT, "--img_size", "16", "--dtype", "same")
    assert "is torch.float8_e4m3fn, in which no JiT computes" in message


def test_folders_of_others_beside_the_target_stay(folder, tmp_path):
    (tmp_path / "tmp_old_p").mkdir()
    assert convert(folder, tmp_path / "p") == 0
    assert (tmp_path / "tmp_old_p").is_dir()


def test_names_that_several_classes_share_are_told(reference, tmp_path, capsys):
    names = ["crane", "dog", "cat", "crane", *"abcdef"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert convert(reference, tmp_path / "p", *CONTEXT, "--class_names", tmp_path / "names.txt") == 0
    assert "'crane' names the classes 0, 3: asked for by name it is 0" in capsys.readouterr().err
    assert JiTPipeline.from_pretrained(tmp_path / "p").config.class_names == names


def test_class_tokens_that_weights_do_not_have_do_not_start_anywhere():
    sizes = {"hidden_size": 48, "depth": 2, "num_heads": 3, "bottleneck_dim": 8, "in_context_len": 0, "img_size": 8}
    weights, _ = empty_weights(**sizes, patch_size=2, num_classes=1, in_context_start=0)
    with pytest.raises(UserError, match="in_context_start 1: these weights have no class tokens"):
        network_config(weights, None, {}, {"img_size": 8, "in_context_start": 1})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("net.blocks.2.mlp.w3.bias"), "missing: blocks.2.mlp.w3.bias"),
        (lambda w: w.update({"net.extra": torch.zeros(1)}), "unexpected: extra"),
        (lambda w: w.update({"net.blocks": torch.zeros(1)}), "unexpected: blocks"),
        (
            lambda w: w.update({"net.y_embedder.embedding_table.weight": torch.zeros(0, 96)}),
            "table of classes has no row",
        ),
        (lambda w: w.update({"net.pos_embed": torch.zeros(1, 16, 96)}), "not the fixed 2-D sin-cos table"),
        (lambda w: w.update({"net.pos_embed": torch.zeros(1, 15, 96)}), "not the fixed 2-D sin-cos table"),
        (lambda w: w.update({"net.pos_embed": torch.zeros(1, 0, 96)}), "pos_embed has the shape (1, 0, 96)"),
        (lambda w: w.update({"module.blocks.0.norm1.weight": torch.zeros(96)}), "there twice"),
        (lambda w: w.update({"net.t_embedder.mlp.0.bias": torch.zeros(96, dtype=torch.int8)}), "floating-point"),
        (lambda w: w.update({"net.t_embedder.mlp.0.bias": torch.zeros(96, device="meta")}), "meta torch.float32"),
        (lambda w: w.update({"net.blocks.9999999999.norm1.weight": torch.zeros(1)}), "of the blocks only"),
        (lambda w: w.update({"net.blocks.1.norm1.weight": torch.zeros(95)}), "(95,) instead of (96,)"),
    ],
)
def test_weights_that_are_not_a_jit_are_told_what_is_wrong(tmp_path, capsys, spoil, message):
    weights = golden_weights()
    spoil(weights)
    torch.save(weights, tmp_path / "w.pth")
    assert message in refusal(capsys, tmp_path / "w.pth", tmp_path / "out", *CONTEXT)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n", ["cat", "dog"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ('{"1": "dog", "0": ["n1", "cat"]}', ["cat", "dog"]),
    ],
)
def test_class_names_are_read_from_text_and_json(tmp_path, text, names):
    (tmp_path / "names").write_text(text)
    assert read_class_names(str(tmp_path / "names")) == names


# --- what is written


def test_nothing_is_replaced_unless_told(folder, reference, tmp_path, capsys):
    target = tmp_path / "out"
    assert convert(folder, target) == 0
    before = (target / "model_index.json").stat().st_mtime_ns
    assert "--overwrite" in refusal(capsys, folder, target)
    assert (target / "model_index.json").stat().st_mtime_ns == before
    assert convert(reference, target, *CONTEXT, "--weights", "ema2", "--overwrite") == 0
    assert (target / "model_index.json").stat().st_mtime_ns != before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    assert "other things" in refusal(capsys, folder, tmp_path / "photos", "--overwrite")
    assert "is a folder" in refusal(capsys, folder, _made(tmp_path / "x.pth"), "--overwrite")
    for place in (folder, folder.parent, folder / "inside"):
        assert "another place" in refusal(capsys, folder, place, "--overwrite")
    assert ".ckpt files are not written" in refusal(capsys, folder, tmp_path / "x.ckpt")
    assert "--output: not given" in (main(["--input", str(folder)]), capsys.readouterr().err)[1]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_disk_that_is_full_leaves_the_old_files(tmp_path):
    target = _made(tmp_path / "old")
    (target / "model_index.json").write_text("old")
    with pytest.raises(UserError, match="Nothing was changed"), written_whole(target, FOLDER) as temporary:
        temporary.mkdir()
        (temporary / "part").touch()
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (target / "model_index.json").read_text() == "old"


def test_a_card_goes_along_from_folder_to_folder(folder, tmp_path):
    pipeline = JiTPipeline(load_golden("tiny").model(), JiTScheduler())
    pipeline.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    (tmp_path / "a" / "evaluation.json").write_text("[]")
    for target, *flags in (("b",), ("c", "--noise_scale", "1", "--attn_dropout", "0.5")):
        assert convert(tmp_path / "a", tmp_path / target, *flags) == 0
        assert (tmp_path / target / "README.md").read_text().endswith("Mine.")
        assert (tmp_path / target / "evaluation.json").exists()


@pytest.mark.parametrize("flags", [("--dtype", "float16"), ("--noise_scale", "2"), ("--guidance_interval", "0", "1")])
def test_what_was_said_of_other_images_does_not_go_along(tmp_path, flags):
    JiTPipeline(load_golden("tiny").model(), JiTScheduler()).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\n---\nFID 1.8")
    (tmp_path / "a" / "evaluation.json").write_text("[]")
    assert convert(tmp_path / "a", tmp_path / "b", *flags) == 0
    card = (tmp_path / "b" / "README.md").read_text()
    assert "FID" not in card
    assert "## Origin" in card
    assert not (tmp_path / "b" / "evaluation.json").exists()


def test_a_conversion_that_is_stopped_leaves_nothing(folder, tmp_path, monkeypatch):
    target = _made(tmp_path / "old")
    (target / "model_index.json").write_text("old")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".old.{dead.pid}.tmp").mkdir()  # of one that was killed
    (tmp_path / f".old.{os.getppid()}.tmp").touch()  # of one that is running
    monkeypatch.setattr("jit_accel.convert.run.write_folder", lambda *what: _stop(what[-1]))
    assert convert(folder, target, "--overwrite") == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".old.{os.getppid()}.tmp", "old"]
    assert (target / "model_index.json").read_text() == "old"


def _stop(place: Path) -> None:
    place.mkdir()
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), written_whole(tmp_path / "out", FOLDER):
        raise RuntimeError("shape")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: _cut(folder / WEIGHTS),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: (folder / "model_index.json").write_text("{}"),
        lambda folder: (folder / "transformer/config.json").write_text('{"depth": "many"}'),
        lambda folder: save_file({"x": torch.zeros(1)}, folder / WEIGHTS),
    ],
)
def test_a_broken_pipeline_folder_is_told(folder, tmp_path, capsys, spoil):
    shutil.copytree(folder, tmp_path / "broken")
    spoil(tmp_path / "broken")
    assert "cannot be loaded" in refusal(capsys, tmp_path / "broken", tmp_path / "out")
    with pytest.raises(UserError, match=r"^init_from .*cannot be loaded"):
        load_pipeline(str(tmp_path / "broken"), about="init_from")
