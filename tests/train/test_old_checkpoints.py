"""Runs that fc94876 began go on as they did there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import png, tar
from helpers import last_checkpoint, read_metrics, rows, seal_as_before, state, train_here

from jit_accel.config.settings import SETTINGS
from jit_accel.data.batches import order
from jit_accel.data.formats import folder, scan, tars

FLAGS = [
    *("--model", "JiT-XS/2", "--img_size", "8", "--learning_rate", "1e-2", "--num_inference_steps", "3"),
    *("--max_steps", "15", "--resume", "auto"),
]
RUNS = {
    "run": [
        *("--data_path", "images", "--ema_decays", "0.5", "auto", "--holdout", "0.2"),
        *("--gradient_accumulation_steps", "2", "--proj_dropout", "0.1"),
    ],
    "muon": ["--data_path", "images", "--optimizer", "muon", "--ema_decays", "0.9", "--prediction", "v"],
    "adapter": ["--data_path", "images", "--init_from", "run/pipeline", "--lora_rank", "2", "--lora_alpha", "4"],
    "stream": ["--data_path", "parquet", "--ema_decays", "0.9", "--shuffle_buffer", "8"],
}


def resume(name, tmp_path) -> dict[int, dict]:
    """Go on with a copy of the run. Returns the rows by step."""
    folder = tmp_path / name
    shutil.copytree(name, folder)
    assert train_here(*FLAGS, *RUNS[name], "--output_dir", str(folder)) == 0
    return {row["step"]: row for row in read_metrics(folder)}


@pytest.mark.parametrize("name", ["run", "muon", "adapter"])
def test_a_run_goes_on_with_the_same_losses(old_folders, tmp_path, name, capsys):
    before = {row["step"]: row for row in read_metrics(old_folders / name)}
    rows = resume(name, tmp_path)
    (resumed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Resumed from"))
    new_ones = {*SETTINGS} - {*json.loads((old_folders / name / "run.json").read_text())}
    assert new_ones
    assert not any(f"{setting} " in resumed for setting in new_ones)  # which have their defaults
    assert list(rows) == list(range(1, 16))
    assert {step: rows[step] for step in before} == before
    for expected in json.loads((old_folders / "expected.json").read_text())["rows"][name]:
        found = rows[expected["step"]]
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3)


def test_a_stream_goes_on_with_its_weights_and_says_once_that_its_epoch_begins_anew(old_folders, tmp_path, caplog):
    """Its order of images is another one since, so its losses are others."""
    old = state(old_folders / "stream")
    rows = resume("stream", tmp_path)
    assert caplog.text.count("begins anew") == 1
    assert list(rows) == list(range(1, 16))
    assert all(np.isfinite(row["train/loss"]) for row in rows.values())
    new = state(tmp_path / "stream")
    assert new.keys() == old.keys()
    changes = [(new[name] - old[name]).abs().max() for name in old if name.startswith("model/")]
    assert 0 < max(changes) < 3 * 1.1e-2  # of three steps at the learning rate


def test_a_run_whose_folders_were_sorted_as_text_keeps_its_classes(tmp_path, monkeypatch, caplog):
    for n in range(11):
        (tmp_path / "d" / str(n)).mkdir(parents=True)
        (tmp_path / "d" / str(n) / "0.png").write_bytes(png(n))
    flags = ("--data_path", str(tmp_path / "d"), "--output_dir", str(tmp_path / "run"))
    flags = (*flags, "--warmup_steps", "0", "--max_steps")
    as_text = tuple(sorted(str(n) for n in range(11)))
    with monkeypatch.context() as patch:
        patch.setattr(folder, "named_classes", lambda names, _: ({name: i for i, name in enumerate(as_text)}, as_text))
        assert train_here(*flags, "1") == 0
    assert train_here(*flags, "2", "--resume", "auto") == 0
    assert "classes stay in the order in which the run began" in caplog.text
    names = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())["class_names"]
    assert tuple(names[str(i)] for i in range(11)) == as_text


@pytest.mark.parametrize("holdout", ["0", "0.3"])
def test_a_run_that_began_with_all_splits_keeps_them(tmp_path, monkeypatch, caplog, holdout):
    for n, name in enumerate(f"{part}/{n}.png" for n in range(4) for part in ("cat", "dog", "test")):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(png(n))
    flags = ("--data_path", str(tmp_path / "d"), "--output_dir", str(tmp_path / "run"), "--warmup_steps", "0")
    flags = (*flags, "--holdout", holdout)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "has_split_word", lambda path: False)
        assert train_here(*flags, "--max_steps", "1") == 0
    assert "left out" not in caplog.text
    assert train_here(*flags, "--max_steps", "2", "--resume", "auto") == 0
    assert "all splits are taken, with which the run began" in caplog.text
    caplog.clear()
    assert train_here(*flags, "--max_steps", "3", "--resume", "auto", "--split", "train") == 2


def test_a_run_on_tars_of_folders_that_began_without_classes_has_none(tmp_path, monkeypatch, caplog):
    tar(tmp_path / "d" / "a.tar", {f"{'ab'[n % 2]}/{n}.png": png(n) for n in range(6)})
    flags = (
        "--data_path",
        str(tmp_path / "d"),
        "--output_dir",
        str(tmp_path / "run"),
        "--warmup_steps",
        "0",
        "--max_steps",
    )
    with monkeypatch.context() as patch:
        patch.setattr(tars, "named_classes", lambda names, _: ({}, ()))
        assert train_here(*flags, "1") == 0
    assert train_here(*flags, "2", "--resume", "auto") == 0
    assert "began without the classes" in caplog.text


def forget_the_order(out: Path) -> None:
    """Make a checkpoint one of a time when there was one order only."""
    path = last_checkpoint(out)
    state = json.loads((path / "state.json").read_text())
    for loader in state["feed"]["loaders"]:
        assert loader.pop("order") == order.SORTED
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    seal_as_before(path)


@pytest.mark.parametrize("begun", order.KINDS)
def test_a_run_keeps_the_order_that_it_began_with_whatever_a_new_one_has(images, tmp_path, monkeypatch, begun):
    """Bit for bit, into its second epoch, as a run that nobody stopped."""
    most, out = {order.SORTED: order.MOST_SORTED, order.FEISTEL: 10}, tmp_path / "run"
    flags = ("--data_path", str(images), "--max_steps", "16", "--save_every_steps", "5", "--keep_checkpoints", "9")
    monkeypatch.setattr(order, "MOST_SORTED", most.pop(begun))
    assert train_here(*flags, "--output_dir", str(out)) == 0
    whole, before = state(out), rows(out)
    for path in sorted((out / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    if begun == order.SORTED:
        forget_the_order(out)
    monkeypatch.setattr(order, "MOST_SORTED", *most.values())
    assert train_here(*flags, "--output_dir", str(out), "--resume", "auto") == 0
    now = state(out)
    assert now.keys() == whole.keys()
    assert [name for name in now if not torch.equal(now[name], whole[name])] == []
    assert rows(out) == before
    assert train_here(*flags, "--output_dir", str(tmp_path / "new")) == 0
    assert [row["train/loss"] for row in rows(tmp_path / "new")] != [row["train/loss"] for row in before]
