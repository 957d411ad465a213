"""W&B sweeps, with the real agent against a stand-in server; and the variables that an agent sets, one by one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import rows
from test_wandb import OFFLINE, Training, assert_whole, wandb_tracker
from wandb_server import WandbServer

from jit_accel.config.settings import SETTINGS

pytest.importorskip("wandb")

REPOSITORY = Path(__file__).parents[2]
SWEEP_FILE = REPOSITORY / "launch" / "sweep.yaml"
# wandb's command line, which asks for the next trial every fifth of a second instead of every five.
CLI = "import sys, wandb.wandb_agent as agent; agent.Agent.POLL_INTERVAL = 0.2; from wandb.cli.cli import cli; cli()"
OFFLINE_SECOND = '[ $WANDB_RUN_ID != trial1 ] || export WANDB_MODE=offline; exec "$0" "$@"'


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def wandb_command(*arguments: str, **environment: str) -> str:
    """Run a command of wandb as users do, from the repository's folder; return what was printed."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", CLI, *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_sweep(folder: Path, images: Path, **parameters) -> str:
    """The documented sweep, of small trials."""
    sweep = yaml.safe_load(SWEEP_FILE.read_text())
    assert set(sweep["parameters"]) <= set(SETTINGS)
    small = {
        "data_path": str(images),
        "model": "JiT-Ti/14",
        "img_size": 28,
        "batch_size": 4,
        "max_steps": 2,
        "num_workers": 0,
        "num_inference_steps": 1,
        "html_report": False,
        "mixed_precision": "no",
    }
    values = {name: {"value": value} for name, value in small.items()} | parameters
    sweep |= {"method": "grid", "parameters": values}
    command = [sys.executable if word == "python" else word for word in sweep["command"]]
    sweep["command"] = ["sh", "-c", OFFLINE_SECOND, *command]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return str(folder / "sweep.yaml")


@pytest.mark.multiprocess
def test_an_agent_trains_each_trial_in_a_run_and_a_folder_of_its_own(server, images, tmp_path):
    """The second trial is offline, and its curve is sent later."""
    environment = server.environment | {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path / "of wandb")}
    (tmp_path / "of wandb").mkdir()
    tried = {"adam_betas": {"values": [[0.9, 0.95], "0.8,0.9"]}, "output_dir": {"value": str(tmp_path / "runs")}}
    printed = wandb_command("sweep", "--project", "shop", write_sweep(tmp_path, images, **tried), **environment)
    (command,) = re.findall(r"Run sweep agent with: .*wandb (agent \S+)", printed)
    assert command == "agent someone/shop/sweep1"
    printed = wandb_command(*command.split(), **environment)
    assert printed.count("Wandb initialized: project=shop, name=") == 2
    assert not re.search("Warning: (wandb|W&B)", printed), printed
    assert list(server.runs) == ["trial0"]
    (sync,) = re.findall(r"upload later with: (wandb sync .*)", printed)
    subprocess.run(f"{shlex.quote(sys.executable)} -m {sync}", shell=True, env=os.environ | environment, check=True)
    for trial, betas in (("trial0", [0.9, 0.95]), ("trial1", [0.8, 0.9])):
        run, folder = server.runs[trial], tmp_path / "runs" / trial
        assert (run.project, run.settings["sweep"], run.exit_code) == ("shop", "sweep1", 0)
        assert [row["train/loss"] for row in run.history] == [row["train/loss"] for row in rows(folder)]
        assert len(run.history) == 2
        assert json.loads((folder / "run.json").read_text())["adam_betas"] == betas
        assert (folder / "wandb_run_id.txt").read_text() == trial
        assert not (folder / "wandb").exists()
        assert len(list((tmp_path / "of wandb" / "wandb").glob(f"*run-*-{trial}"))) == 1
        assert str(folder) in printed


def trial_of(server, tmp_path, **more) -> dict[str, str]:
    return server.environment | {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "t1", "WANDB_PROJECT": "shop", **more}


def test_an_interrupted_trial_goes_on_in_its_run(server, tmp_path):
    training = Training(tmp_path)
    environment = trial_of(server, tmp_path, WANDB_DIR=str(tmp_path))
    settings = {"wandb_project": "another", "wandb_entity": "nobody"}
    training.run(environment, 0, 30, exit_code=-signal.SIGKILL, kill_after_s=1, settings=settings)
    printed = training.run(environment, 20, 40, settings=settings)
    assert f"project=shop, name=sunny-hill-1\nView run at: http://127.0.0.1:{server.port}/someone/shop/" in printed
    assert list(server.runs) == [training.id] == ["t1"]
    assert [row["_step"] for row in server.runs["t1"].history] == list(range(1, 41))


def test_an_offline_trial_behind_a_killed_online_one_keeps_its_run_and_says_what_may_be_lacking(server, tmp_path):
    training = Training(tmp_path)
    training.run(trial_of(server, tmp_path), 0, 30, exit_code=-signal.SIGKILL, kill_after_s=0)
    printed = training.run(trial_of(server, tmp_path) | OFFLINE, 20, 40)
    assert "nobody can know now how much of the run t1 W&B's server has" in printed
    assert f"wandb sync {tmp_path}/out/wandb/offline-run-*-t1" in printed
    assert training.id == "t1"


def test_the_id_and_the_folder_of_the_environment_count_without_a_sweep(server, tmp_path):
    training = Training(tmp_path)
    files = tmp_path / "files of wandb"
    files.mkdir()
    environment = server.environment | {"WANDB_RUN_ID": "mine", "WANDB_DIR": str(files)}
    printed = training.run(environment | OFFLINE, 0, 20, settings={"wandb_project": "shop"})
    assert f"upload later with: wandb sync '{files}/wandb'/offline-run-*-mine\n" in printed
    assert not (tmp_path / "out" / "wandb").exists()
    training.run(environment, 10, 30, settings={"wandb_project": "shop"})
    assert_whole(server.runs["mine"], 30, {1: 0, 11: 10})


def test_an_id_that_another_training_has_is_said(server, tmp_path):
    environment = server.environment | {"WANDB_RUN_ID": "mine"}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = Training(tmp_path / "a")
    assert "Warning" not in first.run(environment, 0, 20) + first.run(environment, 10, 30)
    printed = Training(tmp_path / "b").run(environment, 0, 40)
    assert printed.count("Warning") == 1
    assert "WANDB_RUN_ID=mine is a run that has steps up to 30 already" in printed


def test_the_printed_command_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", "of wandb")
    assert wandb_tracker.WandbTracker("shop", Path("out")).folder == tmp_path / "of wandb" / "wandb"


def test_how_to_resume_is_the_environments_choice(server, tmp_path):
    training = Training(tmp_path)
    printed = training.run(
        server.environment | {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must"}, 0, 5, start_patience_s=8
    )
    assert "Warning: wandb could not start (" in printed
    assert server.runs == {}
    assert (
        training.run(server.environment | {"WANDB_RUN_ID": "other", "WANDB_RESUME": "allow"}, 5, 10).count("Warning")
        == 0
    )
    assert list(server.runs) == ["other"]
