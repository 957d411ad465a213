"""A training whose processes, launchers or nodes are lost comes back by itself, and ends where nothing comes of it.

Launchers and schedulers are stand-ins, but for two trainings of two processes each, which are real.
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import free_port

from jit_accel.model.manifest import MANIFEST
from jit_accel.monitor.log import read_metrics
from jit_accel.supervise import main
from jit_accel.supervise import run as supervision
from jit_accel.supervise.run import Supervisor

REPOSITORY = Path(__file__).parents[2]
# What launchers do at their n-th start, by names.
SAVE = 'mkdir -p "$RUN/checkpoints/step_0000000$n" && touch "$RUN/checkpoints/step_0000000$n/manifest.json"'
HOLDER = {"token": "a", "machine": "another", "host": "node0", "process": 1, "since": "now"}
FAIL, KILL, DONE = "exit 7", "kill -9 $$", "exit 0"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervision, "PAUSE_S", 0.0)
    monkeypatch.setattr(supervision, "LOOK_S", 0.01)


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A command that notes its starts and does at each the next of these lines, at last the last one again."""
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()

    def make(*lines: str) -> list[str]:
        cases = "\n".join(f"{n}) {line} ;;" for n, line in enumerate(lines, 1))
        count = f'echo "$@" >>{tmp_path}/starts; n=$(wc -l <{tmp_path}/starts)\n'
        (tmp_path / "launcher").write_text(f"{count}case $n in\n{cases}\n*) {lines[-1]} ;;\nesac\n")
        flags = ("--data_path", "photos", "--output_dir", str(tmp_path / "run"), "--resume", "auto")
        return ["bash", str(tmp_path / "launcher"), "-m", "jit_accel.train", *flags]

    return make


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


def test_a_training_that_fails_or_is_killed_is_started_again(launcher, tmp_path, capfd):
    assert main(launcher(FAIL, KILL, DONE)) == 0
    assert starts(tmp_path) == 3
    told = capfd.readouterr().err
    assert "the launcher ended with 7, and says above why. It is started again, from step 0." in told
    assert "the launcher was ended by SIGKILL. It is started again" in told


def test_two_restarts_without_progress_are_the_end_with_the_reason(launcher, tmp_path, capfd):
    assert main(launcher(f'echo "the disk has gone ($n)" >"$RUN/FAILED"; {FAIL}')) == 1
    assert starts(tmp_path) == 3
    expected = "error: 2 restarts in a row brought no checkpoint after step 0. The last one: the disk has gone (3)"
    assert expected in capfd.readouterr().err


def test_what_an_earlier_start_failed_of_is_not_the_reason(launcher, tmp_path, capfd):
    (tmp_path / "run" / "FAILED").write_text("long ago")
    assert main(launcher(FAIL)) == 1
    assert "long ago" not in capfd.readouterr().err


def test_restarts_that_bring_a_newer_checkpoint_do_not_count(launcher, tmp_path, capfd):
    lines = (FAIL, FAIL, f"{SAVE}; {FAIL}", FAIL, f"{SAVE}; {KILL}", FAIL, FAIL)
    assert main(launcher(*lines)) == 1
    assert starts(tmp_path) == 7
    assert "no checkpoint after step 5" in capfd.readouterr().err


def test_the_checkpoint_that_was_there_before_is_no_progress(launcher, tmp_path):
    (tmp_path / "run/checkpoints/step_00000009").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_00000009" / MANIFEST).touch()
    assert main(launcher(f"{SAVE}; {FAIL}")) == 1
    assert starts(tmp_path) == 3


def test_a_system_without_prctl_will_do(launcher, tmp_path, monkeypatch):
    def refuse(name):
        raise TypeError("argument of type 'NoneType' is not iterable")  # as on Windows

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert main(launcher(FAIL, DONE)) == 0
    assert starts(tmp_path) == 2


def test_other_children_of_the_program_are_not_waited_for_nor_ended(launcher, monkeypatch):
    monkeypatch.setattr(supervision, "GRACE_S", 0.0)
    with subprocess.Popen(["sleep", "1000"]) as other:
        assert main(launcher(FAIL, DONE)) == 0
        assert other.poll() is None
        other.kill()


def test_a_wrong_setting_is_not_tried_again(launcher, tmp_path):
    assert main(launcher("exit 2")) == 2
    assert starts(tmp_path) == 1


def test_what_has_begun_is_tried_again_whatever_its_exit_code(launcher, tmp_path):
    assert main(launcher('echo "the loss is nan" >"$RUN/FAILED"; exit 2', DONE)) == 0
    assert starts(tmp_path) == 2


@pytest.mark.parametrize("flags", [["--dry_run"], ["--resume", "none"]])
def test_what_does_not_go_on_is_started_once_and_its_exit_code_kept(launcher, tmp_path, flags):
    assert main([*launcher(FAIL), "--", *flags]) == 7
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sleep", "1"], "no -m jit_accel.train in 'sleep 1'"),
        (["true", "-m", "jit_accel.train", "--data_pth", "x"], "--data_pth: no such flag. Did you mean '--data_path'?"),
        (["true", "jit_accel.train", "--data_path", "x", "--resume", "auto"], "--output_dir: not given"),
        (
            ["nothing-there", "jit_accel.train", "--data_path", "x", "--wandb_name", "y"],
            "nothing-there cannot be",
        ),
    ],
)
def test_what_cannot_be_supervised_is_refused(command, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert words in capfd.readouterr().err


def supervised(command: list[str], **environment: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "jit_accel.supervise", *command]
    return subprocess.Popen(words, env=os.environ | environment, cwd=REPOSITORY)


def wait_for(condition, *processes: subprocess.Popen) -> None:
    while not condition():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_training_in_order_and_for_good(launcher, tmp_path, number):
    command = launcher(f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 1' TERM; touch {tmp_path}/up; sleep 60 & wait")
    process = supervised(command)
    wait_for((tmp_path / "up").exists, process)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert (tmp_path / "saved").exists()
    assert starts(tmp_path) == 1


def test_a_start_ends_at_once_when_a_part_of_it_is_lost_on_another_machine(launcher, tmp_path, capfd):
    """Else it would wait in vain, or meet the next start there. It says of no loss itself, or both would go on so."""
    lost = tmp_path / "run" / supervision.LOST_FILE
    told = f"(trap '' TERM; sleep 60) & echo elsewhere >{lost}; wait"
    assert main(launcher(told, f'[ "$(cat {lost})" = elsewhere ]')) == 0
    assert starts(tmp_path) == 2
    assert "a part of it was lost on another machine. It is started again" in capfd.readouterr().err


def test_a_loss_that_comes_while_a_start_begins_ends_it_too(launcher, tmp_path, monkeypatch):
    lost, start = tmp_path / "run" / supervision.LOST_FILE, subprocess.Popen

    def start_and_be_late(*args, **how):
        process = start(*args, **how)
        wait_for(lambda: lost.exists() and lost.read_text(), process)
        return process

    monkeypatch.setattr(supervision.subprocess, "Popen", start_and_be_late)
    assert main(launcher(f"echo elsewhere >{lost}; sleep 20", DONE)) == 0
    assert starts(tmp_path) == 2


def test_a_training_has_time_to_find_out_itself_what_is_lost(launcher, tmp_path, monkeypatch):
    (tmp_path / "run" / ".holder.json").write_text(json.dumps(HOLDER))
    monkeypatch.setattr(supervision, "SILENT_S", 0.0)  # the next start does not wait for it
    lost = tmp_path / "run" / supervision.LOST_FILE
    assert main(launcher(f"echo elsewhere >{lost}; sleep 0.5; touch {tmp_path}/found; {FAIL}", DONE)) == 0
    assert (tmp_path / "found").exists()
    monkeypatch.setattr(supervision, "LOST_GRACE_S", 0.1)
    (tmp_path / "starts").unlink()
    assert main(launcher(f"echo again >{lost}; sleep 60; touch {tmp_path}/not_killed", DONE)) == 0
    assert not (tmp_path / "not_killed").exists()


def test_the_others_are_told_of_each_loss(launcher, tmp_path):
    lost = f'cat "$RUN/{supervision.LOST_FILE}" >>{tmp_path}/told'
    assert main(launcher(FAIL, f"{lost}; echo >>{tmp_path}/told; {KILL}", f"{lost}; {DONE}")) == 0
    first, second = (tmp_path / "told").read_text().split()
    assert first != second


@pytest.mark.skipif(sys.platform != "linux", reason="orphans go to init elsewhere")
def test_what_a_lost_launcher_leaves_behind_ends_before_the_next_start(launcher, tmp_path):
    orphan = f"(trap 'sleep 0.5; touch {tmp_path}/saved; exit' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done)"
    first = f"{orphan} & while [ ! -e {tmp_path}/up ]; do sleep 0.01; done; {KILL}"
    process = supervised(launcher(first, f"[ -e {tmp_path}/saved ] && exit 0; exit 1"))
    assert process.wait() == 0
    assert starts(tmp_path) == 2


def test_a_training_that_still_holds_the_folder_is_waited_for(launcher, tmp_path, monkeypatch):
    """As on a node that comes back before the others have found out that it was gone."""
    file = tmp_path / "run" / ".holder.json"
    file.write_text(json.dumps(HOLDER))
    said = []

    def say(message, *_):
        said.append(message)
        os.utime(file, (0, 0))  # silent for long, from now on

    monkeypatch.setattr(supervision, "say", say)
    assert main(launcher(DONE)) == 0
    assert said == [f"process 1 on node0 (since now) trains in {tmp_path / 'run'}: its end is waited for ..."]
    file.write_text(json.dumps(HOLDER))
    assert Supervisor(launcher(DONE), tmp_path / "run", 2, limit_s=0.0).run() == 0  # not for ever


# --- schedulers


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder on PATH with stand-ins of SLURM's programs; what they were told is in the file `calls`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    bodies = {
        "scontrol": f'[ "$1" = show ] && echo node0 && sleep 0.1 && echo node1; echo "scontrol $*" >>{tmp_path}/calls',
        "srun": f'echo "srun $* $MAIN_PROCESS_IP" >>{tmp_path}/calls; eval "$TASK"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "run"))
    return tmp_path


def sbatch(cluster: Path, task: str, *signals: int) -> tuple[int, list[str]]:
    """Run the batch script, whose step does this task, as SLURM does. Returns its exit code and what was told."""
    process = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", "--seed", "5"], cwd=REPOSITORY, env=os.environ | {"TASK": task}
    )
    for number in signals:
        wait_for((cluster / "up").exists, process)
        process.send_signal(number)
    return process.wait(), (cluster / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(0, False), (1, False), (2, False), (128 + signal.SIGUSR1, True), (137, True)]
)
def test_a_slurm_job_has_the_true_exit_code_and_is_requeued_where_it_was_interrupted(cluster, code, is_requeued):
    found, calls = sbatch(cluster, f"exit {code}")
    assert found == code
    step = "srun --kill-on-bad-exit=0 bash launch/multi_node.sh --seed 5 node0"
    assert calls == ["scontrol show hostnames node[0-1]", step, *["scontrol requeue 77"] * is_requeued]


def test_a_slurm_job_that_is_cancelled_is_not_requeued(cluster):
    code, calls = sbatch(cluster, f"touch {cluster}/up; sleep 0.5; exit 143", signal.SIGTERM)
    assert code == 143
    assert not any("requeue" in call for call in calls)


def test_a_slurm_job_goes_on_over_its_time_limit_and_a_lost_process(cluster, monkeypatch):
    """The step is launch/multi_node.sh as it is; what it launches is told of the limit, is lost, and is done."""
    launcher = f"""n=$(cat {cluster}/starts 2>/dev/null | wc -l); echo start >>{cluster}/starts
    case $n in
    0) trap "touch {cluster}/saved; exit 1" TERM; touch {cluster}/up; sleep 60 & wait ;;
    1) kill -9 $$ ;;
    *) [ -e {cluster}/saved ] ;;
    esac"""
    for name, body in {"accelerate": launcher, "python": f'exec {sys.executable} "$@"'}.items():
        (cluster / "programs" / name).write_text(f"#!/bin/bash\n{body}\n")
        (cluster / "programs" / name).chmod(0o755)
    monkeypatch.setenv("JIT_ACCEL_PYTHON", str(cluster / "programs" / "python"))
    limit = f"while [ ! -e {cluster}/up ]; do sleep 0.01; done; kill -USR1 $!"
    code, calls = sbatch(cluster, f'shift; "$@" & {limit}; wait $!; exit $?')
    assert (code, calls[-1]) == (128 + signal.SIGUSR1, "scontrol requeue 77")
    assert sbatch(cluster, 'shift; "$@"')[0] == 0
    assert starts(cluster) == 3


def test_the_slurm_script_asks_for_what_it_needs():
    lines = (REPOSITORY / "launch/slurm.sbatch").read_text().splitlines()
    asked = dict(line[8:].lstrip("-").partition("=")[::2] for line in lines if line.startswith("#SBATCH "))
    assert asked["signal"] == "USR1@300"
    assert asked["ntasks-per-node"] == "1"
    assert {"requeue", "open-mode"} <= set(asked)


SCHEMAS = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())
KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}


def check(value: object, schema: object, place: str = "") -> None:
    """Hold a value to a schema of schemas.yaml."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        fields = {name.rstrip("!"): part for name, part in schema.items()}
        assert {name[:-1] for name in schema if name.endswith("!")} <= set(value), place
        for name, part in value.items():
            assert name in fields or "*" in fields, f"{place}/{name}"
            check(part, fields.get(name, fields.get("*")), f"{place}/{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        for item in value:
            check(item, schema[0], place)
    else:
        assert KINDS[type(value)] in schema.split("|"), f"{place}: {value!r} is no {schema}"


def test_the_jobset_is_valid_and_agrees_with_itself():
    jobset = yaml.safe_load((REPOSITORY / "launch/jobset.yaml").read_text())
    check(jobset, SCHEMAS["jobset"])
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {row["name"]: row["value"] for row in container["env"]}
    assert environment["NUM_MACHINES"] == str(job["completions"]) == str(job["parallelism"])
    assert environment["GPUS_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    name = jobset["metadata"]["name"]
    assert environment["MAIN_PROCESS_IP"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # Kubernetes takes rules of exit codes with pods that are not restarted alone.
    assert (pod["restartPolicy"], job["completionMode"]) == ("Never", "Indexed")
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda spec: spec.update(failurePolicies={}), "/spec/failurePolicies"),
        (lambda spec: spec["replicatedJobs"][0].pop("name"), "/spec/replicatedJobs"),
        (lambda spec: spec["failurePolicy"].update(maxRestarts="0"), "/spec/failurePolicy/maxRestarts: '0' is no"),
    ],
)
def test_an_invalid_jobset_is_found(change, place):
    jobset = yaml.safe_load((REPOSITORY / "launch/jobset.yaml").read_text())
    change(jobset["spec"])
    with pytest.raises(AssertionError, match=place):
        check(jobset, SCHEMAS["jobset"])


def test_the_skypilot_task_is_valid():
    task = yaml.safe_load((REPOSITORY / "launch/skypilot.yaml").read_text())
    check(task, SCHEMAS["skypilot"])
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "2", "SLURM_NODEID": "3", "MAIN_PROCESS_IP": "node0"},
        {"NUM_MACHINES": "4", "GPUS_PER_NODE": "2", "JOB_COMPLETION_INDEX": "3", "MAIN_PROCESS_IP": "node0"},
        {
            "SKYPILOT_NUM_NODES": "4",
            "SKYPILOT_NUM_GPUS_PER_NODE": "2",
            "SKYPILOT_NODE_RANK": "3",
            "SKYPILOT_NODE_IPS": "node0\nnode1\nnode2\nnode3",
        },
    ],
    ids=["slurm", "jobset", "skypilot"],
)
def test_each_scheduler_says_which_node_this_is(tmp_path, variables):
    for name in ("python", "accelerate"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/told\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"JIT_ACCEL_PYTHON": str(tmp_path / "python"), **variables}
    subprocess.run(["bash", "launch/multi_node.sh"], cwd=REPOSITORY, env=environment, check=True)
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:4] == ["-m", "jit_accel.supervise", "accelerate", "launch"]
    found = {flag: told[told.index(flag) + 1] for flag in told if flag.startswith(("--num_", "--machine", "--main"))}
    assert {name: found[f"--{name}"] for name in ("num_machines", "num_processes", "machine_rank")} == {
        "num_machines": "4",
        "num_processes": "8",
        "machine_rank": "3",
    }
    assert found["--main_process_ip"] == "node0"


def test_what_the_files_of_kubernetes_and_skypilot_run_is_a_node_of_the_training(tmp_path):
    """Their commands are run as they are, in the environment that they and their schedulers give."""
    for name in ("python", "accelerate"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/told\n')
        (tmp_path / name).chmod(0o755)
    jobset, task = (yaml.safe_load((REPOSITORY / f"launch/{name}.yaml").read_text()) for name in ("jobset", "skypilot"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = {row["name"]: row["value"] for row in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    of_cloud = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    of_cloud |= {"SKYPILOT_NUM_NODES": str(task["num_nodes"]), **task["envs"]}
    runs = [
        (container["command"] + container["args"], given, "jit-node-0-0.jit", str(8 * job["completions"])),
        (["bash", "-c", task["run"]], of_cloud, "10.0.0.1", str(8 * task["num_nodes"])),
    ]
    for command, variables, address, processes in runs:
        environment = os.environ | {"JIT_ACCEL_PYTHON": str(tmp_path / "python"), **variables}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        told = (tmp_path / "told").read_text().splitlines()
        flags = ("--main_process_ip", "--num_processes", "--machine_rank")
        assert [told[told.index(flag) + 1] for flag in flags] == [address, processes, "1"]
        assert {"--output_dir=/shared/runs/imagenet256_b16", "--resume=auto"} <= set(told)


# --- for real

TINY = (
    *("--data_path", "builtin:fashion_mnist", "--model", "JiT-Ti/14", "--img_size", "28", "--batch_size", "2"),
    *(
        "--num_workers",
        "0",
        "--max_steps",
        "60",
        "--warmup_steps",
        "2",
        "--save_every_steps",
        "4",
        "--ema_decays",
        "0.9",
    ),
    *("--sample_every_steps", "0", "--num_inference_steps", "1", "--no_html_report", "--log_every_steps", "1"),
    *("--gradient_accumulation_steps", "1", "--mixed_precision", "no", "--no_compile", "--ema_decays", "0.9"),
)
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "JIT_ACCEL_PYTHON": sys.executable}


def newest(output: Path) -> int:
    return max((int(p.parent.name[5:]) for p in output.glob("checkpoints/step_*/manifest.json")), default=0)


def kill_soon_after_a_checkpoint(output: Path, processes: list[subprocess.Popen], victims) -> int:
    """Kill -9 what `victims` finds once there is a newer checkpoint; return the step of it."""
    before = newest(output)
    wait_for(lambda: newest(output) > before, *processes)
    for victim in victims():
        victim.kill()
    return newest(output)


def trained_to_the_end(output: Path) -> bool:
    return [row["step"] for row in read_metrics(output)] == [*range(1, 61)] and newest(output) == 60


@pytest.mark.multiprocess
def test_a_killed_process_and_a_killed_launcher_come_back_and_train_to_the_end(tmp_path):
    output = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += ["accelerate_configs/cpu_2_processes.yaml", "--main_process_port", str(free_port()), "-m"]
    places = ["--output_dir", str(output), "--resume", "auto"]
    process = supervised([*launch, "jit_accel.train", *TINY, *places], **ON_CPU)
    (launcher,) = iter_children(process)
    kill_soon_after_a_checkpoint(output, [process], lambda: launcher.children()[-1:])
    kill_soon_after_a_checkpoint(output, [process], lambda: iter_children(process))
    assert process.wait() == 0
    assert trained_to_the_end(output)


def iter_children(process: subprocess.Popen) -> list[psutil.Process]:
    wait_for(lambda: psutil.Process(process.pid).children(), process)
    return psutil.Process(process.pid).children()


@pytest.mark.multiprocess
def test_a_node_that_is_killed_and_comes_back_joins_again(tmp_path):
    output = tmp_path / "run"
    environment = {
        "NUM_MACHINES": "2",
        "GPUS_PER_NODE": "1",
        "MAIN_PROCESS_PORT": str(free_port()),
        **ON_CPU,
        "ACCELERATE_CONFIG": "accelerate_configs/cpu_2_processes.yaml",
        "OUTPUT_DIR": str(output),
        "RECIPE": "launch/recipes/my_images_64.yaml",
    }

    def node(rank: int) -> subprocess.Popen:
        words = shlex.split("bash launch/multi_node.sh") + list(TINY)
        return subprocess.Popen(words, cwd=REPOSITORY, env=os.environ | environment | {"MACHINE_RANK": str(rank)})

    first, second = node(0), node(1)

    def all_of_the_second() -> list[psutil.Process]:
        found = psutil.Process(second.pid)
        return [found, *found.children(recursive=True)]

    kill_soon_after_a_checkpoint(output, [first, second], all_of_the_second)
    second.wait()
    second = node(1)  # as whoever started it does, once the machine is up
    assert [first.wait(), second.wait()] == [0, 0]
    assert trained_to_the_end(output)
