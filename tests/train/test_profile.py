"""Profiles of real trainings."""

import contextlib
import gzip
import json
import os
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import Group, assert_same_state, train_here
from torch.autograd import DeviceType

from jit_accel.base import spans
from jit_accel.base.errors import UserError
from jit_accel.base.files import guarded
from jit_accel.config.checks import steps_of
from jit_accel.config.settings import Config
from jit_accel.train import profile
from jit_accel.train.profile import StepProfile, table_of
from jit_accel.train.trainer import Trainer

PARTS = {"fetch": 2, "forward": 2, "backward": 2, "clip": 1, "copies": 1, "optimizer": 1, "averages": 1, "metrics": 1}
ACCUMULATED = ("--gradient_accumulation_steps", "2")


def trace_of(out, name):
    with gzip.open(out / "profile" / name, "rt") as file:
        return json.load(file)["traceEvents"]


def traces(out):
    return sorted(path.name for path in (out / "profile").iterdir()) if (out / "profile").exists() else []


def named(events):
    return [event for event in events if event.get("cat") == "user_annotation"]


def assert_steps_have_their_parts(events, count):
    found = named(events)
    steps = [event for event in found if event["name"] == "step"]
    assert len(steps) == count
    for step in steps:
        inside = [
            event for event in found if event["name"] in PARTS and step["ts"] <= event["ts"] < step["ts"] + step["dur"]
        ]
        assert {name: sum(event["name"] == name for event in inside) for name in PARTS} == PARTS
        assert sum(event["dur"] for event in inside) <= step["dur"]
        ends = [event["ts"] + event["dur"] for event in sorted(inside, key=lambda event: event["ts"])]
        begins = sorted(event["ts"] for event in inside)
        assert all(end <= begin + 1 for end, begin in zip(ends, begins[1:]))  # us; one after the other


@pytest.fixture(scope="module")
def profiled(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("profiled")
    flags = ("--data_path", str(images), "--save_every_steps", "2", *ACCUMULATED)
    assert train_here(*flags, "--profile_steps", "2:5", "--output_dir", str(out)) == 0
    assert train_here(*flags, "--output_dir", str(out / "plain")) == 0
    return out


def test_each_part_of_a_step_has_its_span_within_it(profiled):
    events = trace_of(profiled, "steps_2_to_4_process_0.json.gz")
    assert_steps_have_their_parts(events, 3)
    # between the steps, under the names that they have in the loop
    assert [event["name"] for event in named(events) if event["name"] in ("log", "save")] == ["log", "save", "log"]


def test_a_trace_is_of_the_format_that_viewers_read(profiled):
    for event in trace_of(profiled, "steps_2_to_4_process_0.json.gz"):
        assert {"ph", "name", "pid", "tid", "ts"} <= set(event)
        assert event["ph"] != "X" or (event["dur"] >= 0 and event["ts"] >= 0)


def test_a_profile_changes_nothing_else(profiled):
    assert_same_state(profiled, profiled / "plain")
    assert not (profiled / "plain" / "profile").exists()


def test_a_table_says_where_the_time_went(images, tmp_path, capfd):
    train_here("--data_path", str(images), "--profile_steps", "1:3", "--output_dir", str(tmp_path))
    printed = capfd.readouterr()
    table = printed.out[printed.out.index("Profile of 2 steps") : printed.out.index("Trace:")].splitlines()
    values = {line[:60].strip(): line[60:].split() for line in table}
    assert set(list(values)[1:9]) == set(PARTS)
    assert list(values)[9:11] == ["the rest", "all"]
    assert values["all"][1] == "100%"
    parts = [float(values[name][0]) for name in (*PARTS, "the rest")]
    assert sum(parts) == pytest.approx(float(values["all"][0]), abs=0.1)
    assert any(name.startswith("aten::") for name in values)
    assert max(map(len, table)) <= 90
    assert "profiler_st" not in printed.err


def test_a_run_that_ends_amid_the_steps_shows_those_that_there_were(images, tmp_path):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path))
    train_here(*flags, "--profile_steps", "5:100")
    assert traces(tmp_path) == ["steps_5_to_6_process_0.json.gz"]


def test_a_stopped_run_goes_on_with_the_steps_that_are_left(images, tmp_path, monkeypatch):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path), "--profile_steps", "2:5")
    step = Trainer.train_step

    def step_and_stop(self):
        step(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_stop)
        assert train_here(*flags) == 128 + signal.SIGTERM
    assert traces(tmp_path) == ["steps_2_to_3_process_0.json.gz"]
    assert train_here(*flags, "--resume", "auto") == 0
    assert traces(tmp_path) == ["steps_2_to_3_process_0.json.gz", "steps_4_process_0.json.gz"]


def test_a_failure_amid_the_steps_is_told_of_and_leaves_their_trace(images, tmp_path, monkeypatch, capsys):
    record = Trainer.train_step

    def fail_late(self):
        record(self)
        if self.step == 4:
            raise ZeroDivisionError("of the training")

    monkeypatch.setattr(Trainer, "train_step", fail_late)
    with pytest.raises(ZeroDivisionError, match="of the training"):
        train_here("--data_path", str(images), "--output_dir", str(tmp_path), "--profile_steps", "2:6")
    assert traces(tmp_path) == ["steps_2_to_3_process_0.json.gz"]
    assert "Profile of 2 steps" in capsys.readouterr().out


def test_a_failing_profiler_does_not_hide_the_failure(tmp_path):
    def failing():
        raise RuntimeError("the device is gone")

    taken = StepProfile("1:3", tmp_path, 0)
    with pytest.raises(ZeroDivisionError), taken:
        with taken.around(1, contextlib.nullcontext):
            pass
        taken.profiler.stop()
        taken.profiler.stop = failing
        raise ZeroDivisionError


@pytest.mark.parametrize("limit", [10_000, 0])
def test_a_full_disk_costs_the_trace_alone(limit, images, tmp_path, monkeypatch, capsys):
    write = profile.write_trace

    def write_little(*args):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(profile, "write_trace", write_little)
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path), "--profile_steps", "2:4") == 0
    printed = capsys.readouterr()
    assert "Profile of 2 steps" in printed.out
    assert "Trace:" not in printed.out
    assert "cannot be written" in printed.err
    assert traces(tmp_path) == []


def test_a_file_in_the_way_costs_the_trace_alone(images, tmp_path, capsys):
    (tmp_path / "profile").touch()
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path), "--profile_steps", "2:4") == 0
    assert "cannot be written" in capsys.readouterr().err


def test_a_process_that_lost_its_folder_writes_no_trace_there(tmp_path, capsys):
    def refuse():
        raise UserError("has taken this folder over")

    taken = StepProfile("1:2", tmp_path, 0)
    with guarded(tmp_path, refuse), taken, taken.around(1, contextlib.nullcontext):
        torch.ones(2).exp()
    assert list(tmp_path.iterdir()) == []
    assert "taken this folder over" in capsys.readouterr().err


def test_a_dry_run_and_a_finished_run_profile_nothing(images, tmp_path, capsys):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--profile_steps", "1:3")
    assert train_here(*flags, "--dry_run") == 0
    assert not (tmp_path / "out").exists()
    assert train_here(*flags, "--profile_steps", "6:8") == 0
    before = traces(tmp_path / "out")
    capsys.readouterr()
    assert train_here(*flags, "--resume", "auto") == 0
    assert traces(tmp_path / "out") == before
    printed = capsys.readouterr()
    assert "Profile of" not in printed.out
    assert "nothing is profiled" not in printed.err


def test_steps_that_never_come_are_told_of(images, tmp_path, capsys):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path))
    assert train_here(*flags, "--profile_steps", "7:9") == 0
    assert "--profile_steps 7:9: the run ends with step 6" in capsys.readouterr().err
    assert train_here(*flags, "--profile_steps", "2:4", "--resume", "auto", "--max_steps", "8") == 0
    assert capsys.readouterr().err.count("goes on with step 7, behind those of --profile_steps") == 1
    assert traces(tmp_path) == []


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharding", [{}, {"TEST_FSDP2_PRECISION": "no"}], ids=["ddp", "fsdp2"])
def test_each_process_has_a_trace_and_the_main_one_a_table(sharding, images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--profile_steps", "2:4", *ACCUMULATED]
    group = Group(flags, tmp_path / "log.txt", 2, sharding)
    assert group.wait() == [0, 0], group.output()
    assert traces(tmp_path / "out") == [f"steps_2_to_3_process_{rank}.json.gz" for rank in (0, 1)]
    for name in traces(tmp_path / "out"):
        assert_steps_have_their_parts(trace_of(tmp_path / "out", name), 2)
    assert group.output().count("Profile of 2 steps") == group.output().count("Trace:") == 1


@pytest.mark.parametrize("text", ["10", "5:5", "0:3", "a:b", "10:15:2", "-3:4", ":", "5:", "１:３", "1:102"])
def test_what_means_no_steps_or_too_many_is_refused(text, images, tmp_path, capsys):
    assert steps_of(text) is None
    assert train_here("--data_path", str(images), f"--profile_steps={text}", "--output_dir", str(tmp_path)) == 2
    assert "10:15 are the steps 10 to 14" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "holds_one"), [("10:15", True), ("13:15", False), ("8:13", False), ("1:101", True)])
def test_no_evaluation_is_kept_in_memory(steps, holds_one):
    refused = pytest.raises(UserError, match="memory would hold the evaluation")
    with refused if holds_one else contextlib.nullcontext():
        Config.of(data_path="photos", profile_steps=steps, eval_every_steps=12)


def test_steps_in_a_file_are_no_time_of_day(images, tmp_path):
    (tmp_path / "run.yaml").write_text("profile_steps: 5:7\n")
    flags = ("--config", str(tmp_path / "run.yaml"), "--data_path", str(images))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out")) == 0
    assert traces(tmp_path / "out") == ["steps_5_to_6_process_0.json.gz"]


def test_spans_do_nothing_where_no_profile_is_taken(monkeypatch):
    monkeypatch.setattr(spans, "record_function", lambda name: pytest.fail(name))
    with spans.span("forward"):
        pass
    assert spans.span("backward")(lambda x: 2 * x)(3) == 6


def event(name, start, end, *, kernels=(), self_us=0.0, parent=None, is_named=False):
    interval = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    durations = [SimpleNamespace(duration=duration) for duration in kernels]
    found = SimpleNamespace(name=name, time_range=interval, kernels=durations, self_cpu_time_total=self_us)
    found.cpu_parent, found.is_user_annotation = parent, is_named
    found.device_type, found.is_async = DeviceType.CPU, False
    return found


def test_kernels_count_for_the_part_that_launched_them_in_whatever_thread():
    """On a GPU the operations of backward run in a thread that knows no span."""
    step = event("step", 0, 10_000, is_named=True)
    forward = event("forward", 1_000, 4_000, parent=step, is_named=True, kernels=[9e9])  # its own copy on the device
    backward = event("backward", 4_000, 9_000, parent=step, is_named=True)
    of_forward = event("aten::mm", 1_500, 1_600, kernels=[2_000], self_us=100, parent=forward)
    of_backward = event("aten::mm", 4_500, 4_600, kernels=[5_000, 1_000], self_us=100)
    alone = event("aten::zero_", 9_500, 9_600, kernels=[500], self_us=100, parent=step)
    before = event("aten::exp", -500, -400, kernels=[700], self_us=100)
    failed = event("step", 20_000, 21_000, is_named=True)
    table = table_of([before, step, forward, backward, of_forward, of_backward, alone, failed], 1).splitlines()
    values = {line[:60].strip(): line[60:].split() for line in table}
    assert values["forward"] == ["3.00", "30%", "2.00", "24%"]
    assert values["backward"] == ["5.00", "50%", "6.00", "71%"]
    assert values["the rest"] == ["2.00", "20%", "0.50", "6%"]
    assert values["all"] == ["10.00", "100%", "8.50", "100%"]
    assert values["aten::mm"] == ["0.20", "2%", "8.00", "94%"]
    assert "aten::exp" not in values
