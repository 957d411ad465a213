"""W&B as a run uses it, against a server that fails on command, and offline, with the files read back and synced."""

from __future__ import annotations

import atexit
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import SPAWNER, Group, rows
from PIL import Image
from wandb_server import KEY, WandbServer

wandb_tracker = pytest.importorskip("jit_accel.monitor.wandb_tracker", exc_type=ImportError)

OFFLINE = {"WANDB_MODE": "offline"}
SECRET = "5ec2e7" * 6
LEVELDB_BLOCK = 32768


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path)


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


class Training:
    """Processes that report rows as a training does, one after the other in one output folder."""

    def __init__(self, tmp_path: Path):
        self.tmp_path, self.output_dir = tmp_path, tmp_path / "out"
        self.output_dir.mkdir()

    def start(self, environment: dict[str, str], first: int, last: int, **options):
        """Begin to report the rows behind `first`, up to `last`; see `_report` for the options."""
        return self._start(_report, environment, self.output_dir, first, last, options)

    def _start(self, do, environment: dict[str, str], *arguments):
        environment = {"HOME": str(self.tmp_path), "NETRC": str(self.tmp_path / "netrc"), **environment}
        self.log = self.tmp_path / f"log_{time.monotonic_ns()}.txt"
        self.process = SPAWNER.Process(target=_child, args=(do, environment, str(self.log), *arguments))
        self.process.start()
        return self.process

    def run(self, environment, first: int, last: int, exit_code: int = 0, **options) -> str:
        """The same to the end; returns what was printed."""
        self.start(environment, first, last, **options)
        return self._wait(exit_code)

    def _wait(self, exit_code: int) -> str:
        self.process.join(180)
        printed = self.log.read_text()
        assert self.process.exitcode == exit_code, printed
        return printed

    def kill(self) -> None:
        """Kill -9 the training of `start`, and wait until wandb's service has noticed."""
        self.process.kill()
        self.process.join()
        of_it = f"--pid {self.process.pid}"
        deadline = time.monotonic() + 120
        while any(of_it in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])):
            assert time.monotonic() < deadline, "wandb's service runs on"
            time.sleep(0.02)

    @property
    def num_rows(self) -> int:
        log = self.output_dir / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    @property
    def id(self) -> str:
        return (self.output_dir / "wandb_run_id.txt").read_text()

    def sync(self, server: WandbServer) -> str:
        """Do what the command does that a run prints."""
        files = sorted(map(str, self.output_dir.glob(f"wandb/offline-run-*-{self.id}")))
        self._start(_sync, server.environment, self.tmp_path, files)
        return self._wait(0)

    def run_printed_command(self, server: WandbServer, printed: str) -> str:
        """The same in a shell."""
        command = f"{shlex.quote(sys.executable)} -m {printed.rpartition('upload later with: ')[2]}"
        environment = os.environ | {"HOME": str(self.tmp_path)} | server.environment
        return subprocess.run(
            command, shell=True, env=environment, cwd=self.tmp_path, capture_output=True, text=True, timeout=60
        ).stderr


def draw(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def _child(do, environment: dict, log: str, *arguments) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    do(*arguments)


def _sync(folder: Path, files: list[str]) -> None:
    from wandb.cli.cli import cli

    os.chdir(folder)
    cli(["sync", *files])


def _report(output_dir: Path, first: int, last: int, options: dict) -> None:
    """Options: `kill_after_s` (-9), `image_at`, `late_image_at` and `alert_at` a step, `ended_with` a code, `settings`,
    `file_limit` (bytes) of wandb's service, `flush_s` (of its file; 0 = only at the end), `wait_for` a file,
    `service_killed_at` a step, `start_patience_s` and `finish_patience_s` with the server, `file_patience_s` with its
    file; `is_slow`: wandb needs too long to end, and writes even later."""
    from accelerate import Accelerator
    from wandb.sdk.lib.service import service_port_file

    from jit_accel.config.run_groups import TrackingConfig
    from jit_accel.monitor.log import MetricsLog
    from jit_accel.monitor.trackers import build_trackers, log_picture, log_row, start_trackers

    service_port_file._SLEEP = lambda wait_s: time.sleep(0.01)  # each start of the service would take 0.2 s
    wandb_tracker.FINISH_TIMEOUT_S = options.get("finish_patience_s", 40)
    wandb_tracker.FILE_TIMEOUT_S = options.get("file_patience_s", 60)
    wandb_tracker.SETTINGS |= {
        "init_timeout": options.get("start_patience_s", 40),
        "finish_timeout": wandb_tracker.FINISH_TIMEOUT_S,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": options.get("flush_s", 0.2),
        # In whole seconds: wandb cuts fractions off, and takes 0 for its own 15 and 2 seconds.
        "x_file_stream_transmit_interval": 1,
        **{
            f"x_{what}_retry_wait_{which}_seconds": 1
            for what in ("file_stream", "file_transfer", "graphql")
            for which in ("min", "max")
        },
    }
    if "file_limit" in options:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_limit"], resource.RLIM_INFINITY))
    tracking = TrackingConfig(use_wandb=True, **options.get("settings", {}))
    record = {"model": "JiT-Ti/7", "ema_decays": ["auto"], "holdout": None}
    accelerator = Accelerator(cpu=True, log_with=build_trackers(tracking, output_dir))
    start_trackers(accelerator, tracking, record, output_dir, first)
    (tracker,) = accelerator.trackers
    if "file_limit" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    metrics = MetricsLog(output_dir, first)
    if "late_image_at" in options:
        draw(sheet := output_dir / "late.png")
        log_picture(accelerator, sheet, options["late_image_at"], "step 20", is_late=True)
    slowest_s = 0.0
    for step in range(first + 1, last + 1):
        row = {
            "step": step,
            "train/loss": 1 / step,
            "train/epoch": step / 10,
            "from": first,
            "train/time": 1.7e9 + step,
        }
        if step % 10 == 0:
            row |= {"train/epoch_loss": 1 / step, "val/loss": float(step)}
        metrics.write([row])
        begin = time.monotonic()
        log_row(accelerator, row)
        slowest_s = max(slowest_s, time.monotonic() - begin)
        if step == options.get("image_at"):
            draw(sheet := output_dir / "sheet.png")
            log_picture(accelerator, sheet, step, "cats and dogs")
        if step == options.get("service_killed_at"):
            for service in psutil.Process().children():
                if "wandb" in service.name():
                    service.kill()
                    service.wait()
        if step == options.get("alert_at"):
            tracker.offer("alert", "Loss jump", "Lower the learning rate.")
    assert slowest_s < 2, "a step waited for the server"
    if "kill_after_s" in options:
        time.sleep(options["kill_after_s"])
        os.kill(os.getpid(), signal.SIGKILL)
    if "wait_for" in options:
        while not Path(options["wait_for"]).exists():
            time.sleep(0.05)
    if options.get("is_slow"):
        in_time = wandb_tracker.in_time

        def end_late(action, timeout_s):
            in_time(action, timeout_s)
            raise TimeoutError

        wandb_tracker.in_time = end_late
        read_segment, early = wandb_tracker.read_segment, iter([wandb_tracker.Segment(Path())] * 2)
        wandb_tracker.read_segment = lambda file: next(early, None) or read_segment(file)
    begin = time.monotonic()
    tracker.exit_code = options.get("ended_with", 0)
    accelerator.end_training()
    assert time.monotonic() - begin < options.get("finish_patience_s", 3) + 7
    if "service_killed_at" in options:
        atexit._run_exitfuncs()  # as at the exit of a program, and not of a process like this one


def assert_whole(run, last: int, changes: dict[int, int]) -> None:
    """The server has each step once and in order; `changes` tells from which step on rows are of a later start."""
    history = run.history
    assert [row["_step"] for row in history] == list(range(1, last + 1))
    assert [row["step"] for row in history] == list(range(1, last + 1))
    assert [row["_timestamp"] - 1.7e9 for row in history] == list(range(1, last + 1))  # each its own time
    sources = [row["from"] for row in history]
    assert sources == [max(c for start, c in changes.items() if start <= step) for step in range(1, last + 1)]
    assert run.overwritten == 0


def definitions(run) -> dict[str, str]:
    """Of each metric or pattern, the metric that is its x axis."""
    metrics = run.config["_wandb"]["value"]["m"]
    names = [metric.get("1") or metric.get("2") for metric in metrics]
    return {name: names[metric["5"] - 1] for name, metric in zip(names, metrics) if "5" in metric}


def test_everything_arrives(server, training):
    settings = {
        "wandb_project": "shop",
        "wandb_name": "clothes 1",
        "wandb_entity": "team",
        "wandb_tags": ("a", "b c"),
        "wandb_notes": "two words",
        "wandb_group": "seeds",
    }
    printed = training.run(server.environment, 0, 30, image_at=20, alert_at=20, settings=settings)
    assert printed == (
        "Wandb initialized: project=shop, name=clothes 1\n"
        f"View run at: http://127.0.0.1:{server.port}/team/shop/runs/{training.id}\n"
    )
    (run,) = server.runs.values()
    assert_whole(run, 30, {1: 0})
    assert (run.project, run.entity, run.exit_code) == ("shop", "team", 0)
    told = {name: run.settings[name] for name in ("displayName", "tags", "notes", "groupName")}
    assert told == {"displayName": "clothes 1", "tags": ["a", "b c"], "notes": "two words", "groupName": "seeds"}
    assert run.config["model"] == {"value": "JiT-Ti/7"}
    assert run.config["ema_decays"] == {"value": ["auto"]}
    image = run.history[19]["samples/grid"]
    assert image["caption"] == "cats and dogs"
    assert run.files[image["path"]] == (training.output_dir / "sheet.png").read_bytes()
    assert [(alert["title"], alert["text"]) for alert in run.alerts] == [("Loss jump", "Lower the learning rate.")]
    assert (training.output_dir / "wandb_url.txt").read_text() == f"{printed.split()[-1]}\n"
    for unwanted in (socket.gethostname(), __file__, sys.argv[0], sys.executable):
        assert unwanted.encode() not in server.received
    assert not any("requirements" in name for name in run.files)
    axes = definitions(run)
    rooms = {f"{room}/*": "step" for room in ("train", "val", "data", "perf", "ema", "health", "samples", "eval")}
    scores = (
        f"eval/{name}{how}" for name in ("fid", "inception_score", "fd_efficientnet_lite0") for how in ("", "_unguided")
    )
    pairs = ("val/psnr", "val/ssim", "val/mae")
    best = dict.fromkeys(("val/loss", "ema/val_loss", *pairs, *scores), "step")
    assert axes == rooms | best | dict.fromkeys(
        ("train/epoch_loss", "train/epoch_time", "train/samples_per_second", "train/best_loss"), "train/epoch"
    )
    assert run.summary["val/loss"] == {"min": 10, "last": 30}
    assert run.summary["train/loss"] == pytest.approx(1 / 30)


def test_a_training_that_was_killed_goes_on_in_the_same_curve(server, training):
    training.start(server.environment, 0, 130, wait_for="never")
    server.wait_for(lambda: any(len(run.history) > 100 for run in server.runs.values()))
    training.kill()
    (run,) = server.runs.values()
    known = len(run.history)
    training.run(server.environment, 100, 200)
    assert list(server.runs.values()) == [run]
    assert_whole(run, 200, {1: 0, known + 1: 100})


@pytest.mark.parametrize("flush_s", [0, 0.1])
def test_synced_offline_files_make_one_whole_curve(server, training, flush_s):
    training.start(OFFLINE, 0, 130, wait_for="never", flush_s=flush_s)
    server.wait_for(lambda: training.num_rows == 130)
    (file,) = training.output_dir.glob("wandb/offline-run-*/run-*.wandb")
    if flush_s:  # wandb keeps the newest row until the next one comes
        server.wait_for(lambda: wandb_tracker.read_segment(file).last_step == 129)
    training.kill()
    known = wandb_tracker.read_segment(file).last_step
    printed = training.run(OFFLINE, 100, 200)
    assert f"upload later with: wandb sync {training.output_dir}/wandb/offline-run-*-{training.id}\n" in printed
    training.sync(server)
    (run,) = server.runs.values()
    # What reached no file before the kill comes from metrics.jsonl, with the rows of the start that wrote it.
    assert_whole(run, 200, {1: 0, max(known, 100) + 1: 100})
    assert "Skipped" in training.sync(server)
    training.run(server.environment, 150, 210)
    training.sync(server)
    assert [row["_step"] for row in run.history] == list(range(1, 211))


def test_a_cut_offline_file_is_mended(server, training):
    training.run(OFFLINE, 0, 50)
    (file,) = training.output_dir.glob("wandb/offline-run-*/run-*.wandb")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    printed = training.run(OFFLINE, 40, 60)
    assert "ERROR" not in training.run_printed_command(server, printed)
    (run,) = server.runs.values()
    assert [row["_step"] for row in run.history] == list(range(1, 61))


def test_offline_first_and_online_later(server, training):
    training.run(OFFLINE, 0, 30)
    training.run(server.environment, 20, 40)
    (run,) = server.runs.values()
    assert_whole(run, 40, {1: 0, 21: 20})
    assert "Skipped" in training.sync(server)
    training.run(OFFLINE, 40, 50)  # the server is known to have all up to 40
    training.sync(server)
    assert_whole(run, 50, {1: 0, 21: 20, 41: 40})


def test_an_offline_start_behind_a_killed_online_one_begins_a_whole_run_of_its_own(server, training):
    training.run(server.environment, 0, 30, exit_code=-signal.SIGKILL, kill_after_s=0)
    first = training.id
    assert f"how much of the run {first}" in training.run(OFFLINE, 20, 40)
    training.sync(server)
    assert training.id != first
    assert_whole(server.runs[training.id], 40, {1: 0, 21: 20})


@pytest.mark.parametrize("end", [{}, {"exit_code": -signal.SIGKILL, "kill_after_s": 1}], ids=["stopped", "killed"])
def test_a_picture_that_comes_late_is_sent_with_the_next_row_that_is_taken(server, training, end):
    training.run(server.environment, 0, 20, **end)
    training.run(server.environment, 20, 30, late_image_at=20)
    (run,) = server.runs.values()
    assert_whole(run, 30, {1: 0, 21: 20})
    (row,) = (row for row in run.history if "samples/grid" in row)
    assert row["step"] in ((21,) if not end else (20, 21))
    assert row["samples/grid"]["caption"] == "step 20"


def test_a_run_deleted_in_wandb_is_replaced(server, training):
    training.run(server.environment, 0, 30)
    server.deleted.add(training.id)
    del server.runs[training.id]
    printed = training.run(server.environment, 20, 40)
    assert printed.count("Warning") == 1
    assert "was deleted in W&B" in printed
    assert_whole(server.runs[training.id], 40, {1: 0, 21: 20})


def no_answer(server):
    server.fail("hang")
    return {"WANDB_HTTP_TIMEOUT": "1"}


def refused(server):
    server.stop()
    return {"WANDB_HTTP_TIMEOUT": "1"}


def no_answer_to_the_start(server):
    server.fail("hang", "UpsertBucket")
    return {}


def error(server):
    server.fail("503")
    return {"WANDB_HTTP_TIMEOUT": "1"}


@pytest.mark.parametrize(
    ("break_it", "warning"),
    [
        (refused, "W&B's server does not answer: check the network"),
        (no_answer, "W&B's server does not answer: check the network"),
        (error, "W&B's server does not answer: check the network"),
        (no_answer_to_the_start, "wandb could not start (CommError: "),
        (lambda server: {"WANDB_API_KEY": "f" * 40}, "run `wandb login`, or set WANDB_API_KEY"),
        (lambda server: {"WANDB_API_KEY": "short"}, "run `wandb login`, or set WANDB_API_KEY"),
        (lambda server: {"WANDB_API_KEY": ""}, "wandb has no API key: run `wandb login` once"),
    ],
)
def test_without_a_server_the_run_is_kept_offline(server, training, break_it, warning):
    environment = server.environment | break_it(server)
    printed = training.run(environment, 0, 20, start_patience_s=4 if break_it is no_answer_to_the_start else 40)
    assert printed.count("Warning") == 1, printed
    assert warning in printed
    assert f"wandb sync {training.output_dir}/wandb/offline-run-*-{training.id}" in printed
    if break_it is no_answer_to_the_start:  # the one that left something behind
        server.mend()
        training.sync(server)
        assert_whole(server.runs[training.id], 20, {1: 0})


@pytest.mark.parametrize(("how", "which"), [("403", "file_stream"), ("hang", "file_stream"), ("500", "PUT")])
def test_what_a_server_did_not_take_is_sent_by_the_same_command_again(server, training, how, which):
    server.fail(how, which)
    printed = training.run(server.environment, 0, 20, finish_patience_s=1)
    assert printed.count("Warning") == 1, printed
    assert "metrics.jsonl has every row. The same command with --resume auto" in printed
    server.mend()
    training.run(server.environment, 20, 20)
    assert_whole(server.runs[training.id], 20, {1: 0})


def test_a_server_that_comes_back_gets_everything(server, training, tmp_path):
    process = training.start(server.environment, 0, 30, wait_for=str(tmp_path / "go"))
    server.wait_for(lambda: any(run.history for run in server.runs.values()))
    server.stop()
    server.start()
    server.fail("503", times=1)
    (tmp_path / "go").touch()
    process.join(180)
    assert (process.exitcode, training.log.read_text().count("Warning")) == (0, 0)
    assert_whole(server.runs[training.id], 30, {1: 0})


def test_a_disk_that_is_full_costs_a_warning(server, training):
    printed = training.run(OFFLINE, 0, 500, file_limit=60_000, file_patience_s=0.2)
    assert printed.count("Warning") == 1
    assert "could not be written to its end (is the disk full?)" in printed
    training.run(OFFLINE, 500, 500)
    training.sync(server)
    assert_whole(server.runs[training.id], 500, {1: 0})


def test_an_offline_run_that_ends_slowly_but_whole_costs_no_warning(training):
    assert "Warning" not in training.run(OFFLINE, 0, 20, is_slow=True)


@pytest.mark.parametrize("how", ["online", "offline"])
def test_a_service_that_was_killed_costs_a_warning_with_a_remedy(server, training, how):
    environment = server.environment if how == "online" else OFFLINE
    printed = training.run(environment, 0, 40, service_killed_at=15)
    assert printed.count("Warning") == 1, printed
    assert "Warning: wandb failed to log (" in printed
    assert "metrics.jsonl has every row. The same command with --resume auto" in printed
    assert "Traceback" not in printed
    training.run(environment, 40, 40)
    if how == "offline":
        training.sync(server)
    assert_whole(server.runs[training.id], 40, {1: 0})


@pytest.mark.parametrize("how", ["online", "offline"])
def test_a_service_that_was_killed_at_the_end_is_noticed_there(server, training, how):
    environment = server.environment if how == "online" else OFFLINE
    printed = training.run(environment, 0, 20, service_killed_at=20, file_patience_s=1)
    assert printed.count("Warning") == 1, printed
    assert "metrics.jsonl has every row. The same command with --resume auto" in printed
    assert "Traceback" not in printed


def _start_without_a_service(folder: Path) -> None:
    from wandb.sdk.lib.service import service_process

    service_process.get_core_path = lambda: "/bin/false"
    _report(folder, 0, 5, {})


def test_a_service_that_does_not_start_costs_a_warning_with_a_remedy(server, training):
    """wandb alone waits for itself for ever."""
    training._start(_start_without_a_service, server.environment, training.output_dir)
    printed = training._wait(0)
    assert printed.count("Warning") == 1, printed
    assert "Warning: wandb could not start (" in printed
    assert "The same command with --resume auto" in printed
    training.run(server.environment, 5, 5)
    assert_whole(server.runs[training.id], 5, {1: 0})


def test_a_folder_of_the_same_second_is_not_given_a_name_that_no_command_finds(server, training):
    training.run(OFFLINE, 0, 5)
    begin = time.time()
    for second in range(3):
        name = time.strftime("%Y%m%d_%H%M%S", time.localtime(begin + second))
        (training.output_dir / "wandb" / f"offline-run-{name}-{training.id}").mkdir(exist_ok=True)
    training.run(OFFLINE, 5, 10)
    training.sync(server)
    assert_whole(server.runs[training.id], 10, {1: 0, 6: 5})


def test_a_folder_that_cannot_be_made_costs_a_warning(training):
    (training.output_dir / "wandb").write_text("in the way")
    printed = training.run(OFFLINE, 0, 5)
    assert printed.count("Warning") == 1
    assert "Warning: wandb could not start (FileExistsError" in printed


def _live_run(environment: dict, folder: Path) -> None:
    os.environ.update(environment | {"HOME": str(folder)})
    from accelerate import Accelerator

    from jit_accel.config.run_groups import TrackingConfig
    from jit_accel.monitor.trackers import build_trackers, start_trackers

    tracking = TrackingConfig(use_wandb=True, wandb_project="shop")
    accelerator = Accelerator(cpu=True, log_with=build_trackers(tracking, folder))
    assert accelerator.get_tracker("wandb", unwrap=True) is not None  # Accelerate's blank one, before the start
    start_trackers(accelerator, tracking, {}, folder, 0)
    run = accelerator.get_tracker("wandb", unwrap=True)
    run.log({"mine": 7}, step=1)
    (folder / "id").write_text(run.id)
    accelerator.end_training()


def test_accelerate_gives_the_live_run(tmp_path):
    process = SPAWNER.Process(target=_live_run, args=(OFFLINE, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    logged = [item for record in offline_records(tmp_path) for item in record.history.item]
    assert "mine" in {"".join(item.nested_key) or item.key for item in logged}
    assert (tmp_path / "id").read_text() == (tmp_path / "wandb_run_id.txt").read_text()


def test_disabled_is_silent(training):
    assert training.run({"WANDB_MODE": "disabled"}, 0, 5) == ""
    assert not (training.output_dir / "wandb").exists()


def test_how_a_training_ended_is_told(server, training):
    training.run(server.environment, 0, 5, ended_with=128 + signal.SIGTERM)
    run = server.runs[training.id]
    assert (run.is_preempting, run.exit_code) == (True, 143)


def test_an_offline_training_has_every_step_and_the_whole_configuration_in_its_file(images, tmp_path):
    out = tmp_path / "out"
    environment = {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_TAGS": "a,b c", "WANDB_NOTES": "two words"}
    environment["TEST_SETUP"] = "test_wandb:_clean_up_wandbs_temporary_files"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--log_every_steps", "4", "--wandb_project", "shop"]
    flags += ["--wandb_watch", "all", "--wandb_class_images", "--wandb_log_model", "--wandb_aliases", "best"]
    group = Group([*flags, "--report_to", "wandb", "--wandb_name", "clothes-1"], tmp_path / "log", 1, environment)
    assert group.wait() == [0], group.output()
    assert "Wandb initialized: project=shop, name=clothes-1" in group.output()
    config, history, tags = {}, {}, []
    for record in offline_records(out):
        if record.HasField("run"):
            tags = list(record.run.tags)
            named = (record.run.project, record.run.display_name, record.run.notes)
            assert named == ("shop", "clothes-1", "two words")
        updates = list(record.run.config.update) + list(record.config.update)
        config.update({item.key: json.loads(item.value_json) for item in updates if item.key})
        if record.HasField("history"):
            row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.setdefault(row["_step"], {}).update(row)
    assert tags == ["a", "b c"]
    keys = ("train/loss", "train/learning_rate", "train/grad_norm")
    logged = {step: tuple(row[key] for key in keys) for step, row in history.items()}
    assert logged == {row["step"]: tuple(row[key] for key in keys) for row in rows(out)}
    assert sorted(logged) == [1, 2, 3, 4, 5, 6]
    known = {"model": "JiT-XS/7", "global_batch_size": 4, "img_size": 28, "num_parameters": 6_883}
    assert known.items() <= config.items()
    assert any("samples/grid" in name for row in history.values() for name in row)
    by_class = {key.rpartition(".")[0] for key in history[6] if key.startswith("samples/class/")}
    classes = {name.rpartition("/")[2] for name in by_class}
    assert classes == {folder.name for folder in images.iterdir()}, group.output()
    assert all(history[6][f"{name}.count"] == 8 for name in by_class)
    assert [step for step, row in history.items() if any(key.startswith("gradients/") for key in row)] == [1]
    for kind in ("gradients", "parameters"):
        name = f"{kind}/blocks.0.mlp.w12.weight"
        assert history[1][f"{name}._type"] == "histogram"
        assert len(history[1][f"{name}.bins"]) == len(history[1][f"{name}.values"]) + 1
    (artifact,) = (record.artifact for record in offline_records(out) if record.HasField("artifact"))
    assert (artifact.type, sorted(artifact.aliases)) == ("model", ["best", "latest", "step_6"])
    assert "transformer/config.json" in {file.path for file in artifact.manifest.contents}


def _clean_up_wandbs_temporary_files() -> None:
    """Do what a system does to files in /tmp that are some days old."""
    from wandb.sdk.data_types._private import MEDIA_TMP

    shutil.rmtree(MEDIA_TMP.name, ignore_errors=True)


def _smuggle() -> None:
    """Put a secret where wandb looks for facts about a run."""
    sys.argv = ["train", "--data_path", f"https://user:{SECRET}@host/x.tar?token={SECRET}"]


def test_a_training_reports_online_and_keeps_its_secrets(server, images, tmp_path):
    out = tmp_path / "out"
    environment = server.environment | {
        "HOME": str(tmp_path),
        "HF_TOKEN": SECRET,
        "SLURM_JOB_COMMENT": SECRET,
        "SLURM_JOB_ID": "7",
        "TEST_SETUP": "test_wandb:_smuggle",
    }
    flags = ["--data_path", str(images), "--output_dir", str(out), "--use_wandb", "--wandb_log_model"]
    group = Group(flags, tmp_path / "log.txt", 1, environment)
    assert group.wait() == [0], group.output()
    (run,) = server.runs.values()
    (artifact,) = run.artifacts
    assert (artifact["state"], artifact["artifactTypeName"]) == ("COMMITTED", "model")
    assert sorted(alias["alias"] for alias in artifact["aliases"]) == ["latest", "step_6"]
    pipeline = {str(path.relative_to(out / "pipeline")) for path in (out / "pipeline").rglob("*") if path.is_file()}
    sent = {name.partition("/")[2] for name in run.files if name.startswith(artifact["id"])}
    assert sent == pipeline | {"wandb_manifest.json"}
    warnings = [line for line in group.output().splitlines() if line.startswith("Warning")]
    known = ("hardly move the weights", "OMP_NUM_THREADS=")  # a short training with the threads of this test
    assert not [line for line in warnings if not any(words in line for words in known)], warnings
    keys = ("step", "train/loss", "train/learning_rate", "train/grad_norm")
    sent = [tuple(row[key] for key in keys) for row in run.history]
    assert sent == [tuple(row[key] for key in keys) for row in rows(out)]
    assert run.config["global_batch_size"] == {"value": 4}
    assert "samples/grid" in run.history[-1]
    assert run.exit_code == 0
    kept = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for secret in (SECRET, KEY):
        assert secret.encode() not in server.received
        assert secret.encode() not in kept


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["hang", "401"])
def test_no_process_hangs_where_the_server_fails(server, images, tmp_path, how):
    server.fail(how)
    environment = server.environment | {"HOME": str(tmp_path), "WANDB_HTTP_TIMEOUT": "1"}
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--use_wandb"]
    group = Group(flags, tmp_path / "log.txt", 2, environment)
    assert group.wait() == [0, 0], group.output()
    assert "2 x cpu" in group.output()
    assert sum(group.output().count(f"Warning: {name}") for name in ("wandb", "W&B")) == 1
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    json.loads((tmp_path / "out" / "pipeline" / "model_index.json").read_text())
