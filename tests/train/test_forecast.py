"""A run's time and memory are said before it: arithmetic from what one block of the network costs here."""

import contextlib
import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jit_accel.config.groups import OptimConfig
from jit_accel.model.objective import Objective
from jit_accel.model.transformer import build_model
from jit_accel.train import forecast
from jit_accel.train.averages import Ema
from jit_accel.train.forecast import GIB, BlockTrial, StepCost, cost_of_step, outlook, times_due, try_block
from jit_accel.train.occasions import Occasion, due
from jit_accel.train.optimizers import build_optimizers
from jit_accel.train.state import OptimizerState

CPU = torch.device("cpu")
ADAMW = OptimConfig(batch_size=6, ema_decays=("auto",))


def trial_of(network, optim=ADAMW) -> BlockTrial:
    return try_block(network.config, optim.batch_size, CPU, contextlib.nullcontext, optim)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["JiT-Ti/4", "JiT-Ti/7"])
def test_the_memory_of_a_step_is_that_of_its_tensors(model, optimizer):
    """Activations within a tenth, and a block's for what its backward works with; states and gradients exactly."""
    network = build_model(model, img_size=28, num_classes=4)
    optim = OptimConfig(batch_size=6, optimizer=optimizer, ema_decays=("auto",))
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, e, t, labels = torch.zeros(6, 3, 28, 28), torch.ones(6, 3, 28, 28), torch.full((6,), 0.5), torch.zeros(6).long()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = Objective().losses(network, x, t, e, labels).mean()
    activations = sum(size for place, size in kept.items() if place not in weights)
    loss.backward()
    optimizers = build_optimizers(network, optim)
    for each in optimizers:
        each.step()
    gradients = sum(p.grad.nbytes for p in network.parameters())
    tensors = [value for each in optimizers for state in each.state.values() for value in state.values()]
    state = sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor) and tensor.ndim)

    trial = trial_of(network, optim)
    together = cost_of_step(trial, network, optim, 1, stay=True).memory_gib * GIB
    assert (together - gradients - state) * 4 / 5 == pytest.approx(activations, rel=0.1)  # of four blocks
    in_turn = cost_of_step(trial, network, optim, 1, stay=False).memory_gib * GIB
    assert in_turn == pytest.approx(state + max(together - gradients - state, gradients))
    assert cost_of_step(trial, network, optim, 1, stay=True, has_state=True).memory_gib * GIB == pytest.approx(
        together - state
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_copies_that_a_checkpoint_is_written_from_are_counted(optimizer):
    network = build_model("JiT-Ti/7", img_size=28, num_classes=4)
    optim = OptimConfig(batch_size=6, optimizer=optimizer, ema_decays=("auto", "0.9"))
    optimizers, averages = build_optimizers(network, optim), Ema(network, optim.ema_decays)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    for each in optimizers:
        each.step()
    saved = [averages.params, *averages.averages.values(), OptimizerState(network, optimizers).state_dict()]
    size = sum(tensor.nbytes for tensors in saved for tensor in tensors.values() if tensor.ndim)
    for processes in (1, 4):
        accelerator = SimpleNamespace(device=CPU, num_processes=processes)
        assert forecast.copies_gib(network, optim, accelerator) * GIB == pytest.approx(size / processes)
    assert forecast.copies_gib(network, optim, SimpleNamespace(device=torch.device("cuda"), num_processes=1)) == 0


def test_a_trial_draws_nothing_and_leaves_threads_and_modes_alone():
    network = build_model("JiT-Ti/7", img_size=28, num_classes=4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    trial = trial_of(network)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.is_grad_enabled()
    assert min(trial.image_s, trial.update_s, trial.image_bytes) > 0
    assert trial.num_params == sum(p.numel() for p in network.blocks[0].parameters())


def test_a_step_takes_its_images_and_one_update():
    network = build_model("JiT-Ti/7", img_size=28, num_classes=4)
    trial = BlockTrial(image_s=1.0, update_s=0.0, image_bytes=1e6, fixed_bytes=0.0, num_params=100)
    one, four = (cost_of_step(trial, network, ADAMW, micro_steps, stay=True) for micro_steps in (1, 4))
    assert four.seconds == pytest.approx(4 * one.seconds)
    assert one.seconds == pytest.approx(3 * 6 * one.forward_s)
    slow = cost_of_step(dataclasses.replace(trial, update_s=5.0), network, ADAMW, 1, stay=True)
    assert slow.seconds > one.seconds
    assert slow.forward_s == one.forward_s  # an update is no part of a sample
    assert four.memory_gib == one.memory_gib
    assert 6 * 3.5 < one.seconds < 6 * 4.5  # images, and four blocks with what lies around them
    network.enable_gradient_checkpointing()
    less = cost_of_step(trial, network, ADAMW, 1, stay=True)
    assert less.seconds == pytest.approx(one.seconds * 4 / 3)
    assert less.memory_gib < one.memory_gib
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    assert cost_of_step(trial, network, ADAMW, 1, stay=True).seconds == pytest.approx(one.seconds)  # 2 + 1 of 3 passes


@pytest.mark.parametrize("every", [0, 1, 3, 4, 12])
@pytest.mark.parametrize("first", [0, 2, 8])
def test_occasions_are_counted_as_the_loop_meets_them(every, first):
    occasions = [Occasion("x", every, lambda: None)]
    met = sum(len(list(due(occasions, step, 12, is_new=True))) for step in range(first + 1, 13))
    assert times_due(every, first, 12) == met


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0.4 seconds"),
        (80, "80 seconds"),
        (600, "10 minutes"),
        (70 * 3600, "70 hours"),
        (123 * 3600, "5.1 days"),
        (4e8, "4600 days"),
    ],
)
def test_durations_are_said_in_two_digits(seconds, words):
    assert forecast.in_words(seconds) == f"about {words}"


def looked_ahead(cost, device=CPU, **given):
    what = {"steps": 30_000, "forwards": 0.0, "model": "JiT-B/4", "device": device, "processes": 1}
    return outlook(cost, **what | given)


def test_a_run_of_days_on_a_cpu_is_warned_of_with_a_remedy(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line, (warning,) = looked_ahead(StepCost(8.4, 0.3, 5.2))
    assert line == "about 70 hours: 30,000 steps of 8.4 s; about 5.2 GiB of memory"
    assert warning.startswith("30,000 steps of JiT-B/4 on these 2 cores: about 70 hours. ")
    assert "launch/recipes/my_images_cpu.yaml" in warning
    assert looked_ahead(StepCost(1.0, 0.1, 5.2))[1] == []


def test_other_devices_are_no_cpu_and_are_used_for_a_month():
    meta = torch.device("meta")
    assert looked_ahead(StepCost(8.4, 0.3, 5.2), meta)[1] == []
    _, (warning,) = looked_ahead(StepCost(120.0, 0.3, 5.2), meta, processes=8)
    assert warning.startswith("30,000 steps of JiT-B/4 on these 8 metas: about 42 days. Choose fewer --max_steps")
    assert "CPU" not in warning


def test_large_numbers_are_said_without_powers_of_ten():
    line, (_, warning) = looked_ahead(StepCost(123.0, 0.3, 234.0, 123.0), processes=2)
    assert line == "about 43 days: 30,000 steps of 120 s; about 230 GiB of memory in each process"
    assert warning.startswith("about 230 GiB of memory in each process are needed, 120 GiB more than are free")
    assert forecast.in_words(1e7 * 86400) == "about 10000000 days"


def test_samples_count_and_are_named_where_they_take_long():
    line, _ = looked_ahead(StepCost(0.1, 0.1, 1.0), forwards=30_000)
    assert line.startswith("about 1.7 hours: 30,000 steps of 0.1 s, about 50 minutes of it to sample and measure;")
    _, (warning,) = looked_ahead(StepCost(0.1, 1.0, 1.0), forwards=100_000)
    assert "Choose a larger --sample_every_steps, fewer --num_inference_steps, fewer --max_steps" in warning


def test_memory_that_is_not_there_is_warned_of():
    _, (warning,) = looked_ahead(StepCost(0.1, 0.1, 40.0, 9.0))
    assert warning.startswith("about 40 GiB of memory are needed, 9 GiB more than are free: halve --batch_size")
