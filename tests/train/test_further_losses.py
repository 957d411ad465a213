"""Trainings with losses beside the objective's, and trainings whose path starts at the condition."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import TINY, assert_same_state, in_fresh_accelerate, last_checkpoint, rows, state, train_group, train_here

import jit_accel as jit
from jit_accel.config.command_line import parse_args
from jit_accel.monitor.metric_table import AUX_LOSS, metric_of

pytestmark = pytest.mark.usefixtures("tiny")
ALL = (
    "--aux_loss",
    "l1=0.5:3",
    "ssim=0.2@0.3-1.0",
    "charbonnier=0.1",
    "features=0.05",
    "contrastive=0.05",
    "layersync=0.2",
)
ALL += ("--aux_features", "tiny")
BRIDGE = ("--condition_from", "downscale:4", "--path", "bridge")


def aux_of(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if metric_of(key) is metric_of(AUX_LOSS)}


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The flags and the folder of a finished run of four steps with all losses."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(images), *ALL, "--save_every_steps", "2", "--keep_checkpoints", "9")
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "4") == 0
    return flags, out


def test_each_is_logged_from_its_step_on_and_the_loss_is_what_it_was(run, images, tmp_path):
    _, out = run
    assert train_here("--data_path", str(images), "--max_steps", "4", "--output_dir", str(tmp_path / "plain")) == 0
    plain, found = rows(tmp_path / "plain"), rows(out)
    names = [sorted(key.rpartition("/")[2] for key in aux_of(row)) for row in found]
    first = ["charbonnier", "contrastive", "features", "layersync", "ssim"]
    assert names == [first] * 2 + [sorted([*first, "l1"])] * 2
    values = {(key, value) for row in found for key, value in aux_of(row).items() if "ssim" not in key}
    assert all((value < 0) == ("contrastive" in key) for key, value in values)
    # the rate is 0 in the first step, so that the second one begins with the same weights
    assert [row["train/loss"] for row in found[:2]] == [row["train/loss"] for row in plain[:2]]
    assert all(a["train/grad_norm"] != b["train/grad_norm"] for a, b in zip(found, plain))
    assert found[3]["train/loss"] != plain[3]["train/loss"]
    assert not any(aux_of(row) for row in plain)


def test_a_resume_goes_on_bit_for_bit_across_the_step_that_a_loss_begins_with(run, tmp_path):
    flags, out = run
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--resume", "auto") == 0
    assert_same_state(out, tmp_path / "out")
    assert [aux_of(row) for row in rows(tmp_path / "out")] == [aux_of(row) for row in rows(out)]


def test_a_loss_that_has_not_begun_changes_nothing(images, tmp_path, capsys):
    for name, more in (("plain", ()), ("later", ("--aux_loss", "l1=1:3", "ssim=1:99"))):
        flags = ("--data_path", str(images), *more, "--max_steps", "2", "--learning_rate", "1e-2")
        assert train_here(*flags, "--warmup_steps", "0", "--output_dir", str(tmp_path / name)) == 0
    assert_same_state(tmp_path / "plain", tmp_path / "later")
    assert "Warning: --aux_loss ssim begins with step 99, and the run ends with 2." in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize(("path", "fsdp2"), [((), False), (BRIDGE, False), (BRIDGE, True)])
def test_processes_and_micro_steps_come_to_the_same(images, tmp_path, path, fsdp2):
    flags = (
        "--data_path",
        str(images),
        *ALL,
        *path,
        "--max_steps",
        "4",
        "--learning_rate",
        "1e-2",
        "--warmup_steps",
        "0",
    )
    setup = {"TEST_SETUP": "tiny_features:install"}
    layouts = {"one": (1, "4"), "two": (2, "2")}
    for name, (processes, micro_steps) in layouts.items():
        environment = setup | ({"TEST_FSDP2_PRECISION": "no"} if fsdp2 and processes > 1 else {})
        more = ("--gradient_accumulation_steps", micro_steps, "--output_dir", str(tmp_path / name), "--batch_size", "2")
        train_group(tmp_path, *flags, *more, num_processes=processes, environment=environment)
    one, two = (state(tmp_path / name) for name in layouts)
    for name, tensor in one.items():
        if name.startswith("model/"):
            assert torch.allclose(two[name], tensor, atol=1e-4), name
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        assert aux_of(a) == pytest.approx(aux_of(b), abs=1e-4)
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-4)


def test_an_objective_of_ones_own_has_them_too(images, tmp_path):
    class Absolute(jit.Objective):
        def losses(self, model, x, t, e, labels):
            time = t.view(-1, 1, 1, 1)
            return (model(time * x + (1 - time) * e, t, labels).sample.float() - x).abs().mean(dim=(1, 2, 3))

    flags = ("--data_path", str(images), "--aux_loss", "l1=0.5", "--max_steps", "2", "--output_dir", str(tmp_path))
    with in_fresh_accelerate():
        jit.fit(parse_args([*TINY, *flags]), objective=Absolute)
    for row in rows(tmp_path):
        assert aux_of(row) == {"train/aux/l1": pytest.approx(row["train/loss"], rel=1e-5)}


def test_a_bridge_is_trained_kept_and_resumed(images, tmp_path):
    out = tmp_path / "out"
    flags = (
        "--data_path",
        str(images),
        *BRIDGE,
        "--aux_loss",
        "ssim=0.1",
        "--holdout",
        "0.2",
        "--val_every_steps",
        "2",
    )
    flags += ("--save_every_steps", "2", "--keep_checkpoints", "9", "--max_steps", "4", "--img_size", "28")
    assert train_here(*flags, "--output_dir", str(out)) == 0
    assert (out / "samples" / "step_00000004.png").exists()
    assert "val/loss" in rows(out)[3]
    for pipe in (jit.load(out), jit.load(last_checkpoint(out))):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.scheduler.config.path == pipe.config.objective["path"] == "bridge"
        picture = torch.rand(3, 28, 28)
        made = [pipe(0, 2, condition_image=picture, output_type="latent", generator=g).images
                for g in (None, torch.Generator().manual_seed(1))]  # fmt: skip
        assert torch.equal(*made)
    shutil.copytree(out, tmp_path / "again", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "again"), "--resume", "auto") == 0
    assert_same_state(out, tmp_path / "again")
    recorded = tmp_path / "again" / "config.yaml"
    more = ("--output_dir", str(tmp_path / "same"), "--resume", "none", "--max_steps", "4")
    assert train_here("--config", str(recorded), *more) == 0
    assert_same_state(out, tmp_path / "same")


def test_a_bridge_of_grey_images_has_all_losses(images, tmp_path):
    flags = ("--data_path", str(images), *BRIDGE, *ALL, "--in_channels", "1", "--max_steps", "3")
    assert train_here(*flags, "--output_dir", str(tmp_path)) == 0
    assert len(aux_of(rows(tmp_path)[2])) == 6
    pipe = jit.load(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 1, "output_type": "pt"}
    assert pipe(0, condition_image=torch.rand(1, 28, 28), **how).images.shape == (1, 1, 28, 28)


def test_the_noise_is_no_part_of_a_bridge(images, tmp_path):
    """At 512 px the noise of a path from noise would be doubled."""
    flags = ("--data_path", str(images), *BRIDGE, "--model", "JiT-XS/128", "--img_size", "512", "--max_steps", "1")
    assert train_here(*flags, "--warmup_steps", "0", "--output_dir", str(tmp_path)) == 0
    objective = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["objective"]
    assert objective == {"prediction_type": "x", "t_eps": 0.05, "noise_scale": 1.0, "path": "bridge"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--aux_loss", "l3=1"), "--aux_loss l3=1: unknown; choose from l1, charbonnier, ssim, features"),
        (
            ("--aux_loss", "contrastive=0.1", "--loss_space", "x"),
            "--aux_loss contrastive=0.1: contrastive is subtracted",
        ),
        (
            ("--aux_loss", "contrastive=0.1", "--batch_size", "1"),
            "--batch_size 1: --aux_loss contrastive needs another",
        ),
        (("--aux_loss", "l1=1", "ssim"), "--aux_loss ssim: must be NAME=WEIGHT"),
        (("--aux_loss", "features=1", "--aux_features", "vgg"), "--aux_features vgg: unknown; choose from"),
        (("--aux_feature_weights", "w.pt"), "--aux_feature_weights w.pt: are of a loss that is not asked for"),
        (
            ("--aux_loss", "features=1", "--aux_feature_weights", "no.safetensors"),
            "--aux_feature_weights no.safetensors: cannot be read",
        ),
        (("--aux_loss", "features=1", "--in_channels", "4"), "--aux_loss features=1: features are of grey or colour"),
        (("--path", "bridge"), "--path bridge: the path starts at the condition, and there is none"),
        (
            ("--path", "bridge", "--condition_from", "grey"),
            "the condition has 1 channels, and the image, to which the path leads from there, 3",
        ),
        ((*BRIDGE, "--noise_scale", "2"), "--noise_scale 2.0: scales the noise, of which --path bridge has none"),
        ((*BRIDGE, "--prediction", "e"), "--prediction e: would be the start, which of a --path bridge is known"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(images, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_cannot_go_on_along_another_path(run, images, tmp_path, capsys):
    flags, out = run
    shutil.copytree(out, tmp_path / "out")
    more = (*BRIDGE, "--output_dir", str(tmp_path / "out"), "--max_steps", "6", "--resume", "auto")
    assert train_here(*flags, *more) == 2
    assert "--path is bridge, the checkpoint has noise" in capsys.readouterr().err
