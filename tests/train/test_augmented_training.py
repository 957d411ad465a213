"""Trainings with augmentation: resumed, sampled from, continued, refused where it cannot be."""

import shutil

import pytest
import torch
from helpers import assert_same_state, last_checkpoint, rows, train_here

import jit_accel as jit
from jit_accel.model.transformer import JiTTransformer2DModel


def test_a_network_is_told_in_training_and_samples_as_if_nothing_had_been():
    torch.manual_seed(0)
    sizes = (8, 4, 16, 2, 2, 8)
    network = JiTTransformer2DModel(*sizes, in_context_len=2, in_context_start=1, num_classes=2, augment_size=9)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, numbers = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 9)
    plain = network(x, t).sample
    assert torch.equal(network(x, t, augmentation=torch.zeros(2, 9)).sample, plain)
    assert not torch.allclose(network(x, t, augmentation=numbers).sample, plain)
    without = JiTTransformer2DModel(*sizes, in_context_len=2, in_context_start=1, num_classes=2)
    without.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("augment")})
    assert torch.equal(without(x, t).sample, plain)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--data_path", str(images), "--augment", "0.5", "--save_every_steps", "2", "--keep_checkpoints", "9")
    flags += ("--holdout", "0.2", "--val_every_steps", "2")
    assert train_here(*flags, "--output_dir", str(out), "--max_steps", "4") == 0
    return flags, out


def test_it_is_learnt_resumed_bit_for_bit_and_loaded(run, tmp_path):
    flags, out = run
    pipe = jit.load(last_checkpoint(out))
    assert pipe.transformer.augment_embedder.weight.abs().max() > 0
    assert torch.equal(jit.load(out).transformer.augment_embedder.weight, pipe.transformer.augment_embedder.weight)
    assert "val/loss" in rows(out)[3]
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--resume", "auto") == 0
    assert_same_state(out, tmp_path / "out")


def test_weights_are_gone_on_from_without_and_with_it_and_by_an_adapter(run, images, tmp_path):
    _, out = run
    for name, more in (("plain", ()), ("lora", ("--lora_rank", "2")), ("told", ("--augment", "0.1"))):
        flags = ("--data_path", str(images), "--init_from", str(out), "--max_steps", "1", "--warmup_steps", "0", *more)
        assert train_here(*flags, "--output_dir", str(tmp_path / name)) == 0
        assert hasattr(jit.load(tmp_path / name).transformer, "augment_embedder") == (name == "told")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--augment", "1.5"), "--augment 1.5: must be a share between 0 and 1"),
        (("--augment", "0.1", "--condition_from", "grey"), "--augment 0.1: would change the images and not their"),
        (("--augment", "0.1", "--init_from", "x", "--lora_rank", "2"), "--augment 0.1: needs weights beside those of"),
    ],
)
def test_what_cannot_be_is_refused(images, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err


def test_a_run_goes_on_only_as_it_began(run, tmp_path, capsys):
    flags, out = run
    shutil.copytree(out, tmp_path / "out")
    assert train_here(*flags, "--augment", "0", "--output_dir", str(tmp_path / "out"), "--resume", "auto") == 2
    assert "--augment is 0.0, the checkpoint has 0.5" in capsys.readouterr().err
