"""Muon's steps: what they do to one matrix, and that they are the same where processes share its rows."""

import math

import pytest
import torch
from accelerate import Accelerator
from helpers import DEVICES, Group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from jit_accel.train import muon
from jit_accel.train.muon import SCALES, Bucket, Map, Muon, buckets_of, maps_of, orthogonalise

# qkv, the two halves of SwiGLU, wide and square ones; some with fewer rows than processes, or rows that do not divide.
SHAPES = [(24, 8), (42, 8), (8, 21), (8, 8), (7, 11), (2, 5), (24, 8)] * 2


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalised_matrix_keeps_its_directions_and_levels_its_scales(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrix)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    in_its_basis = left.mT @ result @ right.mT
    scales = in_its_basis.diagonal(dim1=-2, dim2=-1)
    # Five iterations cannot lift what is next to nothing.
    assert scales[singular > 0.05 * singular.max()].min() > 0.6
    assert scales.max() < 1.3
    torch.testing.assert_close(in_its_basis, torch.diag_embed(scales), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [2, 16])
def test_the_short_way_for_wide_matrices_is_the_iteration(rank):
    """Of full rank and of a low one, whose vanishing singular values must not come up."""
    torch.manual_seed(0)
    wide = torch.randn(3, 16, rank) @ torch.randn(3, rank, 40)
    x = wide.double() / wide.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    rounding = 3.4445**5 * 2**-23  # as much as five steps enlarge what lies near zero
    torch.testing.assert_close(orthogonalise(wide), x.float(), atol=2 * rounding, rtol=0)
    torch.testing.assert_close(orthogonalise(wide.mT), x.mT.float(), atol=2 * rounding, rtol=0)


def test_a_stack_of_maps_is_split_into_them():
    def maps(*shape):
        return [each.target.shape for each in maps_of(torch.empty(shape), torch.empty(shape))]

    assert maps(3 * 8, 8) == [(8, 8)] * 3  # q, k, v
    assert maps(2 * 21, 8) == [(21, 8)] * 2  # SwiGLU
    assert maps(8, 21) == [(8, 21)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("columns", [24, 40])
def test_muon_steps_like_torch_where_nothing_is_stacked(device, columns, scale, rows):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(rows, columns, device=device))
    theirs = nn.Parameter(ours.detach().clone())
    a = Muon([ours], lr=0.02, weight_decay=0.1, scale=scale)
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn=scale)
    for _ in range(5):
        gradient = torch.randn(rows, columns, device=device)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    # Theirs iterates in bf16, with three significant digits.
    moved = 0.02 * 0.2 * math.sqrt(columns) * 5
    torch.testing.assert_close(ours, theirs, atol=0.03 * moved, rtol=0)
    assert not torch.equal(a.state[ours]["momentum_buffer"], torch.zeros_like(ours))


def _step_both(flags: list[str]) -> int:
    """Take steps with whole and with sharded matrices, of the same gradients, on `copies` x `shards` processes."""
    copies, shards, bucket_bytes = map(int, flags)
    Accelerator()  # which makes the processes a group
    mesh = init_device_mesh("cpu", (copies, shards))
    muon.BUCKET_BYTES = bucket_bytes
    torch.manual_seed(0)

    def sharded(tensor):
        return distribute_tensor(tensor.detach().clone(), mesh, [Replicate(), Shard(0)])

    whole = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    shared = [nn.Parameter(sharded(weight)) for weight in whole]
    alone, together = Muon(whole, lr=0.02, weight_decay=0.1), Muon(shared, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for weight, share in zip(whole, shared):
            weight.grad = torch.randn(weight.shape)
            share.grad = sharded(weight.grad)
        whole[3].grad = shared[3].grad = None  # as of a weight that the loss does not reach
        alone.step()
        together.step()
    for weight, share in zip(whole, shared):
        torch.testing.assert_close(share.full_tensor(), weight.detach(), atol=1e-6, rtol=0)
        if weight.grad is not None:
            momentum = together.state[share]["momentum_buffer"]
            assert momentum.placements == share.placements
            assert torch.equal(momentum.full_tensor(), alone.state[weight]["momentum_buffer"])
    return 0


@pytest.mark.multiprocess
@pytest.mark.parametrize(("copies", "shards"), [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("bucket_bytes", [1, 2**25])
def test_a_step_of_shared_matrices_is_that_of_whole_ones(tmp_path, copies, shards, bucket_bytes):
    """Whatever of a map a process holds, and however many travel at once."""
    flags, count = [str(copies), str(shards), str(bucket_bytes)], copies * shards
    group = Group(flags, tmp_path / "log", count, {"TEST_MAIN": "test_muon:_step_both"})
    assert group.wait() == [0] * count, group.output()


def _step_copies(flags: list[str]) -> int:
    """Take steps alone, and with copies of the same weights in the other processes."""
    processes = Accelerator().num_processes
    muon.BUCKET_BYTES, iterated = int(flags[0]), []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(muon, "orthogonalise", lambda x, steps: iterated.append(len(x)) or orthogonalise(x, steps))
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    copied = [nn.Parameter(weight.detach().clone()) for weight in whole]
    alone = Muon(whole, lr=0.02, weight_decay=0.1)
    together = Muon(copied, lr=0.02, weight_decay=0.1, copies=torch.distributed.group.WORLD)
    for _ in range(3):
        for weight, copy in zip(whole, copied):
            weight.grad = torch.randn(weight.shape)
            copy.grad = weight.grad.clone()
        whole[3].grad = copied[3].grad = None  # as of a weight that the loss does not reach
        alone.step()
        all_of_them = sum(iterated)
        iterated.clear()
        together.step()
        assert all_of_them // processes <= sum(iterated) <= -(-all_of_them // processes)
        iterated.clear()
    for weight, copy in zip(whole, copied):
        torch.testing.assert_close(copy, weight, atol=1e-6, rtol=0)
        of_each = [torch.empty_like(copy) for _ in range(processes)]
        torch.distributed.all_gather(of_each, copy.detach())
        assert all(torch.equal(each, copy) for each in of_each)
        if weight.grad is not None:
            assert torch.equal(together.state[copy]["momentum_buffer"], alone.state[weight]["momentum_buffer"])
    return 0


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 2**25])
def test_processes_with_the_same_matrices_share_the_iterations_of_a_step(tmp_path, processes, bucket_bytes):
    """Each iterates its part of them, and all have the same weights bit for bit, those of a step alone."""
    group = Group([str(bucket_bytes)], tmp_path / "log", processes, {"TEST_MAIN": "test_muon:_step_copies"})
    assert group.wait() == [0] * processes, group.output()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_iterations_are_dealt_out_evenly(monkeypatch, ranks):
    monkeypatch.setattr(muon, "BUCKET_BYTES", 5 * 4 * 8 * 8)  # five square maps
    held, nothing = (8,) + (0,) * (ranks - 1), torch.empty(8, 8)
    square = [Map(nothing, nothing, (8, 8), held, None)] * 48
    wide = [Map(nothing, nothing, (8, 21), held, None)] * 13
    owned = []
    monkeypatch.setattr(Bucket, "__init__", lambda self, maps, owners: owned.append(owners))
    buckets_of([square, wide])
    counts = [sum(owners.count(rank) for owners in owned) for rank in range(ranks)]
    assert sum(counts) == 61
    assert max(counts) - min(counts) <= 1
    if ranks > 1:
        assert max(owners.count(rank) for owners in owned for rank in range(ranks)) <= 5
