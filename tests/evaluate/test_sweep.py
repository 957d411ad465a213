"""Sweeps: which settings a grid holds, which of them win, and that nothing is measured twice."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict

import pytest
from PIL import Image

from jit_accel.base.errors import UserError
from jit_accel.evaluate.drawing import AXES, Setting, grid
from jit_accel.evaluate.flag_values import averages, intervals, numbers
from jit_accel.evaluate.records import edges, write_sweep_files
from jit_accel.evaluate.sweep import Measured, SweepLog, ranked, sweep


def test_a_range_holds_both_ends_and_its_decimals_are_exact():
    scales = numbers("guidance_scale", ["1.0:4.0:0.1"])
    assert scales == [float(f"{i // 10}.{i % 10}") for i in range(10, 41)]
    assert numbers("guidance_scale", ["0:1:0.3"]) == [0.0, 0.3, 0.6, 0.9]
    assert numbers("guidance_scale", ["2:2:1"]) == [2.0]


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        (["2"], [2.0]),
        (["1,1.5,2:3:0.5"], [1.0, 1.5, 2.0, 2.5, 3.0]),
        (["3", "1", "1e0, 2"], [1.0, 2.0, 3.0]),
        (["1:2:0.5,1.5:2:0.25"], [1.0, 1.5, 1.75, 2.0]),
    ],
)
def test_numbers_lists_and_ranges_may_be_mixed(parts, values):
    assert numbers("guidance_scale", parts) == values


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("4:1:0.1", "start <= stop"),
        ("1:4:0", "a step above 0"),
        ("1:4:-1", "a step above 0"),
        ("1:4", "start:stop:step"),
        ("one", "is not a number"),
        ("nan", "is not a number"),
        ("1:inf:1", "is not a number"),
        ("-1", "at least 0"),
        ("0:1:0.000001", "larger step"),
        ("1e400", "is not a number"),
        ("1e-300:1e300:1e-300", "10,000 values: take"),
    ],
)
def test_a_value_that_is_not_a_range_is_refused_with_the_rule(text, rule):
    with pytest.raises(UserError, match=f"guidance_scale.*{rule}"):
        numbers("guidance_scale", [text])


def test_intervals_are_pairs_however_they_are_written():
    assert intervals("guidance_interval", ["0.1:1.0,0:1"]) == [(0.1, 1.0), (0.0, 1.0)]
    assert intervals("guidance_interval", ["0.1:1", "0:1"]) == [(0.1, 1.0), (0.0, 1.0)]
    assert intervals("guidance_interval", ["0.1", "1.0"]) == [(0.1, 1.0)]
    assert intervals("guidance_interval", ["0.1,1.0"]) == [(0.1, 1.0)]
    for wrong in ("0.1", "1:0.1", "0:2", "a:1", "0:1:2"):
        with pytest.raises(UserError, match=r"guidance_interval.*(low:high|is not a number)"):
            intervals("guidance_interval", [wrong])


def test_averages_are_those_of_the_checkpoint():
    there = ["auto", "0.9996", "0.9999"]
    assert averages("ema", ["all"], there) == there
    assert averages("ema", ["0.99990,model"], there) == ["0.9999", "model"]
    with pytest.raises(UserError, match=r"ema 0\.999: .*auto, 0\.9996, 0\.9999, model, all"):
        averages("ema", ["0.999"], there)


def test_steps_and_methods_are_checked():
    def read(flag, *parts):
        return AXES[flag](flag, parts)

    assert read("num_inference_steps", "10:50:20") == [10, 30, 50]
    with pytest.raises(UserError, match="whole number"):
        read("num_inference_steps", "2.5")
    assert read("method", "Heun,euler") == ["heun", "euler"]
    with pytest.raises(UserError, match="Did you mean 'euler'"):
        read("method", "eular")


def test_a_grid_has_each_setting_once_and_always_the_unguided_one():
    settings = grid(["auto", "model"], [1.0, 2.0, 3.0], [(0.1, 1.0), (0.0, 1.0)], [4], ["heun"], [1.0])
    # without guidance the interval makes no difference
    assert len(settings) == len(set(settings)) == 2 * (2 * 2 + 1)
    assert grid([None], [2.0], [(0.1, 1.0)], [4], ["heun"], [1.0]) == [
        Setting(None, 1.0, None, 4),
        Setting(None, 2.0, (0.1, 1.0), 4),
    ]
    assert len(grid([None], [2.0], [(0.1, 1.0)], [4], ["heun"], [1.0], with_unguided=False)) == 1
    assert [Setting(**json.loads(json.dumps(asdict(setting)))) for setting in settings] == settings


SETTINGS = grid([None], [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], [(0.1, 1.0)], [4], ["heun"], [1.0])


def run(measure, tmp_path, top=2, few=10, all_images=100, select="fid", higher=False, limit=None):
    """A sweep with a log, which may be killed after `limit` measurements; the calls, and the outcome."""
    log, calls = SweepLog(tmp_path / "sweep.jsonl", {"seed": 0}), []

    def counted(setting, count):
        if limit is not None and len(calls) == limit:
            raise KeyboardInterrupt
        calls.append((setting.guidance_scale, count))
        return Measured(setting, count, measure(setting, count))

    sizes = {"sweep_images": few, "num_images": all_images, "top": top}
    try:
        outcome = sweep(
            *(SETTINGS, lambda *place: log.measured(*place, [select], counted)),
            **sizes,
            select=select,
            higher_is_better=higher,
        )
    except KeyboardInterrupt:
        outcome = None
    return calls, outcome


def misleading(setting, count):
    """Few images say 2.5, all say 2."""
    best = 2.4 if count == 10 else 2.0
    return {"fid": 10 + 10 * abs(setting.guidance_scale - best), "is": setting.guidance_scale}


def test_the_best_on_all_images_wins_and_not_the_best_on_few(tmp_path):
    calls, outcome = run(misleading, tmp_path)
    assert [scale for scale, count in calls if count == 10] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert [scale for scale, count in calls if count == 100] == [1.0, 2.0, 2.5]  # the unguided one always
    assert outcome.best.setting.guidance_scale == 2.0
    assert outcome.best_unguided.values["fid"] == 20.0
    assert outcome.not_told_apart == []


def test_higher_may_be_better(tmp_path):
    _, outcome = run(misleading, tmp_path, select="is", higher=True)
    assert outcome.best.setting.guidance_scale == 3.5


def test_few_settings_are_measured_on_all_images_at_once(tmp_path):
    calls, outcome = run(misleading, tmp_path, top=6)
    assert {count for _, count in calls} == {100}
    assert outcome.few == []
    assert run(misleading, tmp_path / "other", few=100)[0] == calls


def test_of_equal_settings_the_cheaper_wins_and_near_ones_are_named(tmp_path):
    _, outcome = run(lambda setting, count: {"fid": 10.0 + (setting.guidance_scale == 2)}, tmp_path, top=3)
    assert outcome.best.setting.is_unguided
    assert [one.setting.guidance_scale for one in outcome.not_told_apart] == [1.5, 2.5]


def test_a_value_that_is_not_a_number_never_wins():
    values = [float("nan"), None, 3.0, float("inf")]
    found = [Measured(setting, 1, {"fid": value}) for setting, value in zip(SETTINGS, values)]
    assert ranked(found, "fid", False)[0].values["fid"] == 3.0
    assert ranked(found, "fid", True)[0].values["fid"] == 3.0


def test_a_sweep_with_a_value_that_is_not_a_number_goes_on(tmp_path):
    def measure(setting, count):
        return {"fid": float("nan") if setting.guidance_scale == 1.5 else setting.guidance_scale, "is": 1.0}

    _, outcome = run(measure, tmp_path, few=100)
    calls, again = run(measure, tmp_path, few=100)
    assert calls == []
    assert again.best == outcome.best
    assert math.isnan(again.full[1].values["fid"])


@pytest.mark.parametrize("limit", [0, 3, 6, 8])
def test_an_interrupted_sweep_goes_on_without_measuring_again(tmp_path, limit):
    whole, expected = run(misleading, tmp_path / "whole")
    first, outcome = run(misleading, tmp_path / "cut", limit=limit)
    assert outcome is None
    with open(tmp_path / "cut" / "sweep.jsonl", "a") if first else open(tmp_path / "unused", "w") as file:
        file.write('{"key": "cut sho')  # killed while it wrote a line
    rest, outcome = run(misleading, tmp_path / "cut")
    assert first + rest == whole
    assert outcome == expected
    assert run(misleading, tmp_path / "cut") == ([], expected)


def test_what_was_measured_in_another_context_is_not_used(tmp_path):
    place = (SETTINGS[0], 10, ["fid"])
    known = SweepLog(tmp_path / "sweep.jsonl", {"seed": 0}).measured(
        *place, lambda *place: Measured(*place, {"fid": 1.0})
    )
    assert SweepLog(tmp_path / "sweep.jsonl", {"seed": 1}).done == {}
    assert SweepLog(tmp_path / "sweep.jsonl", {"seed": 0}).done == {place[:2]: known}


def test_what_lacks_a_wanted_metric_is_measured_again_and_both_are_remembered(tmp_path):

    def swept(select):
        log, calls = SweepLog(tmp_path / "sweep.jsonl", {}), []

        def measure(setting, count):
            calls.append(count)
            return Measured(setting, count, {select: 1.0})

        for setting in SETTINGS[:2]:
            log.measured(setting, 10, [select], measure)
        return len(calls)

    assert [swept(select) for select in ("fid", "kid", "fid", "kid")] == [2, 2, 0, 0]


def two_curves(setting, count):
    """Two averages, of which one is better, and two intervals; few images say too much."""
    best = {"0.9999": 2.0, "auto": 3.0}[setting.ema] + 0.5 * (setting.guidance_interval == (0.1, 1.0))
    floor = {"0.9999": 10, "auto": 8}[setting.ema] + 300 / count
    return {"fid": floor + (setting.guidance_scale - best) ** 2, "inception_score": setting.guidance_scale}


def test_table_plot_and_json_say_the_same(tmp_path):
    settings = grid(["auto", "0.9999"], numbers("", ["1:4:0.5"]), [(0.1, 1.0), (0.0, 1.0)], [4], ["heun"], [1.0])
    sizes = {"sweep_images": 100, "num_images": 1000, "top": 3}
    measure = lambda *place: Measured(*place, two_curves(*place))  # noqa: E731
    outcome = sweep(settings, measure, **sizes, select="fid", higher_is_better=False)
    files = write_sweep_files(outcome, tmp_path, {"model": "mine"})
    assert [path.name for path in files] == ["sweep.json", "sweep.csv", "sweep.md", "sweep.png"]
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert (found["best"]["ema"], found["best"]["guidance_scale"]) == ("auto", 3.0)
    assert found["best"]["fid"] == pytest.approx(8.3)
    assert found["best_unguided"]["guidance_scale"] == 1.0
    assert len(found["few_images"]) == 2 * (2 * 6 + 1)
    with open(tmp_path / "sweep.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["few_images"]) + len(found["all_images"])
    assert [line["guidance_scale"] for line in lines if line["is_best"] == "1"] == ["3.0"]
    table = (tmp_path / "sweep.md").read_text()
    assert len(re.findall(r"^\| \*\*auto\*\* \| \*\*0 to 1\*\* \| \*\*3\*\* .*8\.3", table, re.MULTILINE)) == 1
    assert "Without guidance: 11.3 with EMA 0.9999" in table
    assert Image.open(tmp_path / "sweep.png").format == "PNG"


@pytest.mark.parametrize(("best", "end"), [(9.0, "upper end"), (0.0, "lower end"), (2.0, None)])
def test_a_winner_at_an_end_of_the_range_is_told(tmp_path, best, end):
    settings = grid([None], [0.5, 1.0, 2.0, 3.0], [(0.1, 1.0)], [4], ["heun"], [1.0])
    values = lambda setting, count: Measured(setting, count, {"fid": 1 + abs(setting.guidance_scale - best)})  # noqa: E731
    sizes = {"sweep_images": 2, "num_images": 4, "top": 1}
    assert edges(sweep(settings, values, **sizes, select="fid", higher_is_better=False)) == end
