"""The report that is built beside a training."""

import time

from helpers import train_here

from jit_accel.monitor.log import MetricsLog, ReportProcess, read_metrics
from jit_accel.train.results import write_record


def page(folder):
    return folder / "report.html"


def test_each_build_shows_what_is_there_and_short_epochs_do_not_build_all_the_time(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write([{"step": 1, "train/loss": 0.5}])
    report = ReportProcess(tmp_path, is_wanted=True)
    report.build()
    assert report.process is not None
    report.build()  # while one is being built
    report.wait()
    first = page(tmp_path).read_text()
    log.write([{"step": 1234567, "train/loss": 0.4}])
    report.build()
    assert report.process is None  # a hundred times the first build's time has not passed
    report.not_before = time.monotonic()
    report.build()
    report.wait()
    assert "1,234,567" not in first
    assert "1,234,567" in page(tmp_path).read_text()
    log.write([{"step": 7654321, "train/loss": 0.3}])
    report.build_last()  # whatever the time
    assert "7,654,321" in page(tmp_path).read_text()


def test_a_report_that_cannot_be_built_is_told_once_and_costs_nothing_else(tmp_path, capfd):
    report = ReportProcess(tmp_path / "none", is_wanted=True)
    for _ in range(2):
        report.build_last()
    err = capfd.readouterr().err
    assert err.count("Warning: report.html cannot be built (error: ") == 1
    assert "not a folder" in err


def test_a_report_that_takes_too_long_is_given_up_and_the_reason_is_said(tmp_path, capfd):
    report = ReportProcess(tmp_path, is_wanted=True)
    report.build_last(timeout_s=0)
    assert "Warning: report.html cannot be built (not done after 0 s). Nothing else is lost" in capfd.readouterr().err


def test_a_training_leaves_its_report_also_where_it_fails(images, tmp_path, monkeypatch):
    from jit_accel.train.trainer import Trainer

    flags = ["--data_path", str(images), "--html_report"]
    assert train_here(*flags, "--output_dir", str(tmp_path / "good")) == 0
    assert "Finished" in page(tmp_path / "good").read_text()
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "none")) == 0
    assert not page(tmp_path / "none").exists()
    honest = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: honest(self, batch) * (1 if self.step < 3 else 1e39))
    assert train_here(*flags, "--output_dir", str(tmp_path / "bad")) == 2
    assert "train/loss is inf at step 4" in page(tmp_path / "bad").read_text()


def test_files_that_cannot_be_written_cost_a_warning_each(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "run.json").mkdir()
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write([{"step": step}])
    write_record({"model": "JiT-B/16"}, {}, tmp_path)
    err = capfd.readouterr().err
    assert err.count("metrics.jsonl cannot be written") == 1
    assert err.count("run.json cannot be written") == 1
    (tmp_path / "metrics.jsonl").rmdir()
    log.write([{"step": 3}])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]  # nothing was lost
