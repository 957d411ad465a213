"""Checkpoints of several processes: each writes what it holds and reads what it needs, whatever their number."""

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import Group, flip_a_bit, state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import guarded
from jit_accel.model import checkpointer as saving
from jit_accel.model.checkpointer import Checkpointer
from jit_accel.model.checkpoints import complete_checkpoints, load_parts, load_tensors, sound_checkpoint
from jit_accel.model.tensor_files import StoredTensor
from jit_accel.train.state import NamedTensors

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
# Rows that no number of processes divides, fewer rows than processes, a column, no dimension at all.
SHAPES = {"w": (7, 3), "few": (2, 5), "row": (1, 9), "b": (11,), "count": ()}
MESHES = {"1": (1,), "2": (2,), "3": (3,), "4": (4,), "2x2": (2, 2)}


def whole(part: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(part))
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"half": torch.randn(5, 4, generator=generator).bfloat16()}


def held(values: dict[str, torch.Tensor], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """What this process holds: matrices and vectors sharded, and replicated over the first dimension of two."""
    if shape == (1,):
        return {name: value.clone() for name, value in values.items()}
    mesh = init_device_mesh("cpu", shape)
    how = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return {name: distribute_tensor(v.clone(), mesh, how) if v.ndim else v.clone() for name, v in values.items()}


def _save(flags: list[str]) -> int:
    mesh, folder = flags
    accelerator = Accelerator()
    shape = MESHES[mesh]
    assert accelerator.num_processes == torch.Size(shape).numel()
    parts = {part: NamedTensors(held(whole(part), shape)) for part in ("model", "ema_0.9")}
    Checkpointer(accelerator, Path(folder), 2).save(5, parts | {"run": SimpleNamespace(state_dict=lambda: {"n": 1})})
    return 0


def _load(flags: list[str]) -> int:
    accelerator = Accelerator()
    processes, *folders = flags
    assert accelerator.num_processes == int(processes)
    shape, read, get = (int(processes),), [], StoredTensor.__getitem__

    def get_noted(self, slices):
        read.append(get(self, slices))
        return read[-1]

    StoredTensor.__getitem__ = get_noted
    for folder in folders:
        path = sound_checkpoint(accelerator, Path(folder), "auto")
        blank = {part: held({n: t * 0 for n, t in whole(part).items()}, shape) for part in ("model", "ema_0.9")}
        read.clear()
        assert load_parts(path, {part: NamedTensors(tensors) for part, tensors in blank.items()}) == 5
        mine = [t.to_local() if isinstance(t, DTensor) else t for tensors in blank.values() for t in tensors.values()]
        assert sum(t.nbytes for t in read) == sum(t.nbytes for t in mine)
        for part, tensors in blank.items():
            for name, value in whole(part).items():
                found = tensors[name].full_tensor() if isinstance(tensors[name], DTensor) else tensors[name]
                assert torch.equal(found, value), (folder, part, name)
    return 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same tensors, saved by other numbers of processes."""
    folder = tmp_path_factory.mktemp("saved")
    for mesh, shape in MESHES.items():
        count = torch.Size(shape).numel()
        group = Group(
            [mesh, str(folder / mesh)], folder / "log", count, {"TEST_MAIN": "test_sharded_checkpoints:_save"}
        )
        assert group.wait() == [0] * count, group.output()
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_what_any_number_of_processes_saved_any_number_loads_bit_for_bit(saved, tmp_path, processes):
    """And each reads no more than what it holds."""
    folders = [str(saved / mesh) for mesh in MESHES]
    environment = {"TEST_MAIN": "test_sharded_checkpoints:_load"}
    group = Group([str(processes), *folders], tmp_path / "log", processes, environment)
    assert group.wait() == [0] * processes, group.output()


@pytest.mark.multiprocess
@pytest.mark.parametrize("mesh", MESHES)
def test_each_value_is_written_once_and_readable_by_safetensors_alone(saved, mesh):
    expected = {f"{part}/{name}": tensor for part in ("model", "ema_0.9") for name, tensor in whole(part).items()}
    found = state(saved / mesh)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (path,) = complete_checkpoints(saved / mesh / "checkpoints")
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    count = torch.Size(MESHES[mesh]).numel()
    writers = 3 if mesh == "2x2" else count  # of two replicas one writes; the other one's share is the scalars
    assert len(list(path.glob("model*"))) in (writers, writers - 1)
    data = sum(tensor.nbytes for tensor in expected.values())
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in path.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) == data + headers
    for name, tensor in whole("model").items():
        assert torch.equal(load_tensors(path, "model", "model")[name], tensor)


@pytest.mark.multiprocess
def test_a_lost_or_damaged_share_of_one_process_is_seen(saved, tmp_path):
    shutil.copytree(saved / "3", tmp_path / "run")
    (path,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    file = max(path.glob("ema_0.9*"))
    flip_a_bit(file)
    with pytest.raises(UserError, match=f"{file.name} is not what was written"):
        sound_checkpoint(ALONE, tmp_path / "run", "auto")
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        sound_checkpoint(ALONE, tmp_path / "run", "auto")


class Gate:
    """Lets writing begin when it is opened."""

    def __init__(self, monkeypatch):
        self.opened, write = threading.Event(), saving.write_tensors

        def write_when_opened(path, pieces):
            assert self.opened.wait(60)
            return write(path, pieces)

        monkeypatch.setattr(saving, "write_tensors", write_when_opened)


def test_what_changes_while_a_checkpoint_is_written_is_not_in_it(tmp_path, monkeypatch):
    """And nothing waits for the disk but the next checkpoint, and who asks."""
    gate, weights = Gate(monkeypatch), {"w": torch.arange(6.0), "b": torch.ones(2, 2)}
    run = {"n": [1]}
    checkpointer = Checkpointer(ALONE, tmp_path, 2)
    checkpointer.begin(5, {"model": NamedTensors(weights), "run": SimpleNamespace(state_dict=lambda: run)})
    checkpointer.wait_for_copies()
    weights["w"].zero_()
    weights["b"].fill_(float("nan"))
    run["n"].append(2)
    assert checkpointer.finish_if_written() is None
    assert complete_checkpoints(tmp_path / "checkpoints") == []
    gate.opened.set()
    path = checkpointer.finish()
    assert path == tmp_path / "checkpoints" / "step_00000005"
    found = load_tensors(path, "model", "model")
    assert torch.equal(found["w"], torch.arange(6.0))
    assert torch.equal(found["b"], torch.ones(2, 2))
    assert json.loads((path / "state.json").read_text())["run"] == {"n": [1]}
    assert checkpointer.finish() is None


def test_what_fails_behind_ones_back_is_raised_at_the_next_look(tmp_path, monkeypatch):
    weights, checkpointer = {"w": torch.ones(3)}, Checkpointer(ALONE, tmp_path, 2)
    good = checkpointer.save(1, {"model": NamedTensors(weights)})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_tensors", full)
        checkpointer.begin(2, {"model": NamedTensors(weights)})
        deadline = time.monotonic() + 60
        with pytest.raises(UserError, match=rf"step 2 cannot be written .*No space left.*make room.*{good}"):
            while time.monotonic() < deadline:
                checkpointer.finish_if_written()
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert checkpointer.save(3, {"model": NamedTensors(weights)}).is_dir()


def test_nothing_is_written_where_another_has_taken_the_folder_over(tmp_path, monkeypatch):
    """Be that before a checkpoint, or while it is being written; what the other one writes stays as it is."""
    weights, checkpointer = {"w": torch.ones(3)}, Checkpointer(ALONE, tmp_path, 2)
    parts = {"model": NamedTensors(weights), "ema_auto": NamedTensors(weights)}
    theirs, is_lost, write = tmp_path / "checkpoints" / "tmp_step_00000002", [], saving.write_tensors

    def check():
        if is_lost:
            raise UserError("has taken this folder over")

    def write_and_lose(path, pieces):
        written = write(path, pieces)
        lose()
        return written

    def lose():
        is_lost.append(True)
        shutil.rmtree(theirs, ignore_errors=True)
        theirs.mkdir(parents=True)
        (theirs / "state.json").write_text("theirs")

    monkeypatch.setattr(saving, "write_tensors", write_and_lose)
    with guarded(tmp_path, check):
        for _ in range(2):
            with pytest.raises(UserError, match="has taken this folder over"):
                checkpointer.save(2, parts)
            assert [path.name for path in theirs.iterdir()] == ["state.json"]
            assert (theirs / "state.json").read_text() == "theirs"


def test_what_is_being_written_is_waited_for_where_something_else_fails(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError), Checkpointer(ALONE, tmp_path, 2) as checkpointer:
        checkpointer.begin(7, {"model": NamedTensors({"w": torch.ones(3)})})
        threading.Timer(0.2, gate.opened.set).start()
        raise ZeroDivisionError
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000007"]


@pytest.mark.gpu
def test_copies_of_a_gpu_are_those_of_their_moment_though_nobody_waits(tmp_path):
    weights = {"w": torch.full((4096, 4096), 3.0, device="cuda"), "n": torch.ones((), device="cuda")}
    checkpointer = Checkpointer(ALONE, tmp_path, 2)
    for step in (1, 2):
        checkpointer.begin(step, {"model": NamedTensors(weights)})
        checkpointer.wait_for_copies()
        weights["w"] += 1
        found = load_tensors(checkpointer.finish(), "model", "model")
        assert torch.equal(found["w"], torch.full((4096, 4096), 2.0 + step))
