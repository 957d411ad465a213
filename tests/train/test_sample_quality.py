"""The distance of generated images that a training measures on its way."""

from __future__ import annotations

import os
import re
import signal

import numpy as np
import pytest
import tiny_features
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import Group, assert_same_state, last_checkpoint, rows, train_group, train_here

from jit_accel.evaluate.evaluator import Evaluator
from jit_accel.evaluate.features import load_features
from jit_accel.model import guidance
from jit_accel.model.generation import SamplerSettings
from jit_accel.model.loading import load_pipeline
from jit_accel.monitor.log import read_metrics
from jit_accel.train.trainer import Trainer

EVAL = [
    *("--eval_every_steps", "3", "--eval_images", "12", "--eval_features", "tiny"),
    *("--max_steps", "6", "--ema_decays", "0.5", "--guidance_scale", "3"),
    *("--learning_rate", "0.03"),  # so that classes differ after six steps
]
pytestmark = pytest.mark.usefixtures("tiny")
KEY = "eval/fd_tiny"


def measured(folder) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row[KEY], row[f"{KEY}_unguided"]) for row in read_metrics(folder) if KEY in row}


@pytest.fixture(scope="module")
def run(tiny, images, tmp_path_factory):
    """A run that measured at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("quality") / "run"
    assert train_here("--data_path", str(images), "--output_dir", str(folder), *EVAL) == 0
    return folder


def test_the_distances_stand_in_the_rows_of_their_steps_and_the_last_is_that_of_the_pipeline(run, images):
    found = measured(run)
    assert list(found) == [3, 6]
    assert all(value > 0 and guided != value for guided, value in found.values())

    for known in (AcceleratorState, PartialState, GradientState):
        known._reset_state()
    evaluator = Evaluator(load_features("tiny"), Accelerator(cpu=True), ("fd_tiny",))
    reference = evaluator.load_reference(str(images), 28)
    pipeline = load_pipeline(str(run))
    for scale, value in zip((3.0, 1.0), found[6]):
        values = evaluator.measure_pipeline(pipeline, reference, 12, SamplerSettings(2, scale))
        assert values["fd_tiny"] == pytest.approx(value, rel=1e-4)


def test_measuring_changes_no_weight_and_a_resumed_run_measures_the_same(run, images, tmp_path):
    data = ("--data_path", str(images))
    assert train_here(*data, "--output_dir", str(tmp_path / "never"), *EVAL, "--eval_every_steps", "0") == 0
    assert measured(tmp_path / "never") == {}
    assert_same_state(run, tmp_path / "never")
    assert train_here(*data, "--output_dir", str(tmp_path / "cut"), *EVAL, "--save_every_steps", "4") == 0
    for path in (tmp_path / "cut" / "checkpoints").glob("step_00000006*"):
        path.rename(path.with_name("gone"))
    stamp = (tmp_path / "cut" / "eval_reference.npz").stat().st_mtime_ns
    assert train_here(*data, "--output_dir", str(tmp_path / "cut"), *EVAL, "--resume", "auto") == 0
    assert rows(tmp_path / "cut") == rows(run)
    assert_same_state(run, tmp_path / "cut")
    assert (tmp_path / "cut" / "eval_reference.npz").stat().st_mtime_ns == stamp  # looked at once


def test_a_failure_of_an_evaluation_costs_neither_a_step_nor_the_run(run, images, tmp_path, monkeypatch, capsys):
    measure, saved = Evaluator.measure_pipeline, []

    def fail_at_first(self, *args, **kwargs):
        saved.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()))
        if len(saved) == 1:
            raise torch.OutOfMemoryError("no memory")
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "measure_pipeline", fail_at_first)
    flags = ("--output_dir", str(tmp_path / "run"), *EVAL, "--save_every_steps", "3")
    assert train_here("--data_path", str(images), *flags) == 0
    assert "step 3 is not evaluated, and training goes on: OutOfMemoryError: no memory" in capsys.readouterr().err
    assert saved[0] == ["step_00000003"]  # before anything can happen
    assert measured(tmp_path / "run") == {6: measured(run)[6]}
    assert_same_state(run, tmp_path / "run")


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_told_to_stop_evaluates_only_when_it_goes_on(run, images, tmp_path, monkeypatch, step):
    save = Trainer.save

    def save_and_be_told(self):
        save(self)
        if self.step == step and not (tmp_path / "told").exists():
            (tmp_path / "told").touch()
            self.stop.number = signal.SIGTERM

    monkeypatch.setattr(Trainer, "save", save_and_be_told)
    command = ("--data_path", str(images), "--output_dir", str(tmp_path / "run"), *EVAL, "--save_every_steps", "3")
    assert train_here(*command) == 128 + signal.SIGTERM
    assert list(measured(tmp_path / "run")) == [3][: step // 6]
    assert train_here(*command, "--resume", "auto") == 0
    assert rows(tmp_path / "run") == rows(run)


def test_a_stop_is_heeded_within_a_sheet_and_an_evaluation(run, images, tmp_path, monkeypatch):
    out, place, told, calls = tmp_path / "run", ["sheet"], [], []
    predict, measure = guidance.guided_prediction, Evaluator.measure_pipeline

    def predict_and_be_told(*args):
        calls.append(place[0])
        if place[0] not in told:
            told.append(place[0])
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(*args)

    def measure_there(self, *args, **kwargs):
        place[0] = "evaluation"
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(guidance, "guided_prediction", predict_and_be_told)
    monkeypatch.setattr(Evaluator, "measure_pipeline", measure_there)
    command = ("--data_path", str(images), "--output_dir", str(out), *EVAL, "--sample_every_steps", "3")
    assert train_here(*command) == 128 + signal.SIGTERM
    assert (told, calls, last_checkpoint(out).name) == (["sheet"], ["sheet"], "step_00000003")  # one step
    assert not list(out.glob("samples/*"))
    assert train_here(*command, "--resume", "auto") == 128 + signal.SIGTERM
    assert (told, calls.count("evaluation"), measured(out)) == (["sheet", "evaluation"], 1, {})
    assert [path.name for path in out.glob("samples/*")] == ["step_00000003.png"]
    assert train_here(*command, "--resume", "auto") == 0
    assert measured(out) == measured(run)
    assert len(list(out.glob("samples/*"))) == 2


@pytest.mark.multiprocess
def test_two_processes_leave_an_evaluation_together_and_measure_it_later(alone, images, tmp_path):
    out = tmp_path / "run"
    flags = ["--data_path", str(images), *EVAL, *SHORT, "--batch_size", "2", "--output_dir", str(out)]
    group = Group(flags, tmp_path / "log.txt", 2, {"TEST_SETUP": "test_sample_quality:_stop_one_within"})
    assert group.wait() == [128 + signal.SIGUSR1] * 2, group.output()
    assert measured(out) == {}
    output = train_group(
        tmp_path, *flags, "--resume", "auto", num_processes=2, environment={"TEST_SETUP": "tiny_features:install"}
    )
    assert "Resumed from" in output
    assert np.allclose(list(measured(out).values()), list(measured(alone).values()), rtol=1e-3)


def _stop_one_within():
    tiny_features.install()
    predict = guidance.guided_prediction

    def predict_and_be_told(*args):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return predict(*args)

    guidance.guided_prediction = predict_and_be_told


@pytest.mark.multiprocess
def test_an_evaluation_that_fails_on_one_process_costs_its_values_alone(images, tmp_path):
    """However far the others have got by then: they look for a stop meanwhile."""
    out = tmp_path / "run"
    flags = ["--data_path", str(images), *EVAL, "--eval_num_inference_steps", "6", "--output_dir", str(out)]
    group = Group(flags, tmp_path / "log.txt", 2, {"TEST_SETUP": "test_sample_quality:_fail_on_one"})
    assert group.wait() == [0, 0], group.output()
    assert (
        group.output().count("step 3 is not evaluated, and training goes on: process 1: OutOfMemoryError: no memory")
        == 1
    )
    assert list(measured(out)) == [6]


def _fail_on_one():
    tiny_features.install()
    predict, measure, calls = guidance.guided_prediction, Evaluator.measure_pipeline, []

    def measure_noted(self, *args, **kwargs):
        calls.append("evaluation")
        return measure(self, *args, **kwargs)

    def predict_once_not(*args):
        if os.environ["RANK"] == "1" and calls == ["evaluation"]:
            raise torch.OutOfMemoryError("no memory")
        return predict(*args)

    Evaluator.measure_pipeline, guidance.guided_prediction = measure_noted, predict_once_not


def test_a_dry_run_finds_a_wrong_reference(images, tmp_path, capsys):
    command = ("--data_path", str(images), "--output_dir", str(tmp_path / "run"), *EVAL, "--dry_run")
    for wrong in ("nowhere", "nowhere.npz"):
        assert train_here(*command, "--eval_reference", str(tmp_path / wrong)) == 2
        assert f"--eval_reference {tmp_path / wrong}: " in capsys.readouterr().err


SHORT = ["--eval_images", "11", "--max_steps", "2", "--eval_every_steps", "1"]


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """One process with the global batch of two."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train_here("--data_path", str(images), *EVAL, *SHORT, "--output_dir", str(folder)) == 0
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("environment", [{}, {"TEST_FSDP2_PRECISION": "no"}], ids=["ddp", "fsdp2"])
def test_two_processes_measure_together_what_one_does(images, alone, tmp_path, environment):
    flags = ("--data_path", str(images), *EVAL, *SHORT, "--batch_size", "2", "--output_dir", str(tmp_path / "run"))
    output = train_group(
        *(tmp_path, *flags),
        num_processes=2,
        environment={"TEST_SETUP": "tiny_features:install", **environment},
    )
    assert "Step 2: fd_tiny " in output
    assert np.allclose(list(measured(tmp_path / "run").values()), list(measured(alone).values()), rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--eval_features", "efficientnet"],
            "--eval_features efficientnet: unknown.*Did you mean 'efficientnet_lite0'",
        ),
        (["--eval_features", "inception"], "--eval_features inception: .*--eval_features efficientnet_lite0 works"),
        (
            ["--eval_features", "efficientnet_lite0", "--eval_feature_weights", "nowhere.pth"],
            "--eval_feature_weights nowhere.pth: cannot be read",
        ),
        (["--eval_reference", "nowhere"], "--eval_reference nowhere: no such"),
        (["--eval_reference", "nowhere.npz"], "--eval_reference nowhere.npz: cannot be read"),
        (["--eval_images", "1"], "--eval_images 1: must be at least 2"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(images, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code = train_here("--data_path", str(images), "--output_dir", str(tmp_path / "run"), *EVAL, *flags)
    assert code == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors.replace("\n", " ")), errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
