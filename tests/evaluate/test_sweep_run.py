"""Sweeps as users run them: over a small trained model, with a small feature network."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_features
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import SPAWNER, free_port, train_here
from safetensors.torch import load_file, save_file

from jit_accel.evaluate import main, records
from jit_accel.evaluate.evaluator import Candidate
from jit_accel.model.pipeline import JiTPipeline

pytestmark = pytest.mark.usefixtures("tiny")
GRID = [
    *("--features", "tiny", "--metrics", "fd", "--num_images", "24", "--sweep_images", "8", "--sweep_top", "2"),
    *("--num_inference_steps", "2", "--batch_size", "16", "--mixed_precision", "no"),
    *("--guidance_scale", "1:3:1", "--guidance_interval", "0.1:1,0:1", "--ema", "all"),
]


@pytest.fixture(scope="module")
def trained(tiny, images, tmp_path_factory):
    """A run with two averages, of which the pipeline folder holds the worse: nearly the random weights of the start."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    flags = ("--ema_decays", "0.9999", "0.3", "--max_steps", "8", "--learning_rate", "4e-3")
    assert train_here("--data_path", str(images), "--output_dir", str(folder), *flags) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """The chart is drawn in the first test alone, and looked at in test_sweep.py."""
    if "the_winner" not in request.node.name:
        monkeypatch.setattr(records, "draw_sweep", lambda outcome, file: file.touch())


def evaluate_here(*flags: str) -> int:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        return main(list(flags))
    finally:
        del os.environ["ACCELERATE_USE_CPU"]


ODD = (*GRID, "--ema", "0.3", "--num_images", "23", "--sweep_images", "7")


@pytest.fixture(scope="module")
def swept(trained, images, tmp_path_factory):
    """A copy of the run with a sweep by one process that nothing stopped."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("swept") / "run")
    assert evaluate_here("--model", str(folder), "--reference", str(images), *ODD, "--no_write_best") == 0
    return folder


def best_of(run) -> dict:
    return json.loads((run / "sweep" / "sweep.json").read_text())["best"]


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "sweep" / "sweep.jsonl").read_text().splitlines()]


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    return load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_winner_is_the_pipelines_default_with_its_weights_and_another_sweep_costs_nothing(
    run, images, capsys, monkeypatch
):
    command = ("--model", str(run), "--reference", str(images), *GRID)
    assert evaluate_here(*command) == 0
    found, rows = json.loads((run / "sweep" / "sweep.json").read_text()), lines(run)
    assert [row["num_images"] for row in rows].count(8) == 2 * (1 + 2 * 2)
    full = [row for row in rows if row["num_images"] == 24]
    assert len(full) in (2, 3)
    assert found["best"]["fd_tiny"] == min(row["values"]["fd_tiny"] for row in full)
    assert any(row["setting"]["guidance_scale"] == 1 for row in full)
    assert found["best"]["ema"] == "0.3"

    pipeline = JiTPipeline.from_pretrained(run / "pipeline")
    assert pipeline.config.guidance_scale == found["best"]["guidance_scale"]
    assert pipeline.config.num_inference_steps == 2
    assert pipeline.config.method == "etd2"
    if found["best"]["guidance_interval"]:
        assert list(pipeline.config.guidance_interval) == found["best"]["guidance_interval"]
    average = load_file(next((run / "checkpoints").glob("step_*")) / "ema_0.3.safetensors")
    held = weights_of(run / "pipeline")
    assert all(torch.equal(held[name], average[name]) for name in average)
    card = (run / "pipeline" / "README.md").read_text()
    assert "Weights: moving average with decay `0.3`. The samples above are of decay `0.9999`: guidance 2.0" in card
    assert "They won a sweep by fd_tiny over 24 images" in card
    assert (run / "pipeline" / "samples.png").exists()
    records = json.loads((run / "pipeline" / "evaluation.json").read_text())
    assert found["best"]["fd_tiny"] in [record["metrics"]["fd_tiny"] for record in records]

    kept = [(run / "evaluation.json").read_bytes(), (run / "pipeline" / "evaluation.json").read_bytes()]
    monkeypatch.setattr(Candidate, "close", lambda self: None)
    monkeypatch.setattr("jit_accel.evaluate.evaluator.Evaluator.measure_pipeline", None)  # nothing is measured again
    assert evaluate_here(*command) == 0
    assert lines(run) == rows
    assert (run / "pipeline" / "README.md").read_text() == card
    assert kept == [(run / "evaluation.json").read_bytes(), (run / "pipeline" / "evaluation.json").read_bytes()]
    assert "Best fd_tiny over 24 images" in capsys.readouterr().out


def test_a_sweep_stopped_anywhere_ends_as_one_that_was_not(run, trained, swept, images, monkeypatch):
    from jit_accel.evaluate.evaluator import Evaluator

    command = ("--reference", str(images), *ODD, "--no_write_best")
    measure, left = Evaluator.measure_pipeline, [3]

    def measure_three(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "measure_pipeline", measure_three)
    assert evaluate_here("--model", str(run), *command) == 130
    assert len(lines(run)) == 3
    left[0] = 99
    assert evaluate_here("--model", str(run), *command) == 0
    assert 99 - left[0] == len(lines(swept)) - 3
    assert [line["values"] for line in lines(run)] == [line["values"] for line in lines(swept)]
    # --no_write_best
    assert weights_of(run / "pipeline").keys() == weights_of(trained / "pipeline").keys()
    assert (run / "pipeline" / "model_index.json").read_bytes() == (trained / "pipeline/model_index.json").read_bytes()


def test_a_pipeline_folder_keeps_its_weights_and_gets_the_guidance(run, images):
    folder = run / "pipeline"
    before = weights_of(folder)
    flags = [flag for flag in GRID if flag not in ("--ema", "all")]
    assert evaluate_here("--model", str(folder), "--reference", str(images), *flags, "--select", "fd") == 0
    after = weights_of(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert JiTPipeline.from_pretrained(folder).config.guidance_scale == best_of(folder)["guidance_scale"]
    assert "Weights: moving average with decay `0.9999`. The samples above: " in (folder / "README.md").read_text()


def test_a_run_without_a_pipeline_gets_one(run, images):
    shutil.rmtree(run / "pipeline")
    flags = [flag for flag in GRID if flag not in ("--ema", "all", "--guidance_interval", "0.1:1,0:1")]
    assert evaluate_here("--model", str(run), "--reference", str(images), *flags, "--guidance_scale", "1,2") == 0
    assert JiTPipeline.from_pretrained(run / "pipeline").config.guidance_scale == best_of(run)["guidance_scale"]


def test_an_older_checkpoint_changes_nothing_but_the_runs_records(run, images, capsys):
    (older,) = (run / "checkpoints").glob("step_*")
    shutil.copytree(older, older.with_name("step_00000009"))
    file = run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file)  # those of step 9
    before = {path: path.read_bytes() for path in (*older.iterdir(), *(run / "pipeline").rglob("*.*"))}
    flags = ("--features", "tiny", "--metrics", "fd", "--num_images", "4", "--num_inference_steps", "1")
    command = ("--model", str(older), "--reference", str(images), *flags)
    assert evaluate_here(*command, "--ema", "0.30", "--guidance_scale", "1,2") == 0
    assert "is not the newest checkpoint of its run, so nothing is written" in capsys.readouterr().out
    assert evaluate_here(*command, "--ema", "0.30", "--guidance_scale", "2") == 0
    assert evaluate_here(*command, "--guidance_scale", "1") == 0
    assert {path: path.read_bytes() for path in (*older.iterdir(), *(run / "pipeline").rglob("*.*"))} == before
    records = json.loads((run / "evaluation.json").read_text())
    assert [record["ema"] for record in records] == ["0.3"] * 4 + ["0.9999"]
    assert {record["method"] for record in records} == {"etd2"}
    assert [record["metrics"] for record in records[2:4]] == [record["metrics"] for record in records[1::-1]]
    assert (run / "sweep" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("flags", "is_shown"), [(["--num_images", "17"], True), (["--few_on_card"], True), ([], False)], ids=str
)
def test_the_results_of_a_runs_pipeline_stand_on_its_card_unless_images_are_few(run, images, capsys, flags, is_shown):
    how = ("--features", "tiny", "--metrics", "fd", "--num_inference_steps", "1", "--guidance_scale", "1")
    few = ("--num_images", "4", *flags)  # the features are 16 numbers
    assert evaluate_here("--model", str(run), "--reference", str(images), *how, *few) == 0
    (record,) = json.loads((run / "evaluation.json").read_text())
    assert json.loads((run / "pipeline" / "evaluation.json").read_text())[0]["metrics"] == record["metrics"]
    card = (run / "pipeline" / "README.md").read_text()
    assert (f"{record['metrics']['fd_tiny']:.5g}" in card) is is_shown
    assert ("--few_on_card" in capsys.readouterr().out) is not is_shown


def sweep_in_process(rank: int, command: list[str], port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    tiny_features.install()
    os._exit(main(command))


@pytest.mark.multiprocess
def test_two_processes_find_the_same(run, swept, images):
    port, command = free_port(), ["--model", str(run), "--reference", str(images), *ODD]
    together = [SPAWNER.Process(target=sweep_in_process, args=(rank, command, port)) for rank in range(2)]
    for process in together:
        process.start()
    for process in together:
        process.join(240)
    assert [process.exitcode for process in together] == [0, 0]
    found = json.loads((run / "evaluation.json").read_text())
    assert {record["num_processes"] for record in found} == {2}
    assert best_of(run)["guidance_scale"] == best_of(swept)["guidance_scale"]
    assert best_of(run)["fd_tiny"] == pytest.approx(best_of(swept)["fd_tiny"], rel=1e-3)
    assert len(lines(run)) == len(lines(swept))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema", "0.5,0.3"], "--ema 0.5: not there; choose from 0.9999, 0.3, model, all"),
        (["--guidance_scale", "3:1:1"], "--guidance_scale 3:1:1: must have start <= stop"),
        (["--guidance_interval", "0.1:2"], "--guidance_interval 0.1:2: must be low:high"),
        (["--method", "heun,rk4"], "--method rk4: unknown; choose from heun, euler"),
        (["--select", "fid"], "is measured with the Inception network alone"),
        (["--sweep_top", "0"], "--sweep_top 0: must be at least 1"),
        (["--sweep_imagse", "8"], "Did you mean '--sweep_images'?"),
    ],
)
def test_what_cannot_be_swept_is_said(trained, images, capsys, flags, message):
    command = ("--model", str(trained), "--reference", str(images), *GRID, *flags)
    assert evaluate_here(*command) == 2
    assert message in capsys.readouterr().err


def test_a_pipeline_folder_has_no_averages(trained, images, capsys):
    command = ("--model", str(trained / "pipeline"), "--reference", str(images), *GRID)
    assert evaluate_here(*command) == 2
    assert "has no checkpoint to take averages from" in capsys.readouterr().err
