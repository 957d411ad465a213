"""Everything that watches a training, in real trainings."""

import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers import Group, assert_same_state, rows, train_group, train_here

from jit_accel.config.presets import forward_macs, parse_model_name
from jit_accel.monitor import monitor
from jit_accel.monitor.log import read_metrics
from jit_accel.monitor.metrics import T_BINS
from jit_accel.train import results
from jit_accel.train.trainer import Trainer

EVERY_STEP = {"step", "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch", "train/images_seen"}
EVERY_STEP |= {"train/time"}
EVERY_INTERVAL = {
    *("perf/images_per_second", "perf/step_time", "perf/peak_memory_gib", "data/wait_fraction", "data/bad_images"),
    *("train/update_ratio", "ema/auto/distance", "ema/auto/decay", "train/elapsed"),
}
EVERY_EPOCH = {"train/epoch_loss", "train/epoch_time", "train/samples_per_second", "train/best_loss"}


def by_t(row):
    return {key: value for key, value in row.items() if key.startswith("train/loss_by_t/")}


def test_every_metric_is_in_the_row_it_belongs_to(images, tmp_path):
    """44 images in batches of 4: eleven steps an epoch."""
    out = tmp_path / "out"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--max_steps", "24", "--log_every_steps", "5"]
    assert train_here(*flags, "--no_horizontal_flip") == 0
    found = read_metrics(out)
    assert [row["step"] for row in found] == list(range(1, 25))
    for row in found:
        step = row["step"]
        expected = set(EVERY_STEP)
        if step % 5 == 0 or step == 24:
            expected |= EVERY_INTERVAL
            if step == 24:  # no step that is measured
                expected -= {"train/update_ratio", "ema/auto/distance"}
            assert 1 <= len(by_t(row)) <= T_BINS
        if step in (11, 22):
            expected |= EVERY_EPOCH
        assert set(row) - set(by_t(row)) - {"data/worker_rss_gib"} == expected, step
        assert row["train/images_seen"] == 4 * step
        assert row["train/epoch"] == pytest.approx(step / 11)
    losses = [row["train/loss"] for row in found]
    assert found[10]["train/epoch_loss"] == pytest.approx(sum(losses[:11]) / 11)
    assert found[21]["train/epoch_loss"] == pytest.approx(sum(losses[11:22]) / 11)
    assert found[21]["train/best_loss"] == min(found[10]["train/epoch_loss"], found[21]["train/epoch_loss"])
    assert found[4]["perf/images_per_second"] == pytest.approx(4 / found[4]["perf/step_time"])
    assert 0 < found[4]["train/update_ratio"] < 0.1
    assert found[21]["train/samples_per_second"] == pytest.approx(44 / found[21]["train/epoch_time"])
    times = [row["train/time"] for row in found]  # each its own, though five are read at once
    assert times == sorted(set(times))
    assert time.time() - 600 < times[0] < times[-1] <= time.time()
    assert found[23]["train/elapsed"] - found[4]["train/elapsed"] == pytest.approx(times[23] - times[4], abs=0.05)


def test_metrics_go_on_after_a_resume_as_if_nothing_had_been(images, tmp_path, capfd):
    """Stopped inside an epoch, at a step between two flushes, with rows behind the last checkpoint."""
    flags = ["--data_path", str(images), "--max_steps", "24", "--log_every_steps", "4", "--ema_decays", "auto"]
    flags += ["--holdout", "0.1", "--val_every_steps", "8", "--sample_every_steps", "16"]
    assert train_here(*flags, "--output_dir", str(tmp_path / "whole")) == 0
    group = Group(
        [*flags, "--output_dir", str(tmp_path / "cut"), "--save_every_steps", "12"],
        tmp_path / "log.txt",
        environment={"TEST_SETUP": "test_monitoring:stop_at_19"},
    )
    assert group.wait() == [9], group.output()
    assert read_metrics(tmp_path / "cut")[-1]["step"] == 16
    assert train_here(*flags, "--output_dir", str(tmp_path / "cut"), "--resume", "auto") == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert any("train/best_loss" in row and row["step"] > 16 for row in rows(tmp_path / "cut"))
    printed = capfd.readouterr().out
    assert "Resumed" in printed
    last = rows(tmp_path / "cut")[23]
    assert f"Step 24: val/loss {last['val/loss']:.4g}, ema/val_loss {last['ema/val_loss']:.4g}\n" in printed
    assert f"Drew {tmp_path / 'cut' / 'samples' / 'step_00000016.png'}\n" in printed
    before, after = (row["train/elapsed"] for row in read_metrics(tmp_path / "cut") if row["step"] in (12, 16))
    assert 0 < before < after
    assert [row["step"] for row in rows(tmp_path / "cut") if "ema/val_loss" in row] == [8, 16, 24]


@pytest.mark.parametrize("step", [4, 6])
def test_a_validation_that_a_stop_prevented_is_made_up_for(images, tmp_path, monkeypatch, step):
    """Also that of the last step."""
    flags = ["--data_path", str(images), "--holdout", "0.2", "--val_every_steps", "4", "--resume", "auto"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_here(*flags, "--output_dir", str(whole)) == 0
    train_step = Trainer.train_step

    def train_step_and_stop(self):
        train_step(self)
        if self.step == step:
            self.stop.number = signal.SIGTERM

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step_and_stop)
        assert train_here(*flags, "--output_dir", str(cut)) == 128 + signal.SIGTERM
    assert "val/loss" not in rows(cut)[-1]
    for _ in range(2):
        assert train_here(*flags, "--output_dir", str(cut)) == 0
        assert rows(cut) == rows(whole)


def stop_at_19():
    from jit_accel.train.trainer import Trainer

    step = Trainer.train_step

    def stopping(self):
        step(self)
        if self.step == 19:
            os._exit(9)

    Trainer.train_step = stopping


@pytest.mark.multiprocess
def test_two_processes_tell_what_one_with_twice_the_micro_steps_tells(images, tmp_path):
    flags = ["--data_path", str(images), "--no_horizontal_flip", "--log_every_steps", "3"]
    train_group(tmp_path, *flags, "--output_dir", str(tmp_path / "two"), num_processes=2)
    assert train_here(*flags, "--output_dir", str(tmp_path / "one"), "--gradient_accumulation_steps", "2") == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3), a["step"]
    memory = [row["perf/peak_memory_gib"] for row in read_metrics(tmp_path / "two") if "perf/peak_memory_gib" in row]
    assert all(0.1 < gib < 4 for gib in memory)


@pytest.mark.multiprocess
def test_sharded_weights_are_watched_as_whole_ones(images, tmp_path):
    flags = ["--data_path", str(images), "--log_every_steps", "2", "--max_steps", "4"]
    train_group(tmp_path, *flags, "--output_dir", str(tmp_path / "ddp"), num_processes=2)
    fsdp2 = {"TEST_FSDP2_PRECISION": "no"}
    train_group(tmp_path, *flags, "--output_dir", str(tmp_path / "fsdp"), num_processes=2, environment=fsdp2)
    for name in ("train/update_ratio", "ema/auto/distance"):
        whole, sharded = ([row[name] for row in rows(tmp_path / run) if name in row] for run in ("ddp", "fsdp"))
        assert len(whole) == 2
        assert sharded == pytest.approx(whole, rel=1e-3)


def test_the_validation_loss_of_the_average_is_that_of_its_weights(images, tmp_path):
    """Trained on with weights that stand still, the average is the weights, and so are both losses."""
    out = tmp_path / "out"
    flags = ["--data_path", str(images), "--holdout", "0.2", "--val_every_steps", "3", "--output_dir", str(out)]
    assert train_here(*flags) == 0
    validated = [row for row in rows(out) if "val/loss" in row]
    assert [row["step"] for row in validated] == [3, 6]
    assert all(row["val/loss"] == row["ema/val_loss"] for row in validated)  # `auto` copies the first ten steps
    assert train_here(*flags[:-1], str(tmp_path / "slow"), "--ema_decays", "0.5") == 0
    last = [row for row in rows(tmp_path / "slow") if "val/loss" in row][-1]
    assert last["val/loss"] == validated[-1]["val/loss"]
    assert last["ema/val_loss"] > last["val/loss"]  # it trails behind


def test_mfu_is_the_models_work_over_the_devices_peak(images, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "peak_flops", lambda device, precision: 1e12)
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out")) == 0
    flops = 6 * forward_macs(*parse_model_name("JiT-XS/7"), 28, 28)
    for row in read_metrics(tmp_path / "out"):
        assert row["perf/mfu"] == pytest.approx(flops * row["perf/images_per_second"] / 1e12)


def test_signs_of_trouble_are_logged_and_told_once_with_a_remedy(images, tmp_path, capfd):
    out = tmp_path / "out"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--max_steps", "20", "--learning_rate", "1e-9"]
    thresholds = ["--health_max_grad_norm", "0.01", "--health_flat_steps", "16", "--health_min_grad_norm", "0"]
    assert train_here(*flags, *thresholds) == 0
    found = read_metrics(out)
    assert all(row["health/grad_exploding"] == row["train/grad_norm"] for row in found)
    assert [row["step"] for row in found if "health/loss_flat" in row] == [16]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Warning: step")]
    assert len(warnings) == 2
    assert warnings[0].startswith("Warning: step 1: the gradient norm is ")
    assert "--learning_rate" in warnings[0]
    assert warnings[1].startswith("Warning: step 16: the loss is still ")


def test_a_loss_that_is_not_finite_is_logged_as_valid_json(images, tmp_path, monkeypatch, capfd):
    from jit_accel.train.trainer import Trainer

    honest = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: honest(self, batch) * (math.nan if self.step == 3 else 1))
    out = tmp_path / "out"
    assert train_here("--data_path", str(images), "--output_dir", str(out)) == 2

    def refuse(name):
        raise ValueError(name)  # NaN and Infinity are no JSON

    lines = (out / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line, parse_constant=refuse) for line in lines][-1]
    assert (last["step"], last["train/loss"], last["health/loss_not_finite"]) == (4, None, 1.0)
    assert (out / "FAILED").read_text().startswith("train/loss is nan at step 4")
    err = capfd.readouterr().err
    assert err.count("Warning: step 4: the loss or the gradient norm is not finite") == 1
    assert "error: train/loss is nan at step 4" in err


def test_watching_does_not_change_what_is_trained(images, tmp_path):
    """Neither do intervals of the log, samples and validation, nor the report."""
    flags = ["--data_path", str(images)]
    quiet = ["--log_every_steps", "6", "--output_dir", str(tmp_path / "quiet")]
    watched = ["--log_every_steps", "1", "--sample_every_steps", "2", "--output_dir", str(tmp_path / "watched")]
    holdout = ["--holdout", "0.1", "--val_every_steps"]
    assert train_here(*flags, *quiet, *holdout, "0") == 0
    assert train_here(*flags, *watched, *holdout, "1", "--html_report") == 0
    assert_same_state(tmp_path / "quiet", tmp_path / "watched")


def test_the_record_tells_code_versions_and_devices(images, tmp_path):
    out = tmp_path / "out"
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--max_steps", "2") == 0
    told = json.loads((out / "run.json").read_text())
    assert (told["num_parameters"], told["num_processes"], told["device"]) == (6_883, 1, "cpu")
    assert (told["model"], told["img_size"], told["global_batch_size"]) == ("JiT-XS/7", 28, 4)
    assert told["torch_version"] == torch.__version__
    assert told["git_commit"] is None or len(told["git_commit"].removesuffix("-dirty")) == 40


def test_the_commit_is_of_the_code_and_not_of_where_it_was_copied_to(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    code = tmp_path / "code.py"
    code.write_text("1")
    monkeypatch.setattr(results, "__file__", str(code))
    assert results.git_commit() is None
    git("init")
    (tmp_path / "other.py").write_text("2")
    git("add", "other.py")
    git("commit", "-m", "somebody else's")
    assert results.git_commit() is None
    git("add", "code.py")
    git("commit", "-m", "ours")
    assert results.git_commit() == git("rev-parse", "HEAD")
    code.write_text("3")
    assert results.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_secrets_in_settings_are_neither_kept_nor_shown(images, tmp_path, capfd, monkeypatch):
    secret = "s3cr3tT0ken"
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    notes = f"from https://me:{secret}@host/photos?token={secret}"
    more = ["--wandb_tags", f"https://u:{secret}@h/", "--wandb_group", f"s3://u:{secret}@h/", "--wandb_name", "a b"]
    flags = ["--data_path", str(images), "--output_dir", str(out), "--use_wandb", "--wandb_notes", notes, *more]
    assert train_here(*flags, "--html_report", "--save_every_steps", "3") == 0
    assert train_here(*flags, "--html_report", "--resume", str(out / "checkpoints" / "step_00000003")) == 0
    for path in out.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    assert "https://***@host/photos?***" in (out / "run.json").read_text()
    assert secret not in "".join(capfd.readouterr())


@pytest.mark.parametrize("flag", ["--data_path", "--config", "--resume", "--image_column"])
def test_secrets_in_wrong_settings_are_not_printed(flag, images, tmp_path, capfd):
    secret = "s3cr3tT0ken"
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), flag, f"https://u:{secret}@h.invalid/x"]
    assert train_here(*flags) == 2
    printed = "".join(capfd.readouterr())
    assert "***" in printed
    assert secret not in printed


def resumed_with(flags, out, *more, until="12"):
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "12", "--save_every_steps", "4") == 0
    checkpoint = str(out / "checkpoints" / "step_00000008")
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", until, "--resume", checkpoint, *more) == 0


def test_epochs_do_not_run_backwards_with_another_batch_size(images, tmp_path):
    out = tmp_path / "out"
    resumed_with(["--data_path", str(images)], out, "--batch_size", "2", until="16")
    found = read_metrics(out)
    assert [row["step"] for row in found] == list(range(1, 17))
    assert [row["train/images_seen"] for row in found] == [*range(4, 33, 4), *range(34, 49, 2)]
    assert [row["train/epoch"] for row in found] == pytest.approx([row["train/images_seen"] / 44 for row in found])
    assert [row["step"] for row in found if "train/epoch_loss" in row] == [14]


@pytest.mark.parametrize(("more", "count"), [(("--learning_rate", "1e-4"), 1), (("--num_workers", "1"), 0)])
def test_trackers_that_keep_what_was_abandoned_are_warned_of(images, tmp_path, capfd, monkeypatch, more, count):
    monkeypatch.setenv("WANDB_MODE", "offline")
    resumed_with(["--data_path", str(images), "--use_wandb"], tmp_path / "out", *more)
    assert capfd.readouterr().err.count("the trackers have steps 9 to 12 as they were trained") == count


def full_disk():
    """Console and sample sheets cannot be written from the third step on."""
    from PIL import Image

    from jit_accel.train.trainer import Trainer

    step = Trainer.train_step

    def filling(self):
        step(self)
        if self.step == 3:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, 1)
            os.dup2(full, 2)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    Trainer.train_step = filling
    Image.Image.save = fail


@pytest.mark.multiprocess
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_under_the_console_and_the_samples_ends_with_a_message_at_most(images, tmp_path):
    """The training goes on to its last checkpoint; only the pipeline folder, which needs the sheet, is refused."""
    out = tmp_path / "out"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--sample_every_steps", "4", "--max_steps", "8"]
    group = Group(flags, tmp_path / "log.txt", 2, {"TEST_SETUP": "test_monitoring:full_disk"})
    assert group.wait() == [2, 2], group.output()
    assert "2 x cpu" in group.output()
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 9))
    assert (out / "checkpoints" / "step_00000008").is_dir()
    assert "The training is complete" in (out / "FAILED").read_text()
    assert train_here(*flags, "--resume", "auto") == 0
    assert (out / "pipeline" / "model_index.json").exists()
    assert not (out / "FAILED").exists()
