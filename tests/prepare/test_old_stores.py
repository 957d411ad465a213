"""Stores that fc94876 prepared are read, and found whole."""

import shutil

import pytest
from helpers import read_metrics, train_here

from jit_accel.prepare import main

FLAGS = ["--model", "JiT-XS/2", "--img_size", "8", "--max_steps", "3", "--holdout", "0.2"]


@pytest.mark.parametrize("store", ["store", "shards"])
def test_a_store_is_whole(old_folders, store):
    assert main(["--verify", store]) == 0


@pytest.mark.parametrize("store", ["store", "shards"])
def test_a_training_reads_a_store(old_folders, tmp_path, store):
    assert train_here(*FLAGS, "--data_path", store, "--output_dir", str(tmp_path / "run")) == 0
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("store", ["store", "shards"])
def test_a_finished_preparation_is_not_begun_anew(old_folders, tmp_path, store, capsys):
    folder = tmp_path / store
    shutil.copytree(store, folder)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    form = ["--shard_images", "10"] if store == "store" else ["--format", "png"]
    main(["--data_path", "images", "--output_dir", str(folder), "--img_size", "8", *form])
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
