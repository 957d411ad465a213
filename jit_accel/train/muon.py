"""Muon: momentum whose updates are orthogonalised, matrix by matrix, by processes that share the work (DDP, FSDP2)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single
from torch.distributed.tensor import DTensor, Shard

from jit_accel.base.devices import has_bf16
from jit_accel.monitor.metrics import local_part

# Coefficients of the quintic by Jordan et al., which trades exactness for slope at 0.
A, B, C = 3.4445, -4.7750, 2.0315
# By what the update of a map (rows, columns) is scaled, under torch's names.
SCALES: dict[str, Callable[[int, int], float]] = {
    # RMS of an AdamW step is about 0.2 (Liu et al., arXiv 2502.16982).
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),  # Jordan et al.
}
BUCKET_BYTES = 2**25  # of the matrices that a process gathers at once; three buckets are under way


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024).

    `scale` is the `adjust_lr_fn` of `torch.optim.Muon`, from which it differs in two ways: matrices of one shape go
    through the iteration as a single batch, and a matrix that stacks several square or wide maps (the fused
    qkv, the two halves of SwiGLU) is orthogonalised map by map. The iteration runs in bf16 on GPUs that are good at
    it, else in float32.

    Of sharded matrices the maps are dealt out to the processes that share them: each gets its maps whole, bucket by
    bucket, iterates, and sends the rows back to those who hold them. Of whole matrices, which `copies` hold with the
    same gradients, each iterates its maps and sends them to all. Momentum and decay need no other process.
    """

    def __init__(
        self,
        params,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ns_steps: int = 5,
        copies: ProcessGroup | None = None,
        scale: str = "match_rms_adamw",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})
        self.scale_of = SCALES[scale]
        self.copies = copies if copies and copies.size() > 1 else None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_kind: dict[tuple, list[Map]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum, gradient = local_part(self.state[p]["momentum_buffer"]), local_part(p.grad)
                momentum.lerp_(gradient, 1 - group["momentum"])
                nesterov = gradient.lerp(momentum, group["momentum"])
                for each in maps_of(p, nesterov, self.copies):
                    by_kind.setdefault((each.shape, each.processes), []).append(each)
            for bucket in iterated(buckets_of(by_kind.values()), group["ns_steps"]):
                targets = [each.target for each in bucket.maps]
                rate = group["lr"] * self.scale_of(*bucket.shape)
                if group["weight_decay"]:
                    torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(targets, bucket.updates(targets[0].dtype), alpha=-rate)
        return loss


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of (N, rows, columns) by about 1 (between 0.7 and 1.2)."""
    x = matrices.to(iteration_dtype(matrices.device))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if x.dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2):
        x = product_of_steps(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


def product_of_steps(gram: Tensor, steps: int) -> Tensor:
    """Return the factor (N, rows, rows) by which so many steps multiply a matrix, from its product with its transpose.

    All are polynomials of that product, and commute: a wide matrix takes part twice instead of twice a step. Not for
    bf16, which the square of the singular values is too coarse for.
    """
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return product


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on GPUs that are good at it; a CPU that is would round otherwise than one that is not."""
    return torch.bfloat16 if device.type == "cuda" and has_bf16(device) else torch.float32


def stacked_maps(rows: int, columns: int) -> int:
    """Return how many maps a tall (out, in) weight stacks: 3 of qkv, 2 of SwiGLU; else 1."""
    if rows == 3 * columns:
        return 3
    return 2 if rows > 3 * columns and rows % 2 == 0 else 1


@dataclass(frozen=True)
class Map:
    """A map that a weight holds, or one of those it stacks: this process's rows of it, and of its update."""

    target: Tensor  # (held rows, columns), a view of the weight
    update: Tensor  # as the target
    shape: tuple[int, int]  # of all rows
    held: tuple[int, ...]  # rows that each process holds, from the top; or all rows, where each holds a copy
    processes: ProcessGroup | None  # that hold the rows; None: this one alone


def maps_of(weight: Tensor, update: Tensor, copies: ProcessGroup | None = None) -> Iterator[Map]:
    """Yield the maps of a weight (rows, columns), and what this process has of their update, as of the weight."""
    rows, columns = weight.shape
    processes, rank, ranges = holders_of(weight, copies)
    height, target = rows // stacked_maps(rows, columns), local_part(weight)
    for top in range(0, rows, height):
        held = [range(max(top, each.start), min(top + height, each.stop)) for each in ranges]
        mine = slice(held[rank].start - ranges[rank].start, held[rank].start - ranges[rank].start + len(held[rank]))
        yield Map(target[mine], update[mine], (height, columns), tuple(map(len, held)), processes)


def holders_of(weight: Tensor, copies: ProcessGroup | None) -> tuple[ProcessGroup | None, int, list[range]]:
    """Return the processes that hold rows of a weight, the number of this one, and the rows of each."""
    if not isinstance(weight, DTensor):
        rows = [range(weight.shape[0])]
        return (copies, copies.rank(), rows * copies.size()) if copies else (None, 0, rows)
    mesh, (dim,) = weight.device_mesh, [i for i, each in enumerate(weight.placements) if each.is_shard(0)]
    blocks = [Shard.local_shard_size_and_offset(weight.shape[0], mesh.size(dim), i) for i in range(mesh.size(dim))]
    return mesh.get_group(dim), mesh.get_local_rank(dim), [range(first, first + size) for size, first in blocks]


class Bucket:
    """Maps of one shape that the processes that hold them iterate together, each those that it owns."""

    def __init__(self, maps: Sequence[Map], owners: Sequence[int]):
        by_owner = sorted(zip(owners, maps), key=lambda pair: pair[0])
        self.maps, self.shape, self.processes = [each for _, each in by_owner], maps[0].shape, maps[0].processes
        self.is_copied = sum(maps[0].held) > self.shape[0]
        ranks = range(len(maps[0].held))
        rank = self.processes.rank() if self.processes else 0
        self.mine = [each for owner, each in by_owner if owner == rank]
        # Numbers that this process sends to each one before the iteration, and gets from each; afterwards vice versa.
        self.given = [sum(each.update.numel() for owner, each in by_owner if owner == to) for to in ranks]
        self.taken = [sum(each.held[of] for each in self.mine) * self.shape[1] for of in ranks]

    def gather(self) -> None:
        """Begin to send this process's rows to the owners of their maps, unless these have all of them."""
        if self.processes and not self.is_copied:
            rows = torch.cat([each.update.flatten() for each in self.maps])
            self._send(rows.to(iteration_dtype(rows.device)), self.given, self.taken)

    def iterate(self, steps: int) -> None:
        """Orthogonalise the maps of this process, and begin to send the rows to those who hold them."""
        if not self.processes:
            self.rows = orthogonalise(torch.stack([each.update for each in self.maps]), steps).flatten()
            return
        if self.is_copied:
            whole = [each.update for each in self.mine]
            matrices = torch.stack(whole) if whole else self.maps[0].update.new_empty(0, *self.shape)
            self._send(orthogonalise(matrices, steps).flatten().repeat(len(self.taken)), self.taken, self.given)
            return
        self.work.wait()
        pieces = [of_one.split(self._sizes(rank)) for rank, of_one in enumerate(self.rows.split(self.taken))]
        whole = [piece for of_map in zip(*pieces) for piece in of_map]
        matrices = torch.cat(whole).view(-1, *self.shape) if whole else self.rows.new_empty(0, *self.shape)
        results = [each.split(each_map.held) for each, each_map in zip(orthogonalise(matrices, steps), self.mine)]
        rows = [piece.flatten() for of_rank in zip(*results) for piece in of_rank]
        self._send(torch.cat(rows) if rows else self.rows.new_empty(0), self.taken, self.given)

    def updates(self, dtype: torch.dtype) -> list[Tensor]:
        """Return what the iteration made of this process's rows, map by map."""
        if self.processes:
            self.work.wait()
        rows, self.rows, self.sent = self.rows.to(dtype), None, None
        sizes = [each.update.numel() for each in self.maps]
        return [update.view_as(each.update) for update, each in zip(rows.split(sizes), self.maps)]

    def _sizes(self, rank: int) -> list[int]:
        return [each.held[rank] * self.shape[1] for each in self.mine]

    def _send(self, rows: Tensor, given: list[int], taken: list[int]) -> None:
        self.rows, self.sent = rows.new_empty(sum(taken)), rows  # which must live until it has arrived
        self.work = all_to_all_single(self.rows, rows, taken, given, self.processes, async_op=True)


def buckets_of(maps_by_kind: Iterable[Sequence[Map]]) -> list[Bucket]:
    """Return the maps in buckets, where each process owns as many as any other, or one more."""
    buckets, dealt = [], 0
    for maps in maps_by_kind:
        ranks, size = len(maps[0].held), len(maps)
        if ranks > 1:
            size = ranks * max(1, BUCKET_BYTES // (4 * math.prod(maps[0].shape)))
        for begin in range(0, len(maps), size):
            part = maps[begin : begin + size]
            buckets.append(Bucket(part, [(dealt + i) % ranks for i in range(len(part))]))
            dealt += len(part)
    return buckets


def iterated(buckets: Sequence[Bucket], steps: int) -> Iterator[Bucket]:
    """Yield each bucket after its iteration, while which the rows of its neighbours travel."""
    for following, bucket, done in zip([*buckets, None, None], [None, *buckets, None], [None, None, *buckets]):
        if following:
            following.gather()
        if bucket:
            bucket.iterate(steps)
        if done:
            yield done
