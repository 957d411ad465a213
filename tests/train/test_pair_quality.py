"""The scores of restored images that a training measures on its way."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import Group, as_parquet, assert_same_state, clothes, in_fresh_accelerate, rows, train_group, train_here

import jit_accel as jit
from jit_accel.config.groups import ConditionConfig
from jit_accel.data.batches.degradations import degradation_of
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.formats.sources import open_images
from jit_accel.evaluate import main as evaluate
from jit_accel.evaluate.pair_scores import PairScores
from jit_accel.evaluate.pairs import open_pairs
from jit_accel.monitor.log import read_metrics
from jit_accel.report.charts import charts_of
from jit_accel.report.runs import read_runs
from jit_accel.train.pair_quality import PairQuality
from jit_accel.train.samples import SampleSheets

KEYS = [f"val/{name}{ending}" for ending in ("", "_untouched") for name in ("psnr", "ssim", "mae")]
HOW = ("--condition_from", "downscale:4", "--holdout", "0.3", "--val_every_steps", "2", "--save_every_steps", "2")
HOW += ("--max_steps", "4", "--ema_decays", "0.5")


def measured(folder) -> dict[int, list[float]]:
    return {row["step"]: [row[key] for key in KEYS] for row in read_metrics(folder) if KEYS[0] in row}


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The flags and the folder of a run that scored at steps 2 and 4."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(images), *HOW)
    assert train_here(*flags, "--output_dir", str(out)) == 0
    return flags, out


def held_out(images):
    return split_holdout(open_images(images), 0.3, max_images=1024, img_size=28)[1]


def test_the_last_scores_are_those_of_the_pipeline_and_of_the_conditions(run, images):
    _, out = run
    found, held = measured(out), held_out(images)
    assert list(found) == [2, 4]
    assert found[2][3:] == found[4][3:]
    conditions = degradation_of("downscale:4")(held.images / 127.5 - 1, held.keys)
    pipe = jit.load(out)
    how = {"labels": held.labels.tolist(), "conditions": (conditions + 1) / 2, "num_inference_steps": 2}
    made = jit.generate(pipe, held.keys.tolist(), **how)
    scores = PairScores()
    assert scores(made, held.images).mean(0).tolist() == pytest.approx(found[4][:3], rel=1e-5)
    shown = ((conditions + 1) * 127.5).round().to(torch.uint8)
    assert scores(shown, held.images).mean(0).tolist() == pytest.approx(found[4][3:], rel=1e-5)


def test_measuring_changes_no_weight_and_a_resume_measures_what_was_left_undone(run, tmp_path):
    flags, out = run
    assert train_here(*flags, "--paired_every_steps", "0", "--output_dir", str(tmp_path / "never")) == 0
    assert measured(tmp_path / "never") == {}
    assert_same_state(out, tmp_path / "never")
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--resume", "auto") == 0
    assert rows(tmp_path / "out") == rows(out)
    assert train_here(*flags, "--output_dir", str(tmp_path / "never"), "--resume", "auto") == 0
    assert measured(tmp_path / "never") == {4: measured(out)[4]}


@pytest.mark.multiprocess
@pytest.mark.parametrize("count", ["1", "5", "64"])
def test_two_processes_score_what_one_does(images, tmp_path, count):
    flags = ("--data_path", str(images), *HOW, "--paired_images", count, "--max_steps", "2", "--output_dir")
    assert train_here(*flags, str(tmp_path / "one")) == 0
    train_group(tmp_path, *flags, str(tmp_path / "two"), "--batch_size", "2", num_processes=2)
    assert np.allclose(measured(tmp_path / "one")[2], measured(tmp_path / "two")[2], rtol=1e-3)
    assert measured(tmp_path / "one")[2][3:] == pytest.approx(measured(tmp_path / "two")[2][3:], rel=1e-6)


@pytest.mark.multiprocess
def test_processes_that_share_the_weights_score_together(images, tmp_path):
    flags = ("--data_path", str(images), *HOW, "--paired_images", "3", "--max_steps", "2", "--output_dir")
    assert train_here(*flags, str(tmp_path / "one")) == 0
    sharded = {"TEST_FSDP2_PRECISION": "no"}
    train_group(tmp_path, *flags, str(tmp_path / "two"), "--batch_size", "2", num_processes=2, environment=sharded)
    assert np.allclose(measured(tmp_path / "one")[2], measured(tmp_path / "two")[2], rtol=1e-3)


@pytest.mark.parametrize("kind", ["grey", "noise:0.2", "mask:0.5"])
def test_every_kind_of_condition_is_scored_always_alike(images, tmp_path, kind):
    flags = ("--data_path", str(images), *HOW, "--condition_from", kind, "--max_steps", "2")
    for name in ("first", "again"):
        assert train_here(*flags, "--seed", "0", "--output_dir", str(tmp_path / name)) == 0
    assert measured(tmp_path / "first") == measured(tmp_path / "again")
    assert train_here(*flags, "--seed", "1", "--output_dir", str(tmp_path / "other")) == 0
    assert measured(tmp_path / "first")[2][3:] == measured(tmp_path / "other")[2][3:]


def test_a_failure_costs_the_scores_of_its_step_alone(run, tmp_path, monkeypatch, capsys):
    flags, out = run
    values, calls = PairQuality.values, []

    def fail_at_first(self):
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return values(self)

    monkeypatch.setattr(PairQuality, "values", fail_at_first)
    assert train_here(*flags, "--output_dir", str(tmp_path / "out")) == 0
    assert "step 2 is not evaluated, and training goes on: OutOfMemoryError: no memory" in capsys.readouterr().err
    assert measured(tmp_path / "out") == {4: measured(out)[4]}
    assert_same_state(out, tmp_path / "out")


def test_the_report_shows_scores_with_the_untouched_ones(run):
    _, out = run
    charts = {chart["id"]: chart for chart in charts_of(read_runs([out]))}
    assert {"pair_psnr", "pair_ssim", "pair_mae"} <= charts.keys()
    assert [series["name"] for series in charts["pair_psnr"]["series"]] == ["PSNR in dB", "PSNR in dB, untouched"]


def test_without_torchmetrics_it_is_said_before_the_first_step(images, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    flags = ("--data_path", str(images), *HOW, "--output_dir", str(tmp_path / "out"))
    assert train_here(*flags, "--paired_every_steps", "2") == 2
    errors = capsys.readouterr().err
    assert "--paired_every_steps" in errors
    assert "pip install 'jit_accel[eval]'" in errors
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert train_here(*flags) == 0  # where nobody asks for scores there are none
    assert not measured(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--paired_every_steps", "5"), "there are none: add --condition_from"),
        (("--paired_every_steps", "5", "--condition_from", "grey"), "there are none: add --holdout"),
        (("--paired_every_steps", "-1"), "--paired_every_steps -1: must be 0 or more"),
        (("--paired_images", "0"), "--paired_images 0: must be at least 1"),
        (("--eval_every_steps", "5", "--condition_from", "grey"), "--eval_every_steps 5: draws images without a con"),
    ],
)
def test_settings_that_do_not_fit_are_refused(images, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_of_a_stream_are_scored_as_those_of_a_folder(run, images, tmp_path):
    _, out = run
    data = as_parquet(images, tmp_path / "tables", 2)
    assert train_here("--data_path", str(data), *HOW, "--output_dir", str(tmp_path / "out")) == 0
    assert measured(tmp_path / "out")[4][3:] == pytest.approx(measured(out)[4][3:], rel=1e-6)


def test_a_stop_is_heeded_within_the_scoring_which_a_resume_makes_up_for(run, tmp_path, monkeypatch):
    flags, out = run
    values, calls = PairQuality.values, []

    def stop_within(self):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(None)
        return values(self)

    monkeypatch.setattr(PairQuality, "values", stop_within)
    assert train_here(*flags, "--output_dir", str(tmp_path / "out")) == 128 + signal.SIGTERM
    assert (len(calls), measured(tmp_path / "out")) == (1, {})
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--resume", "auto") == 0
    assert measured(tmp_path / "out") == measured(out)


@pytest.mark.multiprocess
def test_scoring_that_fails_on_one_process_costs_its_values_alone(images, tmp_path):
    flags = ("--data_path", str(images), *HOW, "--output_dir", str(tmp_path / "out"))
    group = Group(flags, tmp_path / "log.txt", 2, {"TEST_SETUP": "test_pair_quality:_fail_on_one"})
    assert group.wait() == [0, 0], group.output()
    assert group.output().count("step 2 is not evaluated, and training goes on: process 1: OutOfMemoryError") == 1
    assert list(measured(tmp_path / "out")) == [4]


def _fail_on_one():
    call, calls = PairScores.__call__, []

    def fail_once(self, *pair):
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == 2:  # the first one is of the untouched conditions
            raise torch.OutOfMemoryError("no memory")
        return call(self, *pair)

    PairScores.__call__ = fail_once


def test_labels_are_those_of_the_network_that_an_adapter_stands_on(images, tmp_path):
    """Whose classes may be more, and in another order."""
    base, some = tmp_path / "base", tmp_path / "some"
    how = ("--condition_from", "grey", "--ema_decays", "0.5", "--warmup_steps", "0")
    assert train_here("--data_path", str(images), *how, "--max_steps", "2", "--output_dir", str(base)) == 0
    for folder in sorted(images.iterdir())[2:]:
        shutil.copytree(folder, some / folder.name)
    flags = ("--data_path", str(some), *how, "--init_from", str(base), "--lora_rank", "1", "--max_steps", "1")
    seen, draw = [], SampleSheets.draw

    def noted(self, path):
        seen.append(set(self.labels))
        return draw(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleSheets, "draw", noted)
        patch.setattr(PairQuality, "values", lambda self: seen.append(set(self.labels)) or {})
        flags += ("--holdout", "0.3", "--output_dir", str(tmp_path / "out"))
        assert train_here(*flags) == 0
    assert seen == [{2, 3}, {2, 3}]


def test_pictures_with_numbers_are_scored_with_both(tmp_path, capsys):
    root, out = clothes(tmp_path / "clothes"), tmp_path / "out"
    files = sorted(root.rglob("*.png"))
    lines = [{"file_name": f.relative_to(root).as_posix(), "label": f.parent.name} for f in files]
    lines = [line | {"weight": n / 3} for n, line in enumerate(lines)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--data_path", str(root), *HOW, "--vector_column", "weight", "--learning_rate", "0.1")
    assert train_here(*flags, "--output_dir", str(out)) == 0
    source = open_images(root, vector_column=("weight",))
    pipe, (rest, held) = jit.load(out), split_holdout(source, 0.3, max_images=1024, img_size=28)
    conditions = degradation_of("downscale:4")(held.images / 127.5 - 1, held.keys)
    how = {"labels": held.labels.tolist(), "conditions": (conditions + 1) / 2, "num_inference_steps": 2}
    vectors = rest.vectors.restored(held.vectors.numpy()).tolist()
    scores, found = PairScores(), measured(out)[4][:3]
    made, without = (jit.generate(pipe, held.keys.tolist(), vectors=some, **how) for some in (vectors, None))
    assert scores(made, held.images).mean(0).tolist() == pytest.approx(found, rel=1e-5)
    assert scores(without, held.images).mean(0).tolist() != pytest.approx(found, rel=1e-5)
    flags = (
        "--model",
        str(out),
        "--pairs",
        str(root),
        "--num_inference_steps",
        "2",
        "--mixed_precision",
        "no",
        "--output",
    )
    with in_fresh_accelerate():
        assert evaluate([*flags, str(tmp_path / "found.json")]) == 0
    (_, record), sums = json.loads((tmp_path / "found.json").read_text()), []
    for part, _ in open_pairs(str(root), ConditionConfig("downscale:4"), pipe, 28, 99).parts(64, 0, 1):
        assert len(part.vectors) == 44
        how |= {"labels": part.labels, "conditions": part.conditions, "vectors": part.vectors}
        sums.append(scores(jit.generate(pipe, part.keys.tolist(), **how), part.truths))
    assert record["metrics"]["psnr"] == pytest.approx(float(torch.cat(sums).mean(0)[0]), rel=1e-5)
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"weight": [1, 2]}) for line in lines))
    with in_fresh_accelerate():
        assert evaluate([*flags, str(tmp_path / "found.json")]) == 2
    assert "--pairs" in capsys.readouterr().err


def test_a_dry_run_counts_the_time_of_scores(run, tmp_path, capsys):
    flags, _ = run
    outlooks = []
    for more in (("--paired_every_steps", "0"), ("--paired_every_steps", "1", "--num_inference_steps", "500")):
        assert train_here(*flags, *more, "--dry_run", "--output_dir", str(tmp_path / "out")) == 0
        outlooks.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Ahead:")))
    assert "to sample and measure" in outlooks[1]
    assert not (tmp_path / "out").exists()


def test_what_a_bridge_restores_is_scored_and_does_not_depend_on_noise(images, tmp_path):
    out = tmp_path / "out"
    flags = ("--data_path", str(images), *HOW, "--path", "bridge")
    assert train_here(*flags, "--output_dir", str(out)) == 0
    found = measured(out)[4]
    assert all(np.isfinite(found))
    file = tmp_path / "found.json"
    flags = ("--model", str(out), "--pairs", str(images), "--samples_each", "2", "--num_inference_steps", "2")
    with in_fresh_accelerate():
        assert evaluate([*flags, "--output", str(file)]) == 0
    by_row = {record["scored"]: record["metrics"] for record in json.loads(file.read_text())}
    assert by_row["sample"] == pytest.approx(by_row["mean of 2"], rel=1e-6)


def test_trackers_get_the_scores_of_their_steps(images, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    flags = ("--data_path", str(images), *HOW, "--report_to", "tensorboard", "--output_dir", str(out))
    assert train_here(*flags) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = [EventAccumulator(str(file)).Reload() for file in out.rglob("events.out*")]
    events = next(one for one in found if "train/loss" in one.Tags()["scalars"])
    for place, key in enumerate(KEYS):
        shown = {event.step: event.value for event in events.Scalars(key)}
        assert shown == pytest.approx({step: values[place] for step, values in measured(out).items()}, rel=1e-5)
