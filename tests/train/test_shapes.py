"""Trainings on rectangles: `--img_size H W`, from the settings to what evaluates their images."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_parquet, assert_same_state, last_checkpoint, state, train_group, train_here
from PIL import Image

import jit_accel as jit
from jit_accel.base.image_rows import GAP_PIXELS
from jit_accel.config.command_line import parse_args
from jit_accel.config.groups import OptimConfig
from jit_accel.config.identity import default_folder
from jit_accel.convert import main as convert
from jit_accel.evaluate import main as evaluate
from jit_accel.model.transformer import build_model
from jit_accel.plan import main as plan
from jit_accel.sample import main as sample
from jit_accel.train.forecast import try_block

TALL = ("--img_size", "28", "14")
KEPT = ("--save_every_steps", "2", "--keep_checkpoints", "9", "--max_steps", "4")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The folder of a run of four steps on rectangles."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(images), *TALL, *KEPT, "--holdout", "0.2", "--val_every_steps", "2")
    assert train_here(*flags, "--output_dir", str(out)) == 0
    return out


def test_a_pipeline_comes_out_that_draws_rectangles(run):
    record = json.loads((run / "pipeline" / "transformer" / "config.json").read_text())
    assert record["img_size"] == [28, 14]
    drawn = {}
    for place in (run / "pipeline", last_checkpoint(run)):
        pipe = jit.load(place)
        pipe.set_progress_bar_config(disable=True)
        drawn[place] = pipe([0, 1], 2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
        assert drawn[place].shape == (2, 3, 28, 14)
        assert pipe(0, 1).images[0].size == (14, 28)
        assert jit.generate(pipe, range(2), num_inference_steps=1).shape == (2, 3, 28, 14)
    assert torch.equal(*drawn.values())
    assert "28x14 px" in (run / "pipeline" / "README.md").read_text()


def test_the_sheet_shows_rectangles(run):
    sheet = np.asarray(Image.open(run / "samples" / "step_00000004.png"))
    zoom = -(-84 // 14)
    assert sheet.shape[0] % (28 * zoom + GAP_PIXELS) == 0
    assert (sheet.shape[1] - 8 * (14 * zoom + GAP_PIXELS)) > 0


def test_a_resume_goes_on_bit_for_bit_and_not_with_another_size(run, images, tmp_path, capsys):
    shutil.copytree(run, out := tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    flags = ("--data_path", str(images), *KEPT, "--output_dir", str(out), "--holdout", "0.2", "--val_every_steps", "2")
    assert train_here(*flags, "--img_size", "14", "28", "--resume", "auto") == 2
    assert "img_size is [14, 28], the checkpoint has [28, 14]" in capsys.readouterr().err
    assert train_here(*flags, *TALL, "--resume", "auto") == 0
    assert_same_state(run, out)


def test_two_equal_numbers_are_one(images, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, size in zip(folders, (("28",), ("28", "28"))):
        flags = ("--data_path", str(images), "--max_steps", "2", "--output_dir", str(folder))
        assert train_here(*flags, "--img_size", *size) == 0
    assert_same_state(*folders)
    for name in ("config.yaml", "pipeline/transformer/config.json"):
        texts = [(folder / name).read_text().replace(str(folder), "") for folder in folders]
        assert texts[0] == texts[1]
    assert "img_size: 28\n" in texts[0] or '"img_size": 28,' in texts[0]


def test_a_stream_and_two_processes_take_the_steps_of_one(images, tmp_path):
    table = as_parquet(images, tmp_path / "table", 2)
    flags = ("--data_path", str(table), *TALL, "--max_steps", "2", "--lanes", "2", "--output_dir")
    one, two = (tmp_path / name for name in ("one", "two"))
    train_group(tmp_path, *flags, str(one), "--gradient_accumulation_steps", "2")
    train_group(tmp_path, *flags, str(two), num_processes=2)
    for name, tensor in state(one).items():
        if name.startswith("model/"):
            assert torch.allclose(state(two)[name], tensor, atol=1e-5), name


def test_crops_at_random_places_go_on_alike_on_two_processes(images, tmp_path, capsys):
    flags = ("--data_path", str(images), *TALL, *KEPT, "--crop", "random", "--output_dir")
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    assert train_here(*flags, one, "--gradient_accumulation_steps", "2") == 0
    shutil.copytree(one, two, ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert "Resumed from" in train_group(tmp_path, *flags, two, "--resume", "auto", num_processes=2)
    for name, tensor in state(Path(one)).items():
        assert torch.allclose(tensor, state(Path(two))[name], atol=1e-5), name
    capsys.readouterr()
    assert train_here(*flags, two, "--crop", "center", "--resume", "auto", "--max_steps", "5") == 0
    assert "--crop was random and is center now" in capsys.readouterr().err


def test_weights_of_one_shape_start_another(run, images, tmp_path, capsys):
    flags = ("--data_path", str(images), "--init_from", str(run), "--max_steps", "2", "--output_dir")
    assert train_here(*flags, str(tmp_path / "square"), "--img_size", "28") == 0
    assert "28 px instead of 28x14: positions are computed" in capsys.readouterr().out
    assert jit.load(tmp_path / "square").transformer.config.img_size == 28
    assert train_here(*flags, str(tmp_path / "same"), "--img_size", "None") == 0
    assert "px instead of" not in capsys.readouterr().out
    assert list(jit.load(tmp_path / "same").transformer.config.img_size) == [28, 14]


def test_an_adapter_of_rectangles_is_trained(run, images, tmp_path):
    flags = ("--init_from", str(run), "--lora_rank", "2", "--max_steps", "2", *TALL, "--output_dir", str(tmp_path))
    assert train_here("--data_path", str(images), *flags) == 0
    assert jit.generate(jit.load(tmp_path), range(1), num_inference_steps=1).shape == (1, 3, 28, 14)


@pytest.mark.parametrize("inject", ["add", "tokens"])
def test_conditions_of_rectangles_are_learned_from_and_shown(images, tmp_path, inject):
    flags = ("--condition_from", "downscale:4", "--condition_inject", inject, *TALL, "--max_steps", "2")
    flags += ("--holdout", "0.2", "--val_every_steps", "2", "--output_dir", str(tmp_path))
    assert train_here("--data_path", str(images), *flags) == 0
    pipe = jit.load(tmp_path)
    made = pipe(0, 1, condition_image=Image.new("RGB", (70, 90)), output_type="pt").images
    assert made.shape == (1, 3, 28, 14)
    sheet = Image.open(tmp_path / "samples" / "step_00000002.png")
    assert sheet.height == 3 * (28 * 6 + GAP_PIXELS)


def test_pictures_are_sampled_and_evaluated_as_rectangles(run, images, tmp_path, capsys, tiny):
    how = ("--model", str(run), "--num_inference_steps", "1", "--mixed_precision", "no")
    assert sample([*how, "--output_dir", str(tmp_path / "npz"), "--num_images", "8", "--format", "npz"]) == 0
    with np.load(tmp_path / "npz" / "samples.npz") as file:
        assert file["arr_0"].shape == (8, 28, 14, 3)
    flags = ("--output_dir", str(tmp_path / "other"), "--num_images", "4", "--img_size", "14", "21")
    assert sample([*how, *flags]) == 0
    assert {Image.open(path).size for path in (tmp_path / "other").rglob("*/*.png")} == {(21, 14)}
    assert sample([*how, "--output_dir", str(tmp_path / "wide"), "--num_images", "4", "--width", "28", "--grid"]) == 0
    assert {Image.open(path).size for path in (tmp_path / "wide").rglob("*/*.png")} == {(28, 28)}
    measure = ("--features", "tiny", "--metrics", "fd", "--mixed_precision", "no")
    reference = tmp_path / "reference.npz"
    given = ("--model", str(run), "--num_inference_steps", "1", "--num_images", "20", *measure)
    assert evaluate([*given, "--reference", str(images), "--make_reference", str(reference)]) == 0
    assert evaluate([*given, "--reference", str(reference), "--output", str(tmp_path / "again.json")]) == 0
    of_folder = json.loads((run / "evaluation.json").read_text())[-1]
    of_file = json.loads((tmp_path / "again.json").read_text())[-1]
    assert of_folder["img_size"] == of_file["img_size"] == [28, 14]
    assert of_folder["metrics"] == of_file["metrics"]
    assert "px, but" not in capsys.readouterr().err
    drawn = ("--images", str(tmp_path / "npz" / "samples.npz"), "--reference", str(reference), *measure)
    assert evaluate(list(drawn)) == 0
    assert "px, but" not in capsys.readouterr().err
    assert evaluate([*drawn, "--img_size", "28"]) == 0
    assert "of images of 28x14 px, but those measured have 28 px" in capsys.readouterr().err
    assert evaluate(["--images", str(images), "--reference", str(images), "--img_size", "28", "14", *measure]) == 0
    found = jit.measure(jit.load(run), reference, num_images=20, num_inference_steps=1, features="tiny", metrics="fd")
    assert found["fd_tiny"] == pytest.approx(of_file["metrics"]["fd_tiny"], rel=1e-4)


def test_a_training_measures_itself_on_rectangles(images, tmp_path, tiny):
    flags = ("--eval_every_steps", "2", "--eval_images", "8", "--eval_features", "tiny", "--max_steps", "2")
    assert train_here("--data_path", str(images), *flags, *TALL, "--output_dir", str(tmp_path)) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/fd_tiny" in row for row in rows)


def test_pairs_of_rectangles_are_scored(images, tmp_path):
    flags = ("--condition_from", "downscale:4", *TALL, "--max_steps", "2", "--output_dir", str(tmp_path / "run"))
    assert train_here("--data_path", str(images), *flags) == 0
    given = (
        "--model",
        str(tmp_path / "run"),
        "--pairs",
        str(images),
        "--num_inference_steps",
        "1",
        "--mixed_precision",
    )
    assert evaluate([*given, "no", "--num_images", "8", "--output", str(tmp_path / "found.json")]) == 0
    records = json.loads((tmp_path / "found.json").read_text())
    assert {tuple(record["img_size"]) for record in records} == {(28, 14)}


def test_what_cannot_be_cut_into_patches_is_refused_with_both_neighbours(images, tmp_path, capsys):
    for size, near in (("28 15", "28 14 or 28 21"), ("29 15", "28 14 or 35 21"), ("3 15", "7 21")):
        assert train_here("--data_path", str(images), "--img_size", *size.split(), "--output_dir", str(tmp_path)) == 2
        message = capsys.readouterr().err
        assert f"--img_size {size}: must be a multiple of the patch size 7 (JiT-XS/7): use {near}, or" in message
    with pytest.raises(ValueError, match=r"img_size \[8, 6\] must be a multiple of patch_size 4: use 8 4 or 8 8"):
        jit.JiTTransformer2DModel([8, 6], 4, 8, 1, 2, 4, 0, 0, 1)


def test_a_run_without_a_name_is_named_by_height_and_width():
    config = jit.Config.of(data_path="photos", model="JiT-B/16", img_size=(64, 96))
    assert Path(default_folder(config)).name == "photos-JiT-B-16-64x96px-seed0"


def test_a_block_of_a_rectangle_costs_what_one_of_as_many_patches_does():
    optim, trials = OptimConfig(ema_decays=("0.9",)), []
    for size in (28, (14, 56)):
        config = build_model("JiT-Ti/7", size, 4).config
        trials.append(try_block(config, 2, torch.device("cpu"), contextlib.nullcontext, optim))
    assert trials[0].image_bytes == trials[1].image_bytes


def test_a_rectangle_s_weights_are_converted_there_and_back(run, tmp_path):
    for source, target in ((run / "pipeline", tmp_path / "x.pth"), (tmp_path / "x.pth", tmp_path / "back")):
        assert convert(["--input", str(source), "--output", str(target)]) == 0
    pipes = [jit.load(place) for place in (run / "pipeline", tmp_path / "back")]
    drawn = [jit.generate(pipe, range(2), num_inference_steps=1) for pipe in pipes]
    assert drawn[0].shape == (2, 3, 28, 14)
    assert torch.equal(*drawn)


def test_a_plan_counts_patches(capsys):
    answers = []
    for size in ("256", "128 512"):
        assert plan(["--model", "JiT-B/16", "--img_size", *size.split(), "--gpu", "H100"]) == 0
        answers.append(capsys.readouterr().out)
    assert "JiT-B/16 at 128x512 px on" in answers[1]
    assert "--img_size 128 512" in answers[1]
    assert answers[1].replace("128x512", "256").replace("128 512", "256") == answers[0]


def test_settings_of_files_python_and_flags_are_the_same(tmp_path):
    (tmp_path / "run.yaml").write_text("data_path: x\nmodel: JiT-B/16\nimg_size: [64, 96]\n")
    given = ["--data_path", "x", "--model", "JiT-B/16", "--img_size"]
    forms = [["64", "96"], ["64,96"], ["[64, 96]"], ["(64, 96)"], ["64 96"]]
    found = [parse_args([*given, *words]) for words in forms]
    found += [parse_args(["--config", str(tmp_path / "run.yaml")])]
    found += [jit.Config.of(data_path="x", model="JiT-B/16", img_size=size) for size in ((64, 96), [64, 96])]
    assert all(config == found[0] for config in found)
    assert found[0].recorded()["img_size"] == [64, 96]
    assert jit.Config.of_record(found[0].recorded()) == found[0]
    for words, size in ((["64", "64"], 64), (["64"], 64), (["64.0"], 64), (["off"], None), (["none"], None)):
        assert parse_args([*given, *words]).data.img_size == size


@pytest.mark.parametrize("size", [(64,), (64, 96, 32), (64.0, 96), (True, 96), "64"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(jit.UserError, match=r"^img_size .*must be of the type int \| tuple"):
        jit.Config.of(data_path="x", img_size=size)


@pytest.mark.parametrize("size", [(0, 96), (64, 16385), (-16, 16)])
def test_a_side_out_of_range_is_refused(size):
    with pytest.raises(jit.UserError, match=r"^img_size -?\d+ \d+: must be at least 1 and at most 16,384"):
        jit.Config.of(data_path="x", img_size=size)
