"""What is measured, against values worked out by other means."""

import json
import math

import numpy as np
import pytest
import torch

from jit_accel.base.devices import peak_flops
from jit_accel.model.transformer import build_model
from jit_accel.monitor import metrics
from jit_accel.monitor.metrics import EpochMetrics, StepClock, StepMetrics, WeightWatch
from jit_accel.train.averages import Ema

CPU = torch.device("cpu")


def by_t(row):
    return {key.removeprefix("train/loss_by_t/"): value for key, value in row.items() if "loss_by_t" in key}


def recorded(batches, counters=()):
    steps = StepMetrics(CPU)
    for step, (t, losses) in enumerate(batches, 1):
        steps.record_by_t(t, losses)
        steps.record(step, 0.1, losses.mean(), torch.tensor(2.0))
    return steps.flush(lambda values: values, list(counters))


def test_losses_by_t_are_the_means_of_the_images_in_each_tenth():
    generator = torch.Generator().manual_seed(0)
    t, losses = torch.rand(2, 5, 40, generator=generator)
    rows, counters = recorded(zip(t, losses), (3.0, 4.0))
    assert counters == [3.0, 4.0]
    assert [bool(by_t(row)) for row in rows] == [False] * 4 + [True]
    expected = {f"{i / 10:.1f}-{(i + 1) / 10:.1f}": losses[(t * 10).floor() == i].mean().item() for i in range(10)}
    assert by_t(rows[-1]) == pytest.approx(expected)


def test_the_ends_of_t_have_a_bin_and_empty_bins_have_no_key():
    t, losses = torch.tensor([0.0, 1.0, 0.55]), torch.tensor([1.0, 2.0, 3.0])
    rows, _ = recorded([(t, losses)])
    assert by_t(rows[0]) == {"0.0-0.1": 1.0, "0.9-1.0": 2.0, "0.5-0.6": 3.0}


def test_nothing_of_an_interval_is_left_for_the_next():
    steps = StepMetrics(CPU)
    for loss in (1.0, 5.0):
        steps.record_by_t(torch.tensor([0.5]), torch.tensor([loss]))
        steps.record(1, 0.1, torch.tensor(loss), torch.tensor(2.0))
        rows, _ = steps.flush(lambda values: values, [])
        assert by_t(rows[0]) == {"0.5-0.6": loss}
    assert steps.flush(lambda values: values, [7.0]) == ([], [7.0])


def test_update_ratio_and_distance_of_the_average_are_what_they_say():
    torch.manual_seed(0)
    model = build_model("JiT-Ti/7", img_size=28, num_classes=3)
    ema = Ema(model, ["0.9"])
    watch = WeightWatch(ema.params, ema.averages, model.config.depth)
    names = {name for name, p in model.named_parameters() if any(p is weight for weight in watch.weights)}
    assert {name.split(".")[1] for name in names} == {"0", "2", "3"}  # of four blocks
    assert all(f"blocks.{i}.mlp.w12.weight" in names for i in (0, 2, 3))

    before, copies = {name: p.detach().clone() for name, p in ema.params.items()}, watch.copy()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=1e-3)
    ema.update(1)
    steps = StepMetrics(CPU)
    steps.record(1, 0.1, torch.tensor(1.0), torch.tensor(2.0))
    watch.record(steps, copies)
    ((row,), _) = steps.flush(lambda values: values, [])

    def norm(tensors):
        return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))

    size = norm(ema.params[name].detach() for name in names)
    moved = norm(ema.params[name].detach() - before[name] for name in names)
    trail = norm(ema.params[name].detach() - ema.averages["0.9"][name] for name in names)
    assert row["train/update_ratio"] == pytest.approx(moved / size, rel=1e-4)
    assert row["ema/0.9/distance"] == pytest.approx(trail / size, rel=1e-4)


def test_histograms_count_what_numpy_counts():
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.nn.Parameter(torch.randn(*shape, generator=generator))
        for name, shape in (("wide", (30, 40)), ("one", (1,)))
    }
    params["zero"] = torch.nn.Parameter(torch.zeros(5))
    params["wide"].grad = torch.rand(30, 40, generator=generator)
    found = metrics.histograms_of(params, "all")
    assert list(found) == ["gradients/wide", "parameters/wide", "parameters/one", "parameters/zero"]
    for name, tensor in (("parameters/wide", params["wide"].detach()), ("gradients/wide", params["wide"].grad)):
        low, high, *counts = found[name].tolist()
        expected, edges = np.histogram(tensor.double().numpy(), metrics.HISTOGRAM_BINS)
        assert (low, high) == (edges[0], edges[-1])
        assert sum(counts) == 1200
        assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 1  # one that float32 puts beside an edge
    assert found["parameters/zero"].tolist()[:3] == [0, 0, 5]
    assert list(metrics.histograms_of(params, "gradients")) == ["gradients/wide"]


def epoch_rows(epochs, steps, batch=8):
    rows = [{"step": step, "train/loss": 10.0 / step} for step in steps]
    for row in rows:
        epochs.add(row, 0.5, batch)
    return rows, ["train/epoch_loss" in row for row in rows]


def test_the_time_of_all_starts_is_counted_where_it_was_from_the_first_on():
    first, second, old = EpochMetrics(44), EpochMetrics(44), EpochMetrics(44)
    epoch_rows(first, range(1, 5))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    epoch_rows(second, range(5, 7))
    assert (first.elapsed_s, second.elapsed_s) == (2.0, 3.0)
    state = first.state_dict()
    del state["elapsed_s"]  # of a version that did not count it
    old.load_state_dict(state)
    epoch_rows(old, range(5, 7))
    assert old.elapsed_s is None


def test_an_epoch_ends_with_the_step_that_completes_it():
    rows, ended = epoch_rows(EpochMetrics(44), range(1, 12))
    # 44 images are complete within the sixth batch of 8, 88 with the eleventh
    assert [row["step"] for row, is_end in zip(rows, ended) if is_end] == [6, 11]
    first, second = rows[5], rows[10]
    assert first["train/epoch_loss"] == pytest.approx(sum(10 / s for s in range(1, 7)) / 6)
    assert second["train/epoch_loss"] == pytest.approx(sum(10 / s for s in range(7, 12)) / 5)
    assert (first["train/epoch_time"], second["train/epoch_time"]) == (3.0, 2.5)
    assert first["train/samples_per_second"] == pytest.approx(6 * 8 / 3.0)
    assert second["train/best_loss"] == second["train/epoch_loss"]
    assert all("train/epoch_loss" not in row for row in rows if row not in (first, second))
    assert [row["train/images_seen"] for row in rows] == [8 * step for step in range(1, 12)]
    assert [row["train/epoch"] for row in rows] == [8 * step / 44 for step in range(1, 12)]


def test_the_best_loss_never_rises():
    epochs = EpochMetrics(8)
    losses = [3.0, 1.0, 2.0, 0.5]
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
    for row in rows:
        epochs.add(row, 1.0, 8)
    assert [row["train/best_loss"] for row in rows] == [3.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("interrupted_after", range(1, 12))
def test_epoch_metrics_go_on_from_their_state(interrupted_after):
    whole, _ = epoch_rows(EpochMetrics(44), range(1, 12))
    epochs = EpochMetrics(44)
    one, _ = epoch_rows(epochs, range(1, interrupted_after + 1))
    resumed = EpochMetrics(44)
    resumed.load_state_dict(json.loads(json.dumps(epochs.state_dict())))
    other, _ = epoch_rows(resumed, range(interrupted_after + 1, 12))
    assert one + other == whole


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_epochs_go_on_where_the_batch_changes(batch):
    epochs = EpochMetrics(44)
    rows, _ = epoch_rows(epochs, range(1, 10))  # 72 images
    later, ended = epoch_rows(epochs, range(10, 40), batch)
    found = [row["train/epoch"] for row in rows + later]
    assert found == sorted(found)
    end = later[ended.index(True)]
    assert 88 <= end["train/images_seen"] < 88 + batch
    images = end["train/images_seen"] - 48  # since the end of the first epoch
    steps = 3 + ended.index(True) + 1
    assert end["train/samples_per_second"] == pytest.approx(images / (0.5 * steps))


def test_pauses_belong_to_the_epoch_but_not_to_the_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = StepClock(CPU)
    for pause_s in (0.0, 5.0, 0.0):
        now[0] += 2.0
        clock.tick()
        with clock.pause():
            now[0] += pause_s
    now[0] += 0.5  # the device finishes
    durations_s, trained_s = clock.end_interval()
    assert durations_s == [2.0, 2.0, 7.5]
    assert trained_s == pytest.approx(6.5)
    with clock.pause():  # between two intervals
        now[0] += 50.0
    assert clock.end_interval() == ([], 0.0)
    now[0] += 2.0
    clock.tick()
    durations_s, trained_s = clock.end_interval()
    assert (durations_s, trained_s) == ([52.0], pytest.approx(2.0))


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "no", None),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA RTX A4000", "bf16", None),  # not an A40
        ("NVIDIA RTX A1000 Laptop GPU", "bf16", None),
        ("NVIDIA T400", "fp16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA A10G", "bf16", 70e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),  # has none
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("cpu", "bf16", None),
    ],
)
def test_peaks_are_told_only_where_they_are_known(device, precision, peak):
    assert peak_flops(device, precision) == peak
