"""Sweeps over the widths of averages that are made after the training."""

from __future__ import annotations

import json
import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import train_here
from PIL import Image

from jit_accel import load
from jit_accel.evaluate import main
from jit_accel.evaluate.drawing import Setting, grid
from jit_accel.evaluate.records import edge_of_widths, with_average, write_sweep_files
from jit_accel.evaluate.sweep import Measured, Outcome
from jit_accel.evaluate.sweep_chart import curves_over_widths

pytestmark = pytest.mark.usefixtures("tiny")
FEW = ("--features", "tiny", "--metrics", "fd", "--num_images", "16", "--sweep_images", "8", "--sweep_top", "2")
FEW += ("--num_inference_steps", "2", "--batch_size", "16", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def trained(tiny, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths") / "run"
    flags = ("--max_steps", "12", "--average_snapshots", "1", "--learning_rate", "4e-3")
    assert train_here("--data_path", str(images), "--output_dir", str(folder), *flags) == 0
    return folder


def evaluate_here(*flags: str) -> int:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        return main(list(flags))
    finally:
        del os.environ["ACCELERATE_USE_CPU"]


def test_the_best_width_becomes_the_pipelines_weights(trained, images, capsys):
    flags = ("--model", str(trained), "--reference", str(images), *FEW)
    flags += ("--ema_width", "0.05:0.2:0.05", "--ema", "auto", "--guidance_scale", "1,2", "--method", "heun,euler")
    assert evaluate_here(*flags) == 0
    found = json.loads((trained / "sweep" / "sweep.json").read_text())
    names = ["width_0.05", "width_0.1", "width_0.15", "width_0.2"]
    assert {one["ema"] for one in found["few_images"]} == {"auto", *names}
    assert len(found["few_images"]) == 5 * 2 * 2
    assert Image.open(trained / "sweep" / "sweep.png").size[0] > 800
    best = found["best"]["ema"]
    assert f"EMA {best.replace('_', ' ')}" in capsys.readouterr().out

    assert evaluate_here(*flags[:-8], "--ema_width", "0.15:0.2:0.05") == 0  # known, and a width wins
    best = json.loads((trained / "sweep" / "sweep.json").read_text())["best"]["ema"]
    weights = load(trained / "pipeline").transformer.state_dict()
    made = load(trained, ema=best).transformer.state_dict()
    assert all(torch.equal(weights[name], made[name]) for name in made)
    card = (trained / "pipeline" / "README.md").read_text()
    sentence = f"Weights: power-function average of relative width {best[6:]}. The samples above are of decay `auto`: "
    assert sentence in card
    assert "Weights: moving average with decay `auto`. The samples above: " in with_average(card, "auto")


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ("0.3", "--ema_width 0.3: must be 0.001 or more and below 0.288"),
        ("0:0.2:0.1", "--ema_width 0: must be 0.001 or more"),
        ("wide", "--ema_width wide: 'wide' is not a number"),
        ("0.05:0.2", "--ema_width 0.05:0.2: a range is start:stop:step"),
        ("0.002,0.1", "--ema_width 0.002: what is stored of 12 steps gives its profile with an error of"),
    ],
)
def test_widths_that_cannot_be_are_refused_before_anything_is_measured(trained, images, capsys, widths, message):
    flags = ("--model", str(trained), "--reference", str(images), *FEW, "--ema_width", widths)
    assert evaluate_here(*flags) == 2
    assert message in capsys.readouterr().err


def test_widths_belong_to_a_model(images, capsys):
    assert evaluate_here("--images", str(images), "--reference", str(images), *FEW[:10], "--ema_width", "0.1") == 2
    assert "--ema_width 0.1: says how --model makes images" in capsys.readouterr().err


def outcome_of(best: float) -> Outcome:
    settings = grid(["auto", *(f"width_{w}" for w in (0.05, 0.1, 0.15))], [1.5], [None], [10], ["heun"], [1.0])
    values = [abs(float((one.ema or "")[6:] or 0.4) - best) + (not one.is_unguided) for one in settings]
    return Outcome("fd", False, [], [Measured(one, 8, {"fd": value}) for one, value in zip(settings, values)])


@pytest.mark.parametrize(("best", "end"), [(0.05, "lower end"), (0.1, None), (0.15, "upper end"), (0.4, None)])
def test_a_winner_at_an_end_of_the_widths_is_pointed_out(best, end):
    assert edge_of_widths(outcome_of(best)) == end


def test_the_chart_is_over_widths_and_a_decay_is_a_level_line(tmp_path):
    outcome = outcome_of(0.1)
    curves = curves_over_widths(outcome.full, outcome)
    assert list(curves) == ["EMA auto, no guidance", "EMA auto, guidance 1.5", "no guidance", "guidance 1.5"]
    assert [x for x, _ in curves["no guidance"]] == [0.05, 0.1, 0.15]
    (left, first), (right, second) = curves["EMA auto, no guidance"]
    assert (left, right) == (0.05, 0.15)
    assert first == second
    write_sweep_files(outcome, tmp_path, {})
    assert str(Setting("width_0.05")).startswith("EMA width 0.05, ")
