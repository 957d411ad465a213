"""Trainings whose network is given numbers beside the noise."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_state,
    clothes,
    in_fresh_accelerate,
    last_checkpoint,
    rows,
    state,
    train_group,
    train_here,
)
from PIL import Image
from safetensors.torch import load_file

import jit_accel as jit
from jit_accel.evaluate import main as evaluate
from jit_accel.model.checkpoints import read_run
from jit_accel.sample import main as sample

COLUMNS = ("--vector_column", "weight", "place")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Clothes with two columns of numbers."""
    root = clothes(tmp_path_factory.mktemp("data") / "clothes")
    files = sorted(root.rglob("*.png"))
    lines = [{"file_name": f.relative_to(root).as_posix(), "label": f.parent.name} for f in files]
    lines = [line | {"weight": n / 3, "place": [n, 1e9 + n]} for n, line in enumerate(lines)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def run(numbered, tmp_path_factory):
    """The flags and the folder of a finished run of four steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(numbered), *COLUMNS, "--save_every_steps", "2", "--condition_drop_prob", "0.5")
    flags = (*flags, "--holdout", "0.2", "--val_every_steps", "2", "--keep_checkpoints", "9")
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "4") == 0
    return flags, out


def test_a_pipeline_comes_out_that_knows_the_columns(run, numbered):
    _, out = run
    pipe, of_checkpoint = jit.load(out), jit.load(last_checkpoint(out))
    source = jit.open_images(numbered, vector_column=("weight", "place"))
    assert pipe.config.vectors == of_checkpoint.config.vectors == source.vectors.record()
    assert list(pipe.transformer.config.vector_sizes) == [1, 2]
    weights = pipe.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in of_checkpoint.transformer.state_dict().items())
    assert weights["vector_embedder.mlp.2.weight"].abs().sum() > 0
    assert weights["vector_embedder.none"].abs().sum() > 0
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(["Bag", None], 1, vectors=[{"weight": 3, "place": [9, 1e9]}, None]).images) == 2
    with pytest.raises(ValueError, match="vectors is not given"):
        pipe(0, 1)
    assert all("val/loss" in row for row in rows(out)[1::2])


def test_sheets_show_what_the_numbers_of_an_image_give_beside_it(run):
    _, out = run
    sheet = np.asarray(Image.open(out / "samples" / "step_00000004.png"))
    pipe = jit.load(out)
    assert sheet.shape[0] * 8 < sheet.shape[1] * 2.01  # two rows: output and truth
    assert pipe.config.guidance_scale == 2


def test_a_resume_goes_on_bit_for_bit(run, tmp_path):
    flags, out = run
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--resume", "auto") == 0
    assert_same_state(out, tmp_path / "out")


def test_a_resume_with_other_columns_is_refused(run, capsys):
    flags, out = run
    others = [flag for flag in flags if flag != "place"]
    assert train_here(*others, "--output_dir", str(out), "--max_steps", "9", "--resume", "auto") == 2
    assert "--vector_column is ['weight'], the checkpoint has ['weight', 'place']" in capsys.readouterr().err


@pytest.mark.parametrize("environment", [None, {"TEST_FSDP2_PRECISION": "no"}])
def test_two_processes_take_the_steps_of_one(numbered, tmp_path, environment):
    flags = ("--data_path", str(numbered), *COLUMNS, "--max_steps", "2", "--output_dir")
    one, two = (tmp_path / name for name in ("one", "two"))
    train_group(tmp_path, *flags, str(one), "--gradient_accumulation_steps", "2")
    train_group(tmp_path, *flags, str(two), num_processes=2, environment=environment)
    for name, tensor in state(one).items():
        if name.startswith("model/"):
            assert torch.allclose(state(two)[name], tensor, atol=1e-5), name


def test_a_training_starts_as_the_model_without_numbers(numbered, tmp_path):
    data = ("--data_path", str(numbered), "--label_drop_prob", "0", "--max_steps", "2")
    assert train_here(*data, "--output_dir", str(tmp_path / "plain")) == 0
    start = (*data, "--init_from", str(tmp_path / "plain"))
    assert train_here(*start, "--output_dir", str(tmp_path / "as_it_is")) == 0
    assert train_here(*start, *COLUMNS, "--output_dir", str(tmp_path / "told")) == 0
    adapter = (*start, *COLUMNS, "--condition_from", "grey", "--lora_rank", "1", "--output_dir", str(tmp_path / "lora"))
    assert train_here(*adapter) == 0
    assert len({rows(tmp_path / name)[0]["train/loss"] for name in ("as_it_is", "told", "lora")}) == 1
    trained = set(load_file(last_checkpoint(tmp_path / "lora") / "model.safetensors"))
    assert {name.partition(".")[0] for name in trained} == {"blocks", "condition_embedder", "vector_embedder"}
    whole, of_checkpoint = jit.load(tmp_path / "lora"), jit.load(last_checkpoint(tmp_path / "lora"))
    assert whole.config.vectors == of_checkpoint.config.vectors
    weights = whole.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in of_checkpoint.transformer.state_dict().items())
    assert train_here(*adapter, "--resume", "auto") == 0


def test_numbers_keep_the_meaning_that_the_source_gave_them(run, numbered, tmp_path, capsys):
    _, out = run
    root = shutil.copytree(numbered, tmp_path / "other")
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"weight": line["weight"] * 7}) for line in lines))
    start = ("--init_from", str(out), "--data_path", str(root), "--max_steps", "2")
    assert train_here(*start, *COLUMNS, "--output_dir", str(tmp_path / "same")) == 0
    assert "new: vector_embedder" not in capsys.readouterr().out
    before, after = (jit.load(path).config.vectors for path in (out, tmp_path / "same"))
    assert before == after
    assert read_run(last_checkpoint(tmp_path / "same"))["vectors"] == before
    assert train_here(*start, "--vector_column", "place", "weight", "--output_dir", str(tmp_path / "turned")) == 0
    assert "new: vector_embedder.mlp.0.weight" in capsys.readouterr().out
    assert jit.load(tmp_path / "turned").config.vectors["names"] == ["place", "weight"]


@pytest.mark.parametrize("columns", [(), ("--vector_column", "place", "weight"), ("--vector_column", "weight")])
def test_an_adapter_needs_the_numbers_of_its_source(run, numbered, tmp_path, capsys, columns):
    flags = ("--data_path", str(numbered), "--init_from", str(run[1]), "--lora_rank", "1", "--max_steps", "2")
    assert train_here(*flags, *columns, "--output_dir", str(tmp_path / "out")) == 2
    assert "give --vector_column weight place, or leave out --lora_rank" in capsys.readouterr().err
    plain = [flag for flag in flags if flag not in ("--lora_rank", "1")]
    assert train_here(*plain, *columns, "--output_dir", str(tmp_path / "out")) == 0
    assert "dropped: vector_embedder." in capsys.readouterr().out


def test_a_training_with_numbers_is_evaluated(numbered, tmp_path, tiny):
    flags = (
        "--data_path",
        str(numbered),
        *COLUMNS,
        "--eval_every_steps",
        "2",
        "--eval_images",
        "8",
        "--max_steps",
        "2",
    )
    assert train_here(*flags, "--eval_features", "tiny", "--output_dir", str(tmp_path / "out")) == 0
    assert any(key.startswith("eval/") for key in rows(tmp_path / "out")[-1])


def test_images_that_are_made_without_numbers_are_spoken_of(run, numbered, tmp_path, capsys, tiny):
    how = ("--model", str(run[1]), "--num_inference_steps", "1", "--num_images", "4")
    with in_fresh_accelerate():
        assert sample([*how, "--output_dir", str(tmp_path / "samples")]) == 0
    said = "the model was trained with numbers (weight, place), and these images have none: "
    assert said + "--vectors gives them" in capsys.readouterr().err
    plain = clothes(tmp_path / "plain")
    how = (*how, "--features", "tiny", "--reference", str(plain), "--img_size", "28")
    with in_fresh_accelerate():
        assert evaluate([*how, "--output", str(tmp_path / "found.json")]) == 0
    assert said + "name images with such columns" in capsys.readouterr().err


def test_too_many_without_numbers_end_the_run(numbered, tmp_path, capsys):
    root = shutil.copytree(numbered, tmp_path / "data")
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    lines = [line | {"weight": None if n % 3 == 0 else 1.0 + n} for n, line in enumerate(lines)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--data_path", str(root), *COLUMNS, "--max_steps", "30", "--output_dir", str(tmp_path / "out"))
    assert train_here(*flags) == 2
    assert "its weight is 'None' and not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vector_column", "wieght"), "--vector_column wieght: "),
        (("--vector_column", "weight", "weight"), "--vector_column weight weight: names a column twice"),
        (("--guidance_on", "condition"), "add --condition_from or --vector_column"),
    ],
)
def test_settings_that_do_not_fit_are_refused(numbered, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(numbered), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_with_several_labels_are_trained_on(numbered, tmp_path):
    root = shutil.copytree(numbered, tmp_path / "data")
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    lines = [line | {"tags": ["even", "odd"][n % 2 :] if n % 3 else []} for n, line in enumerate(lines)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--data_path", str(root), "--label_column", "tags", *COLUMNS, "--max_steps", "4", "--holdout", "0.2")
    flags = (*flags, "--save_every_steps", "2", "--val_every_steps", "2", "--keep_checkpoints", "9")
    assert train_here(*flags, "--output_dir", str(tmp_path / "out")) == 0
    pipe, of_checkpoint = jit.load(tmp_path / "out"), jit.load(last_checkpoint(tmp_path / "out"))
    for one in (pipe, of_checkpoint):
        assert one.label_ids([["even", "odd"], "odd", None]) == [[0, 1], 1, 2]
        assert one.transformer.config.has_several_labels
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "out", again, ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(again), "--resume", "auto") == 0
    assert_same_state(tmp_path / "out", again)
    start = ("--data_path", str(root), "--label_column", "tags", "--init_from", str(tmp_path / "out"))
    tuned = (*start, *COLUMNS, "--max_steps", "2", "--lora_rank", "1", "--output_dir", str(tmp_path / "lora"))
    assert train_here(*tuned) == 0
