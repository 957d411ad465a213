"""Another experiment is another run: folders, resumes that change what a run is, runs with nothing left to train."""

import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from helpers import SPAWNER, Group, rows, state, train_here

from jit_accel.base import folder_lock
from jit_accel.base.errors import UserError
from jit_accel.config.command_line import parse_args
from jit_accel.config.identity import experiment_of
from jit_accel.model import tensor_files
from jit_accel.model.checkpoints import read_run
from jit_accel.train.build import check_world, placed
from jit_accel.train.output_folder import check_output_dir, claim, release
from jit_accel.train.trainer import Trainer

FIRST = "runs/x-JiT-B-16-256px-seed0"


def config(*flags):
    return parse_args(["--data_path", "x", *flags])


def folder_of(*flags) -> str:
    return placed(config(*flags)).run.output_dir


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def leave_run(folder: str, *flags, **record) -> None:
    """Leave what a run of these flags leaves in its folder."""
    Path(folder).mkdir(parents=True)
    Path(folder, "metrics.jsonl").write_text('{"step": 1}\n')
    Path(folder, "run.json").write_text(json.dumps({"experiment": experiment_of(config(*flags)), **record}))


def test_a_run_without_a_name_goes_to_the_first_folder_that_holds_none(capsys):
    assert folder_of() == FIRST
    leave_run(FIRST)
    leave_run(f"{FIRST}-2", "--learning_rate", "1e-4")
    assert folder_of() == f"{FIRST}-3"
    assert f"{FIRST}-2 holds another run, so this one goes to {FIRST}-3" in capsys.readouterr().out
    assert folder_of("--seed", "1") == "runs/x-JiT-B-16-256px-seed1"
    Path(f"{FIRST}-3").mkdir()  # an earlier start was killed before its first step
    assert folder_of() == f"{FIRST}-3"
    assert not Path(f"{FIRST}-3").rename("moved").exists() or folder_of() == f"{FIRST}-3"


def test_resume_auto_finds_the_run_of_the_same_experiment():
    leave_run(FIRST)
    leave_run(f"{FIRST}-2", "--learning_rate", "1e-4")
    leave_run(f"{FIRST}-10", "--batch_size", "8")
    leave_run(f"{FIRST}-11", "--learning_rate", "1e-4")
    auto = ("--resume", "auto")
    assert folder_of(*auto) == FIRST
    assert folder_of(*auto, "--batch_size=8") == f"{FIRST}-10"
    assert folder_of(*auto, "--learning_rate", "0.0001") == f"{FIRST}-11"  # the newest of two
    assert folder_of(*auto, "--learning_rate", "2e-4") == f"{FIRST}-3"
    # Its length and what leaves the weights alone do not make another run of it; where it is shown does.
    more = ("--max_steps=9", "--save_every_steps", "7", "--num_workers", "0", "--wandb_tags=a", "--eval_every_steps=5")
    assert folder_of(*auto, *more) == FIRST
    assert folder_of(*auto, "--use_wandb", "--wandb_project", "other") == f"{FIRST}-3"
    assert folder_of(*auto, "--data_path", "elsewhere/x") == f"{FIRST}-3"
    assert folder_of(*auto, "--data_path", "./x") == FIRST
    assert folder_of("--resume", f"{FIRST}-10/checkpoints/step_00000001") == f"{FIRST}-10"
    assert folder_of("--resume", "elsewhere/checkpoints/step_00000001") == f"{FIRST}-3"


def test_a_folder_or_a_name_that_is_given_is_taken(capsys):
    leave_run("runs/mine")
    leave_run(FIRST)
    assert folder_of("--wandb_name", "mine") == folder_of("--output_dir", "runs/mine") == "runs/mine"
    assert folder_of("--output_dir", FIRST) == FIRST
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"output_dir runs/mine: holds another run .*--resume auto .*--wandb_name"):
        check_output_dir(Path("runs/mine"), "none", "photos")


@pytest.mark.parametrize(
    ("data_path", "name"),
    [
        *((path, "pictures") for path in (".", "./", "../pictures/.", "~", "cats/..")),
        ("*.tar", "tar"),
        ("https://me:secret@host/x.tar?token=secret", "x.tar"),
    ],
)
def test_a_default_folder_is_named_after_the_data_and_keeps_no_secret(tmp_path, monkeypatch, data_path, name):
    (tmp_path / "pictures" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "pictures")
    monkeypatch.setenv("HOME", str(tmp_path / "pictures"))
    folder = folder_of("--data_path", data_path)
    assert folder.startswith(f"runs/{name}-")
    assert "secret" not in folder


def _claim(folders, claimed, done) -> None:
    assert all(map(claim, folders))
    claimed.set()
    done.wait()


def test_runs_that_begin_at_the_same_time_get_a_folder_each(tmp_path):
    claimed, done = SPAWNER.Event(), SPAWNER.Event()
    other = SPAWNER.Process(target=_claim, args=([tmp_path / FIRST], claimed, done))
    other.start()
    assert claimed.wait(120)
    assert folder_of() == folder_of("--learning_rate=1e-4") == f"{FIRST}-2"
    assert list(Path().iterdir()) == []
    done.set()
    other.join(120)
    assert folder_of() == FIRST


def test_a_choice_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert claim(tmp_path / "run")
    assert list(tmp_path.iterdir())
    release(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def _give_way():
    """Let the folder have no locks, and stop as one that slept would, once a checkpoint is being written."""
    folder_lock.fcntl = None
    write = tensor_files.check_sound

    def write_and_sleep(name, values):
        if Path(os.environ["TEST_MARK"]).exists():
            Path(os.environ["TEST_MARK"] + os.environ["RANK"]).touch()
            while not Path(os.environ["TEST_MARK"] + "over").exists():
                time.sleep(0.01)
        write(name, values)

    def step_and_sleep(self):
        """Sleep on the main process, for which the other one waits, when nothing is being saved."""
        step(self)
        if os.environ["RANK"] == "0" and Path(os.environ["TEST_MARK"] + "step").exists():
            while self.checkpointer.begun and not self.checkpointer.begun[1].done():
                time.sleep(0.01)
            Path(os.environ["TEST_MARK"] + "0").touch()
            while not Path(os.environ["TEST_MARK"] + "over").exists():
                time.sleep(0.01)

    step, Trainer.train_step = Trainer.train_step, step_and_sleep
    tensor_files.check_sound = write_and_sleep


@pytest.mark.multiprocess
@pytest.mark.parametrize("is_saving", [False, True])
def test_a_run_that_slept_while_another_took_its_folder_over_writes_nothing(images, tmp_path, monkeypatch, is_saving):
    out, mark = tmp_path / "run", tmp_path / "mark"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--max_steps", "5000", "--save_every_steps", "1"]
    flags += ["--sample_every_steps", "2", "--html_report"]
    environment = {"TEST_SETUP": "test_output_folder:_give_way", "TEST_MARK": str(mark)}
    group = Group(flags, tmp_path / "log.txt", 2, environment)
    while not list(out.glob("checkpoints/step_*")) and group.processes[0].is_alive():
        time.sleep(0.05)
    (mark if is_saving else tmp_path / "markstep").touch()
    ranks = range(2 if is_saving else 1)
    while not all((tmp_path / f"mark{rank}").exists() for rank in ranks) and group.processes[0].is_alive():
        time.sleep(0.05)
    asleep = [psutil.Process(process.pid) for process in group.processes]
    for process in asleep:
        process.suspend()
    asleep += [child for process in asleep for child in process.children(recursive=True)]  # the report's
    for process in asleep:
        process.suspend()
    monkeypatch.setattr(folder_lock, "fcntl", None)
    monkeypatch.setattr(folder_lock, "SILENT_S", 0.2)
    monkeypatch.setattr(folder_lock, "_machine", lambda: "another")
    successor = folder_lock.FolderLock(out)
    successor._take()
    before = files(out)
    (tmp_path / "markover").touch()
    for process in asleep:
        process.resume()
    assert group.wait() in ([2, 2], [2, 1]), group.output()  # what the other waits for may be gone
    assert "has taken this folder over" in group.output()
    after = files(out)
    new = [name for name in after if name not in before or after[name] != before[name]]
    assert new == []
    assert [name for name in before if name not in after and ".tmp" not in name] == []
    successor._release()


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    check_world(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world(1)  # a cluster's own variable
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_world(2)
    with pytest.raises(UserError, match=r"^2 processes were started, .* set ACCELERATE_USE_CPU=true"):
        check_world(1)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run that has ended, not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data_path", str(images), "--max_steps", "2"]
    assert train_here(*flags, "--output_dir", str(folder)) == 0
    return folder, flags


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_that_is_continued_says_that_nothing_is_left(trained, capsys):
    folder, flags = trained
    before = files(folder)
    assert train_here(*flags, "--output_dir", str(folder), "--resume", "auto", "--learning_rate=2e-3") == 0
    printed = capsys.readouterr()
    assert f"Nothing is left to train: {folder} is at step 2 of 2. --max_steps 4, say, would train on." in printed.out
    assert "this resume changes what the run is: --learning_rate was 0.001 and is 0.002 now" in printed.err
    assert "another --output_dir or --wandb_name" in printed.err
    assert files(folder) == before


def test_a_run_past_its_end_trains_nothing(trained, capsys):
    folder, flags = trained
    before = state(folder)
    assert (
        train_here(*flags, "--output_dir", str(folder), "--resume", "auto", "--max_steps", "1", "--warmup_steps=0") == 0
    )
    assert "is at step 2 of 1. --max_steps 4, say, would" in capsys.readouterr().out
    assert state(folder).keys() == before.keys()
    assert [row["step"] for row in rows(folder)] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "warnings"),
    [
        (["--max_steps", "3"], []),
        (["--max_steps", "3", "--log_every_steps=2", "--wandb_name", "b"], []),  # no tracker shows its name
        (["--max_steps", "3", "--batch_size", "2", "--gradient_accumulation_steps", "2"], []),
        (["--max_steps", "3", "--batch_size", "2"], ["the global batch was 4 images and is now 2"]),
        (
            ["--max_steps", "3", "--report_to", "tensorboard", "--wandb_name", "b", "--weight_decay=0.1"],
            ["--wandb_name was None and is b now", "--weight_decay was 0.0 and is 0.1 now"],
        ),
    ],
)
def test_a_resume_that_changes_what_a_run_is_says_so(trained, tmp_path, capsys, flags, warnings):
    folder, start = trained
    checkpoint = str(folder / "checkpoints" / "step_00000002")
    assert (
        train_here(*start, "--output_dir", str(tmp_path / "on"), "--resume", checkpoint, "--warmup_steps=1", *flags)
        == 0
    )
    printed = capsys.readouterr()
    assert "Nothing is left" not in printed.out
    assert ("changes what the run is" in printed.err) == any("--" in text for text in warnings)
    assert all(text in printed.err for text in warnings)


def test_the_same_command_without_a_folder_trains_anew_and_with_resume_auto_goes_on(images, capsys):
    flags = ["--data_path", str(images), "--model=JiT-Ti/14", "--max_steps=1", "--warmup_steps=0"]
    assert train_here(*flags) == train_here(*flags) == 0
    assert train_here(*flags, "--resume=auto", "--max_steps=2") == 0
    name = f"{images.name}-JiT-Ti-14-28px-seed0"
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}-2"]
    assert [len(rows(Path("runs", each))) for each in (name, f"{name}-2")] == [1, 2]
    records = [json.loads(Path("runs", each, "run.json").read_text()) for each in (name, f"{name}-2")]
    assert records[0]["experiment"] == records[1]["experiment"]
    run = read_run(Path("runs", name, "checkpoints", "step_00000001"))
    assert run["experiment"] == records[0]["experiment"]


@pytest.mark.multiprocess
def test_a_second_start_in_a_living_runs_folder_is_refused_and_leaves_the_first_alone(images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--max_steps", "100000", "--save_every_steps", "2"]
    group = Group([*flags, "--keep_checkpoints", "100000"], tmp_path / "log.txt")
    while len(rows(out)) < 4:
        time.sleep(0.01)
    begun = [row["step"] for row in rows(out)]
    assert train_here(*flags, "--resume", str(out / "checkpoints" / "step_00000002")) == 2
    (process,) = group.processes
    named = rf"--output_dir {out}: another training writes to it: process {process.pid} on .*last heard of \d+ s ago"
    assert re.search(named, capsys.readouterr().err.replace("\n", " "))
    assert train_here(*flags, "--resume", "auto", "--dry_run") == 0  # writes nothing
    os.kill(process.pid, signal.SIGTERM)
    assert group.wait() == [128 + signal.SIGTERM], group.output()
    steps = [row["step"] for row in rows(out)]
    assert steps[: len(begun)] == begun
    assert steps == [*range(1, len(steps) + 1)]
    assert not list(out.glob("checkpoints/abandoned_*"))
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
