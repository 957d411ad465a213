"""The training on one page takes the trainer's steps."""

import importlib.util
from pathlib import Path

import torch
from helpers import rows, train_here

import jit_accel as jit

PAGE = Path(__file__).parents[2] / "examples" / "train_on_one_page.py"


def one_page():
    spec = importlib.util.spec_from_file_location("train_on_one_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_first_losses_are_the_trainers(images, tmp_path):
    """Twenty steps of the test trainings' settings (see helpers.TINY), bit for bit."""
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "20", "--model", "JiT-Ti/7")
    assert train_here(*flags) == 0
    page, source = one_page(), jit.open_images(str(images))
    batches = jit.batches(source, img_size=28, batch_size=4, seed=0)
    torch.manual_seed(0)
    network = page.build_network(28, 7, source.num_classes)
    losses = list(page.train(network, batches, steps=20, warmup_steps=2, learning_rate=1e-3))
    assert losses == [row["train/loss"] for row in rows(tmp_path)]
    average = jit.load(str(tmp_path)).transformer.state_dict()
    assert all(torch.equal(weight, average[name]) for name, weight in network.state_dict().items())
