"""Laws of a training that hold on each kind of device: the same body runs on the CPU, and on GPUs where there are some.

`python -m pytest -m gpu tests` runs those that need one; `bash benchmarks/gpu.sh` does so, too.
"""

import json
import os
import shutil
import time

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import DEVICES, DEVICES_OF_TWO, Group, assert_same_state, on_device, rows, state, train_group, train_here
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

from jit_accel.model import snapshots
from jit_accel.model.checkpointer import Checkpointer
from jit_accel.monitor.metrics import local_part
from jit_accel.train import build
from jit_accel.train.accelerator import use_torchs_scaler
from jit_accel.train.trainer import Trainer

on_each = pytest.mark.parametrize("device", DEVICES)
on_two_of_each = pytest.mark.parametrize("device", DEVICES_OF_TWO)
# Of kernels in bf16 and fp16, whose rounding is relative to the largest.
ROUNDING = {"no": 1e-5, "bf16": 0.03, "fp16": 0.01}


def choose_deterministic_kernels():
    """Choose kernels that give the same bits each time; conftest.py prepares cuBLAS for them."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def deterministic():
    choose_deterministic_kernels()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Train in this process, in the folder of a name, and return that."""

    def start(device, name, *flags, **environment):
        if device == "cpu" and "fp16" in flags:
            allow_fp16(monkeypatch)
        where = ("--data_path", str(images), "--output_dir", str(tmp_path / name))
        assert train_here(*where, *flags, **on_device(device), **environment) == 0
        return tmp_path / name

    return start


def allow_fp16(patch):
    """Let the CPU do what Accelerate leaves to GPUs: fp16 with a gradient scaler, of the kind that it would take."""

    def build_scaling(precision, *others):
        accelerator = made("no", *others)
        accelerator.state._mixed_precision, accelerator.native_amp = precision, True
        accelerator.scaler = get_grad_scaler(accelerator.distributed_type, device="cpu")
        use_torchs_scaler(accelerator)
        return accelerator

    def get_grad_scaler(kind, device):
        return (ShardedGradScaler if kind == DistributedType.FSDP else torch.amp.GradScaler)(device=device)

    made = build.build_accelerator
    patch.setattr(build, "build_accelerator", build_scaling)


def overflow(patch):
    """Let a gradient of step 3 overflow in one number; where processes share it, in the share of the last one."""
    clip = Trainer._clip_gradients

    def overflowing(self):
        gradient = self.network.x_embedder.proj2.weight.grad
        if self.step == 2 and (not isinstance(gradient, DTensor) or self.accelerator.is_last_process):
            local_part(gradient).view(-1)[0] = torch.inf
        return clip(self)

    patch.setattr(Trainer, "_clip_gradients", overflowing)


def overflow_in_each_process():
    patch = pytest.MonkeyPatch()
    if os.environ["ACCELERATE_USE_CPU"] == "true":
        allow_fp16(patch)
    overflow(patch)


def losses(output_dir):
    return [row["train/loss"] for row in rows(output_dir)]


def scale_at(output_dir, step):
    return json.loads((output_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["scaler"]["scale"]


@on_each
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, tmp_path, device, precision, optimizer):
    if (precision, optimizer) == ("fp16", "muon"):
        pytest.skip("is refused")
    how = ("--mixed_precision", precision, "--optimizer", optimizer, "--save_every_steps", "3", "--proj_dropout", "0.1")
    whole = train(device, "whole", *how)
    shutil.copytree(whole / "checkpoints/step_00000003", tmp_path / "part/checkpoints/step_00000003")
    part = train(device, "part", *how, "--resume", "auto")
    assert_same_state(part, whole)
    assert rows(part) == rows(whole)[3:]
    assert all(tensor.dtype == torch.float32 for tensor in state(whole).values())


@on_each
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_as_float32_within_rounding(train, device, precision):
    exact, low = train(device, "exact"), train(device, "low", "--mixed_precision", precision)
    assert losses(low) == pytest.approx(losses(exact), rel=ROUNDING[precision])
    assert losses(low) != losses(exact)


@on_each
def test_fp16_skips_the_step_whose_gradients_overflow_and_halves_the_scale(train, tmp_path, monkeypatch, device):
    """And goes on from there after a resume as without one."""
    overflow(monkeypatch)
    how = ("--mixed_precision", "fp16", "--save_every_steps", "1", "--keep_checkpoints", "9")
    whole = train(device, "whole", *how)
    before, skipped, after = (state(whole, step) for step in (2, 3, 4))
    trained = [name for name in before if name.startswith(("model/", "optimizer/"))]
    assert [name for name in trained if not torch.equal(before[name], skipped[name])] == []
    assert any(not torch.equal(skipped[name], after[name]) for name in trained)
    assert [scale_at(whole, step) for step in (2, 3, 6)] == [65536.0, 32768.0, 32768.0]
    assert [row["step"] for row in rows(whole) if row["train/grad_norm"] in (float("inf"), None)] == [3]
    shutil.copytree(whole / "checkpoints/step_00000003", tmp_path / "part/checkpoints/step_00000003")
    assert_same_state(train(device, "part", *how, "--resume", "auto"), whole)


@on_each
def test_a_checkpoint_is_of_its_step_though_the_training_goes_on_while_it_is_copied(train, monkeypatch, device):
    """The copies are late, on a GPU by its own work before them: what they are made of must not have changed."""
    expected, begin, copy_of = {}, Checkpointer.begin, snapshots.copy_of

    def begin_noted(self, step, parts):
        tensors = [(name, part.state_dict()) for name, part in parts.items() if part]
        for part, found in tensors:
            expected.update(
                ((step, f"{part}/{name}"), tensor.detach().cpu().clone())
                for name, tensor in found.items()
                if isinstance(tensor, torch.Tensor)
            )
        begin(self, step, parts)

    def copy_late(tensor):
        if tensor.is_cuda:
            torch.cuda._sleep(2_000_000)
        else:
            time.sleep(0.001)
        return copy_of(tensor)

    monkeypatch.setattr(Checkpointer, "begin", begin_noted)
    monkeypatch.setattr(snapshots, "copy_of", copy_late)
    out = train(device, "run", "--save_every_steps", "1", "--keep_checkpoints", "9", "--max_steps", "4")
    for step in range(1, 5):
        found = state(out, step)
        assert found.keys() == {name for at, name in expected if at == step}
        assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[step, name])] == []


@on_each
def test_a_compiled_training_is_the_eager_one_within_rounding_whatever_the_batches(train, monkeypatch, device):
    """Samples have other batches than the training, with guidance and at the end: none is one too many to compile."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    how = ("--batch_size", "12", "--sample_every_steps", "2", "--guidance_scale", "2", "--max_steps", "3")
    compiler = {"ACCELERATE_DYNAMO_BACKEND": "EAGER" if device == "cpu" else "INDUCTOR"}
    eager, compiled = train(device, "eager", *how), train(device, "compiled", *how, **compiler)
    torch._dynamo.reset()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)
    one, other = state(eager), state(compiled)
    assert all(torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in one.items())


@pytest.mark.multiprocess
@on_two_of_each
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_as_one_with_copies_and_with_shards(images, tmp_path, device, optimizer):
    """DDP and FSDP2, over NCCL on GPUs; and shards go on bit for bit."""
    flags = ["--data_path", str(images), "--optimizer", optimizer, "--save_every_steps", "3", "--resume", "auto"]
    flags += ["--keep_checkpoints", "9", "--sample_every_steps", "2"]

    def run(name, processes, *more, fsdp2=False):
        where = ("--output_dir", str(tmp_path / name))
        environment = on_device(device, fsdp2) | {"TEST_SETUP": "test_devices:choose_deterministic_kernels"}
        train_group(tmp_path, *flags, *where, *more, num_processes=processes, environment=environment)
        return tmp_path / name

    alone = run("alone", 1, "--gradient_accumulation_steps", "2")
    both = {fsdp2: run(f"fsdp2_{fsdp2}", 2, fsdp2=fsdp2) for fsdp2 in (False, True)}
    for out in both.values():
        assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
        found = state(out)
        assert all(torch.allclose(tensor, found[name], atol=1e-4) for name, tensor in state(alone).items())
    for fsdp2, out in both.items():
        part = tmp_path / f"part_{fsdp2}"
        shutil.copytree(out / "checkpoints/step_00000003", part / "checkpoints/step_00000003")
        assert_same_state(run(part.name, 2, fsdp2=fsdp2), out)


@pytest.mark.multiprocess
@on_two_of_each
@pytest.mark.parametrize("fsdp2", [False, True])
def test_fp16_skips_a_step_on_all_processes_whichever_holds_what_overflows(images, tmp_path, device, fsdp2):
    out, environment = (
        tmp_path / "run",
        on_device(device, fsdp2) | {"TEST_SETUP": "test_devices:overflow_in_each_process"},
    )
    flags = (
        "--data_path",
        str(images),
        "--output_dir",
        str(out),
        "--mixed_precision",
        "fp16",
        "--save_every_steps",
        "1",
    )
    train_group(tmp_path, *flags, "--keep_checkpoints", "9", num_processes=2, environment=environment)
    before, skipped, after = (state(out, step) for step in (2, 3, 4))
    trained = [name for name in before if name.startswith(("model/", "optimizer/"))]
    assert [name for name in trained if not torch.equal(before[name], skipped[name])] == []
    assert any(not torch.equal(skipped[name], after[name]) for name in trained)
    assert [scale_at(out, step) for step in (2, 3, 6)] == [65536.0, 32768.0, 32768.0]


SUBNORMAL = 2**20  # the bits of 1.5e-39


def add_up_subnormal_numbers():
    """Let a training add up such a number over its processes, as gradients are, and fail where the sum is not zero."""

    def train(config, accelerator, *_) -> int:
        number = torch.tensor([SUBNORMAL], dtype=torch.int32).view(torch.float32)
        torch.distributed.all_reduce(number)
        return int(number.view(torch.int32).item() != 0)

    build._train = train


@pytest.mark.multiprocess
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor keeps them always")
def test_denormals_are_flushed_where_gradients_are_added_up_over_processes(images, tmp_path):
    """gloo adds them up in threads of its own, which take the mode that there was when they began."""
    flags, setup = ["--data_path", str(images), "--output_dir", str(tmp_path / "run")], "add_up_subnormal_numbers"
    group = Group(flags, tmp_path / "log", 2, {"TEST_SETUP": f"test_devices:{setup}"})
    assert group.wait() == [0, 0], group.output()
