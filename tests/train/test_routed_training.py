"""Networks and trainings whose tokens skip the middle blocks."""

import shutil

import pytest
import torch
from helpers import assert_same_state, rows, state, train_group, train_here

from jit_accel.config.presets import PRESETS, routed_blocks
from jit_accel.model.transformer import JiTTransformer2DModel


def network_of(start: int, **more) -> JiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"in_context_len": 3, "in_context_start": start, "num_classes": 2, **more}
    network = JiTTransformer2DModel(8, 2, 16, 6, 2, 8, **sizes)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network


X, T, LABELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7]), None


@pytest.mark.parametrize(("name", "blocks"), [("JiT-Ti", (1, 3)), ("JiT-B", (2, 8)), ("JiT-L", (4, 16))])
def test_the_routed_blocks_of_a_size(name, blocks):
    assert routed_blocks(PRESETS[name].depth) == range(*blocks)


@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize("inject", [None, "add", "tokens"])
def test_a_network_that_keeps_all_tokens_is_itself(start, inject):
    more = {"condition_channels": 1, "condition_inject": inject} if inject else {}
    network = network_of(start, **more)
    given = {"condition_image": X[:, :1]} if inject else {}
    plain = network(X, T, LABELS, **given).sample
    torch.testing.assert_close(network(X, T, LABELS, kept_tokens=torch.arange(16), **given).sample, plain)
    assert not torch.allclose(network(X, T, LABELS, kept_tokens=torch.arange(0, 16, 2), **given).sample, plain)


@pytest.mark.parametrize("start", [0, 2, 5])
def test_kept_tokens_keep_their_positions_and_the_others_skip_the_blocks(start):
    """Held against the blocks called one by one, where those that are left out are hidden by what they hold."""
    network, kept, seen = network_of(start), torch.tensor([1, 4, 5, 11]), {}
    routed = routed_blocks(6)
    hooks = [
        block.register_forward_hook(lambda _, given, found, i=i: seen.__setitem__(i, (*given, found)))
        for i, block in enumerate(network.blocks)
    ]
    network(X, T, LABELS, kept_tokens=kept)
    for hook in hooks:
        hook.remove()
    before, after = seen[routed.start - 1][-1][:, -16:], seen[routed.stop][0][:, -16:]
    others = [i for i in range(16) if i not in kept]
    assert torch.equal(after[:, others], before[:, others])
    assert torch.equal(seen[routed.start][0][:, -4:], before[:, kept])
    assert torch.equal(after[:, kept], seen[routed.stop - 1][-1][:, -4:])
    whole, partial = seen[routed.stop][2], seen[routed.stop - 1][2]
    rows_of = [*range(len(whole[0]) - 16), *(len(whole[0]) - 16 + kept).tolist()] if start < 5 else None
    for table, full in zip(partial, whole):
        expected = full[rows_of] if rows_of else full[-16:][kept]
        assert torch.equal(table, expected)
    lengths = [seen[i][0].shape[1] for i in range(6)]
    assert lengths == [(4 if i in routed else 16) + (3 if i >= start else 0) for i in range(6)]


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        network = network_of(2)
        if checkpointing:
            network.enable_gradient_checkpointing()
        network(X, T, LABELS, kept_tokens=torch.tensor([0, 3, 9])).sample.square().mean().backward()
        found.append(network.blocks[2].attn.qkv.weight.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


ROUTED = ("--token_routing", "0.5", "--model", "JiT-Ti/7", "--save_every_steps", "2", "--keep_checkpoints", "9")


def test_a_training_is_resumed_bit_for_bit(images, tmp_path, capsys):
    flags = ("--data_path", str(images), *ROUTED, "--holdout", "0.2", "--augment", "0.2", "--max_steps", "4")
    assert train_here(*flags, "--output_dir", str(tmp_path / "out")) == 0
    assert "--token_routing is for images of 256 tokens and more; these have 16" in capsys.readouterr().err
    shutil.copytree(tmp_path / "out", tmp_path / "on", ignore=shutil.ignore_patterns("step_00000004*", "pipeline"))
    assert train_here(*flags, "--output_dir", str(tmp_path / "on"), "--resume", "auto") == 0
    assert_same_state(tmp_path / "out", tmp_path / "on")
    assert "val/loss" in rows(tmp_path / "on")[3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--token_routing", "1"), "--token_routing 1: must be in [0, 1)"),
        (("--token_routing", "0.5", "--aux_loss", "layersync=0.2"), "--token_routing 0.5: leaves tokens out that"),
    ],
)
def test_what_cannot_be_is_refused(images, tmp_path, capsys, flags, message):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "out"), *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize("fsdp2", [False, True])
def test_processes_and_micro_steps_come_to_the_same(images, tmp_path, fsdp2):
    flags = ("--data_path", str(images), *ROUTED, "--augment", "0.3", "--batch_size", "2", "--max_steps", "3")
    for name, processes, micro_steps in (("one", 1, "4"), ("two", 2, "2")):
        environment = {"TEST_FSDP2_PRECISION": "no"} if fsdp2 and processes > 1 else {}
        more = ("--gradient_accumulation_steps", micro_steps, "--output_dir", str(tmp_path / name))
        train_group(tmp_path, *flags, *more, num_processes=processes, environment=environment)
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.items():
        if name.startswith("model/"):
            assert torch.allclose(two[name], tensor, atol=1e-4), name
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-4)
