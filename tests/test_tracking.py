"""Weights & Biases as the trainer uses it: offline for real, and failing in every way that must not matter."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest
from helpers import Group, rows, train_here

LEVELDB_BLOCK = 32768
KEYS = ("train/loss", "train/learning_rate", "train/grad_norm")


@pytest.fixture
def wandb_mode(monkeypatch, tmp_path):
    def use(mode, **environment):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return use


def offline_records(output_dir):
    """The records of the offline run, read back from its file: a LevelDB log behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (output_dir / "wandb").glob("offline-run-*/*.wandb")
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if LEVELDB_BLOCK - position % LEVELDB_BLOCK < 7:  # no record begins in the last bytes of a block
            position += LEVELDB_BLOCK - position % LEVELDB_BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_an_offline_run_holds_every_step_and_the_whole_configuration(images, tmp_path, wandb_mode, capsys):
    wandb_mode("offline")
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--log_every_steps", "4"]
    assert train_here(*flags, "--use_wandb", "--wandb_project", "shop", "--wandb_name", "clothes-1") == 0
    printed = capsys.readouterr().out
    assert "Wandb initialized: project=shop, name=clothes-1" in printed
    assert f"wandb sync {tmp_path / 'out' / 'wandb' / 'offline-run-'}" in printed

    config, history = {}, {}
    for record in offline_records(tmp_path / "out"):
        if record.HasField("run"):
            assert record.run.project == "shop"
            assert record.run.display_name == "clothes-1"
        updates = list(record.run.config.update) + list(record.config.update)
        config.update({item.key: json.loads(item.value_json) for item in updates if item.key})
        if record.HasField("history"):
            row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.setdefault(row["_step"], {}).update(row)
    logged = {step: tuple(row[key] for key in KEYS) for step, row in history.items() if KEYS[0] in row}
    assert logged == {row["step"]: tuple(row[key] for key in KEYS) for row in rows(tmp_path / "out")}
    assert sorted(logged) == [1, 2, 3, 4, 5, 6]
    for key, value in {
        "model": "JiT-Ti/7",
        "global_batch_size": 4,
        "img_size": 28,
        "num_parameters": 2_881_491,
    }.items():
        assert config[key] == value, key
    assert any("samples/grid" in name for row in history.values() for name in row)


def test_no_host_sync_between_flushes(images, tmp_path, monkeypatch):
    """Nothing asks a tensor for its value during a step: `item`, `tolist` and their like wait for the device."""
    import torch

    from jit_accel.trainer import Trainer

    calls = []
    honest = Trainer.train_step

    def watched(self):
        real = {
            name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy")
        }
        before = self.feed.loader.__class__.__next__
        try:
            batches = [next(self.feed.loader) for _ in range(self.config.optim.gradient_accumulation_steps)]
            supply = iter(batches)
            self.feed.loader.__class__.__next__ = lambda loader: next(supply)
            for name, method in real.items():

                def recorded(tensor, *args, name=name, method=method, **kwargs):
                    if tensor.device == self.accelerator.device and sys._getframe(1).f_code.co_filename.count(
                        "jit_accel"
                    ):
                        calls.append((name, sys._getframe(1).f_code.co_name))
                    return method(tensor, *args, **kwargs)

                setattr(torch.Tensor, name, recorded)
            honest(self)
        finally:
            self.feed.loader.__class__.__next__ = before
            for name, method in real.items():
                setattr(torch.Tensor, name, method)

    monkeypatch.setattr(Trainer, "train_step", watched)
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--gradient_accumulation_steps", "2"]
    assert train_here(*flags, "--max_steps", "3") == 0
    assert calls == []


def not_installed(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))


def log_fails(monkeypatch):
    from accelerate import Accelerator

    def fails(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Accelerator, "log", fails)


@pytest.mark.parametrize(
    ("break_it", "warning"),
    [
        (not_installed, "Warning: wandb not available. Install with: pip install wandb"),
        (log_fails, "Warning: wandb failed to log (OSError: No space left on device)"),
    ],
)
def test_a_failing_tracker_warns_once_and_training_goes_on(
    images, tmp_path, wandb_mode, monkeypatch, capsys, break_it, warning
):
    wandb_mode("offline")
    break_it(monkeypatch)
    out = tmp_path / "out"
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--use_wandb") == 0
    printed = capsys.readouterr().err
    assert printed.count("Warning: wandb") == 1
    assert warning in printed
    assert len(rows(out)) == 6
    assert (out / "pipeline" / "model_index.json").exists()


@pytest.mark.multiprocess
def test_a_missing_key_stops_no_process(images, tmp_path):
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--use_wandb"]
    group = Group(flags, tmp_path / "log.txt", 2, environment)
    assert group.wait() == [0, 0], group.output()
    assert group.output().count("Warning: wandb could not start") == 1
    assert len(rows(tmp_path / "out")) == 6


def test_no_secret_is_recorded(images, tmp_path, wandb_mode):
    secret = "5ec2e7" * 6 + "abcd"
    wandb_mode("offline", WANDB_API_KEY=secret, HF_TOKEN=secret)
    out = tmp_path / "out"
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--use_wandb") == 0
    for folder, _, files in os.walk(out):
        for file in files:
            path = Path(folder, file)
            assert not path.is_file() or secret.encode() not in path.read_bytes(), file
