import os
import shutil
import signal
import time

import pytest
import torch
from diffusers import DiffusionPipeline  # noqa: F401 (imported once, before the processes)
from helpers import Group, assert_same_state, last_checkpoint, rows, state, train_group, train_here
from PIL import Image

from jit_accel import JiTPipeline
from jit_accel.tracking import MetricsLog, read_metrics


def losses(output_dir):
    return [row["train/loss"] for row in rows(output_dir)]


def test_a_run_leaves_all_it_promises(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2") == 0
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert [row["train/learning_rate"] for row in rows(out)][:3] == [0, 5e-4, 1e-3]
    assert all(row["train/grad_norm"] > 0 for row in rows(out))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    for picture in ("samples/step_00000006.png", "loss_curve.png", "pipeline/samples.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 100
    files = {str(p.relative_to(out / "pipeline")) for p in (out / "pipeline").rglob("*") if p.is_file()}
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    card = (out / "pipeline" / "README.md").read_text()
    assert "Trouser" in card
    assert str(tmp_path) not in card

    pipe = JiTPipeline.from_pretrained(out / "pipeline")
    weights = dict(pipe.transformer.named_parameters())
    for name, average in state(out).items():
        if name.startswith("ema_auto/"):
            assert torch.equal(weights[name.removeprefix("ema_auto/")], average)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(["trouser", "Bag"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in made] == [(28, 28)] * 2

    printed = capsys.readouterr().out
    assert f"Pipeline:   {out / 'pipeline'}" in printed
    # Run again, nothing is done again.
    before = (out / "pipeline" / "model_index.json").stat().st_mtime_ns
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--resume", "auto") == 0
    assert (out / "pipeline" / "model_index.json").stat().st_mtime_ns == before
    assert len(rows(out)) == 6


def test_the_recorded_configuration_runs_the_run_again(images, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert train_here("--data_path", str(images), "--output_dir", str(a), "--label_drop_prob", "0.3") == 0
    assert train_here("--config", str(a / "config.yaml"), "--output_dir", str(b)) == 0
    assert rows(a) == rows(b)
    assert_same_state(a, b)


def test_twenty_golden_steps_on_a_cpu(images, tmp_path):
    """The losses of the first version; a change here is a change of the training, and must be meant."""
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "20", "--optimizer", "adamw"]
    assert train_here(*flags) == 0
    assert losses(tmp_path)[::4] + losses(tmp_path)[-1:] == pytest.approx(GOLDEN_LOSSES, rel=2e-3)


GOLDEN_LOSSES = [1.54733, 1.3824, 0.684845, 0.779758, 0.791159, 0.627839]


def test_muon_learns_too(images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "20", "--optimizer", "muon"]
    assert train_here(*flags) == 0
    assert sum(losses(tmp_path)[-5:]) < 0.8 * sum(losses(tmp_path)[:5])


def test_every_pair_of_prediction_and_loss_trains(images, tmp_path):
    for prediction in "xev":
        for space in "xev":
            out = tmp_path / f"{prediction}{space}"
            flags = ["--prediction", prediction, "--loss_space", space, "--max_steps", "2", "--dry_run"]
            assert train_here("--data_path", str(images), "--output_dir", str(out), *flags) == 0
            assert not out.exists()


def test_gradient_checkpointing_changes_nothing_but_memory_even_with_dropout(images, tmp_path):
    flags = ["--data_path", str(images), "--proj_dropout", "0.2", "--max_steps", "3"]
    assert train_here(*flags, "--output_dir", str(tmp_path / "a")) == 0
    assert train_here(*flags, "--output_dir", str(tmp_path / "b"), "--gradient_checkpointing") == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)


@pytest.mark.multiprocess
def test_accumulation_and_processes_are_the_same_thing(images, tmp_path):
    """(1 process, 4 micro-steps) = (2, 2) = (4, 1): the same images, noise, steps and weights."""
    runs = {}
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        out = runs[processes] = tmp_path / f"{processes}"
        flags = ["--data_path", str(images), "--output_dir", str(out), "--batch_size", "3", "--max_steps", "5"]
        train_group(tmp_path, *flags, "--gradient_accumulation_steps", str(accumulation), num_processes=processes)
    for processes in (2, 4):
        assert losses(runs[processes]) == pytest.approx(losses(runs[1]), rel=1e-4)
        for a, b in zip(rows(runs[1]), rows(runs[processes])):
            assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)
            assert a["train/learning_rate"] == b["train/learning_rate"]  # counts optimizer steps
        one, other = state(runs[1]), state(runs[processes])
        start = dict(initial_weights())
        for name in start:
            # Adam turns rounding into a whole step where a gradient is next to nothing, so: distance against travel.
            key = f"model/{name}"
            travel = (one[key] - start[name]).norm()
            assert (one[key] - other[key]).norm() <= 0.02 * travel + 1e-6, name


def initial_weights():
    from jit_accel.model import build_model

    torch.manual_seed(0)
    return build_model("JiT-Ti/7", img_size=28, num_classes=4).state_dict()


@pytest.mark.multiprocess
def test_ranks_hold_equal_weights_after_training(images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    group = Group(flags, tmp_path / "log.txt", 2, {"TEST_WEIGHTS_FOLDER": str(tmp_path)})
    assert group.wait() == [0, 0], group.output()
    weights = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    moved = [name for name, p in initial_weights().items() if not torch.equal(weights[0][name], p)]
    assert len(moved) > 20


@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(images, tmp_path, processes, workers):
    """kill -9 three times, at whatever moment, across an epoch's end (44 images); bit for bit the same run."""
    flags = ["--data_path", str(images), "--num_workers", str(workers), "--max_steps", "14", "--save_every_steps", "3"]
    flags += ["--proj_dropout", "0.1", "--resume", "auto"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_group(tmp_path, *flags, "--output_dir", str(whole), num_processes=processes)
    for kill_at in (1, 5, 10):
        group = Group([*flags, "--output_dir", str(broken)], tmp_path / "killed.txt", processes)
        deadline = time.monotonic() + 60
        while len(rows(broken)) < kill_at and time.monotonic() < deadline:
            time.sleep(0.002)
        group.kill()
    assert len(rows(broken)) < 14
    printed = train_group(tmp_path, *flags, "--output_dir", str(broken), num_processes=processes)
    assert "Resumed from" in printed
    assert rows(broken) == rows(whole)
    assert_same_state(whole, broken)


@pytest.mark.multiprocess
def test_a_random_access_run_resumes_on_another_number_of_processes(images, tmp_path):
    flags = ["--data_path", str(images), "--save_every_steps", "3", "--resume", "auto", "--log_every_steps", "3"]
    a, b = tmp_path / "a", tmp_path / "b"
    train_group(tmp_path, *flags, "--output_dir", str(a), "--batch_size", "4", num_processes=2)
    half = [*flags, "--output_dir", str(b), "--max_steps", "3", "--lr_schedule", "constant"]
    train_group(tmp_path, *half, "--batch_size", "4", num_processes=2)
    shutil.rmtree(b / "pipeline")
    train_group(tmp_path, *flags, "--output_dir", str(b), "--batch_size", "8", num_processes=1)
    # The cosine differs in the first half, so only what depends on images and noise is comparable.
    assert [row["step"] for row in rows(b)] == [1, 2, 3, 4, 5, 6]
    assert losses(b)[:2] == pytest.approx(losses(a)[:2], rel=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_leaves_a_note(images, tmp_path, processes):
    out = tmp_path / "run"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--max_steps", "100000", "--resume", "auto"]
    group = Group(flags, tmp_path / "log.txt", processes)
    while len(rows(out)) < 3:
        time.sleep(0.01)
    os.kill(group.processes[0].pid, signal.SIGTERM)  # one of them is enough
    assert group.wait() == [128 + signal.SIGTERM] * processes, group.output()
    step = rows(out)[-1]["step"]
    assert last_checkpoint(out).name == f"step_{step:08d}"
    assert "go on with --resume auto" in (out / "INTERRUPTED").read_text()


def test_the_log_of_a_resumed_run_has_no_doubled_and_no_missing_step(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write([{"step": step} for step in range(1, 8)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "tr')  # killed while writing
    log = MetricsLog(tmp_path, step=5)
    log.write([{"step": 6}])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
