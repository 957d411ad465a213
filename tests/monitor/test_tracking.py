"""`metrics.jsonl`, and Accelerate's trackers: TensorBoard and trackio for real, and some that fail."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
from accelerate import Accelerator
from helpers import SPAWNER, rows, train_here
from PIL import Image

from jit_accel.config.run_groups import TrackingConfig
from jit_accel.monitor.log import MetricsLog, read_metrics
from jit_accel.monitor.trackers import build_trackers, is_installed, log_picture, log_row, start_trackers

RECORD = {"model": "JiT-Ti/7", "ema_decays": ["auto", "0.9996"], "holdout": None, "seed": 0}


def some_rows(first, last):
    """Rows of which each took a second."""
    return [
        {"step": step, "train/loss": 1 / step, "train/epoch": None, "train/time": 1.7e9 + step}
        for step in range(first + 1, last + 1)
    ]


def report(output_dir, name, first, last):
    """Log as a training does that begins behind step `first` and is killed at `last`."""
    tracking = TrackingConfig(report_to=(name,), wandb_project="shop")
    accelerator = Accelerator(cpu=True, log_with=build_trackers(tracking, output_dir))
    start_trackers(accelerator, tracking, RECORD, output_dir, first)
    MetricsLog(output_dir, first).write(some_rows(first, last))
    for row in some_rows(first, last):
        log_row(accelerator, row)
    return accelerator


def test_rows_behind_the_step_resumed_from_are_dropped(tmp_path):
    MetricsLog(tmp_path, 0).write(some_rows(0, 5000))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5001, "train/l')  # killed
    MetricsLog(tmp_path, 4000).write(some_rows(4000, 4010))
    assert read_metrics(tmp_path) == some_rows(0, 4010)
    MetricsLog(tmp_path, 0)
    assert read_metrics(tmp_path) == []


def test_metrics_that_are_not_finite_are_null_in_strict_json(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write([{"step": 1, "train/loss": float("nan"), "train/grad_norm": float("inf"), "train/epoch": 0.5}])
    written = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert written == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/epoch": 0.5}


def test_old_files_with_nan_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n\n[]\n{"step": 2, "train/loss": 1.0}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    MetricsLog(tmp_path, 2)
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": None}, {"step": 2, "train/loss": 1.0}]


def test_a_row_behind_one_that_a_full_disk_cut_is_whole(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0)
    log.write(some_rows(0, 1))
    path, log.path = log.path, tmp_path  # a folder, which cannot be written
    log.write(some_rows(1, 3))
    log.write(some_rows(3, 4))
    log.path = path
    with open(path, "a") as file:
        file.write('{"step": 2, "tra')
    log.write(some_rows(4, 5))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("Warning") == 1


def test_no_host_sync_between_flushes(images, tmp_path, monkeypatch):
    """Nothing asks a tensor for its value during a step: `item`, `tolist` and their like wait for the device."""
    import torch

    from jit_accel.train.trainer import Trainer

    calls = []
    honest = Trainer.train_step

    def watched(self):
        real = {
            name: getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy")
        }
        before = self.feed.loader.__class__.__next__
        try:
            batches = [next(self.feed.loader) for _ in range(self.accelerator.gradient_accumulation_steps)]
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


def tensorboard_steps(output_dir, tag):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)], events


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    report(tmp_path, "tensorboard", 0, 13)
    accelerator = report(tmp_path, "tensorboard", 10, 20)
    sheet = tmp_path / "sheet.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(sheet)
    log_picture(accelerator, sheet, 20, "cats")
    accelerator.end_training()
    steps, events = tensorboard_steps(tmp_path, "train/loss")
    assert steps == [(step, 1 / step) for step in range(1, 21)]
    assert [event.wall_time - 1.7e9 for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [image.step for image in events.Images("samples/grid")] == [20]
    (hparams,) = tmp_path.glob("tensorboard/*/hparams.yml")
    assert "ema_decays: auto 0.9996" in hparams.read_text()


def test_a_tracker_that_is_added_at_a_resume_gets_what_was_before(tmp_path):
    pytest.importorskip("tensorboard")
    MetricsLog(tmp_path, 0).write(some_rows(0, 10))
    report(tmp_path, "tensorboard", 8, 12).end_training()
    assert [step for step, _ in tensorboard_steps(tmp_path, "train/loss")[0]] == list(range(1, 13))


def _report_to_trackio(folder, file):
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # read when trackio is imported
    report(folder, "trackio", 0, 13).end_training()
    report(folder, "trackio", 10, 20).end_training()
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs("shop", folder.name)
    file.write_text(json.dumps([(row["step"], row["train/loss"]) for row in found]))


def test_trackio_has_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("trackio")
    process = SPAWNER.Process(target=_report_to_trackio, args=(tmp_path, tmp_path / "found.json"))
    process.start()
    process.join(240)
    assert json.loads((tmp_path / "found.json").read_text()) == [[step, 1 / step] for step in range(1, 21)]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    import importlib.util

    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    class Fails(GeneralTracker):
        name, requires_logging_directory, tracker = "aim", False, None

        def __init__(self, run_name, **kwargs):
            super().__init__()

        def log(self, values, step):
            if step == 3:
                raise OSError("No space left on device")

    real = importlib.util.find_spec
    found = {"aim": real("json"), "mlflow": None, "wandb": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else real(name, *rest)
    )
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Fails)
    out = tmp_path / "out"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--use_wandb"]
    assert train_here(*flags, "--report_to", "aim", "mlflow", "tensorboard") == 0
    printed = capsys.readouterr().err
    assert [line[line.find("Warning") :] for line in printed.splitlines() if "Warning" in line][-3:] == [
        "Warning: wandb not available. Install with: pip install wandb",
        "Warning: mlflow not available. Install with: pip install mlflow",
        "Warning: aim failed to log (OSError: No space left on device). Training goes on without it; metrics.jsonl "
        "has every row.",
    ]
    assert [step for step, _ in tensorboard_steps(out, "train/loss")[0]] == [row["step"] for row in rows(out)]
    assert (out / "pipeline" / "model_index.json").exists()


OWN_TRACKER = """
import json
from accelerate.tracking import GeneralTracker


class Notebook(GeneralTracker):
    name, requires_logging_directory = "notebook", True

    def __init__(self, project, folder):
        super().__init__()
        self.project, self.path, self.lines = project, folder + "/notebook.jsonl", []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.lines.append([self.project, values["model"], values["ema_decays"]])

    def log(self, values, step):
        self.lines.append([step, values["train/loss"]])

    def finish(self):
        with open(self.path, "w") as file:
            file.write("".join(json.dumps(line) + "\\n" for line in self.lines))


class Mine(Notebook):
    name = "wandb"

    def __init__(self, project, folder, **options):
        super().__init__(project + " of " + options["name"], folder)


class NoTracker:
    name = "none"
"""


@pytest.fixture
def own_tracker(tmp_path, monkeypatch):
    """A module in the working directory, which is not on Python's path."""
    (tmp_path / "my_trackers.py").write_text(OWN_TRACKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "my_trackers:Notebook"
    sys.modules.pop("my_trackers", None)


def test_a_tracker_of_ones_own_gets_settings_and_every_row(images, tmp_path, own_tracker):
    out = tmp_path / "out"
    flags = [
        "--data_path",
        str(images),
        "--output_dir",
        str(out),
        "--report_to",
        own_tracker,
        "--wandb_project",
        "shop",
    ]
    assert train_here(*flags) == 0
    lines = [json.loads(line) for line in (out / "notebook.jsonl").read_text().splitlines()]
    assert lines == [["shop", "JiT-XS/7", "auto"], *([row["step"], row["train/loss"]] for row in rows(out))]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("no_such_module:Notebook", "cannot be imported (ModuleNotFoundError"),
        ("my_trackers:Notepad", "cannot be imported (AttributeError"),
        ("my_trackers:NoTracker", "must be a subclass of accelerate.tracking.GeneralTracker"),
    ],
)
def test_a_wrong_tracker_of_ones_own_is_refused(images, tmp_path, own_tracker, capsys, name, rule):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--report_to", name) == 2
    printed = capsys.readouterr().err
    assert f"--report_to {name}: {rule}" in printed
    assert "Traceback" not in printed


def test_a_tracker_of_ones_own_for_wandb_gets_its_options(images, tmp_path, own_tracker):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--wandb_project", "shop"]
    assert train_here(*flags, "--report_to", "my_trackers:Mine", "--wandb_name", "first", "--max_steps", "2") == 0
    first = (tmp_path / "out" / "notebook.jsonl").read_text().splitlines()[0]
    assert json.loads(first)[0] == "shop of first"


def test_a_mere_folder_of_its_name_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("mlflow") is not None
    assert not is_installed("mlflow")
    assert is_installed("json")


def test_an_unknown_tracker_is_refused_before_anything_is_loaded(capsys):
    from jit_accel.train import main

    assert main(["--data_path", "/no/such/folder", "--report_to", "tensorbord"]) == 2
    printed = capsys.readouterr().err
    assert "--report_to tensorbord: unknown; choose from wandb, tensorboard, trackio" in printed
    assert "Did you mean 'tensorboard'?" in printed
