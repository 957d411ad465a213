"""The tensors that a process has to write, and copies of them that are made while the training goes on."""

import threading
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from jit_accel.base.processes import block_of
from jit_accel.model.tensor_files import Piece


def pieces_of(state: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Piece]:
    """Return what process `rank` of `ranks` writes of these tensors: its block of sharded ones, its share of others."""
    pieces, given = {}, [0] * ranks
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            places = zip(tensor.device_mesh.get_coordinate(), tensor.placements)
            if tensor.to_local().numel() and not any(at and placed.is_replicate() for at, placed in places):
                pieces[name] = Piece(tensor.to_local().detach(), block_of(tensor)[0], tuple(tensor.shape))
            continue
        writer = given.index(min(given))  # whoever has least to write
        given[writer] += tensor.nbytes
        if writer == rank:
            pieces[name] = Piece.whole(tensor.detach())
    return pieces


class Snapshot:
    """Copies on the CPU of what a process writes, as it was when this was made.

    `take` makes them in a thread; whoever is about to change the tensors calls `wait` before. Of those on a GPU the
    copies are made beside its work, and it is the GPU that waits for them.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Piece]]):
        self.parts = parts
        on_gpu = [piece.values for pieces in parts.values() for piece in pieces.values() if piece.values.is_cuda]
        self.device = on_gpu[0].device if on_gpu else None
        self.begun = torch.cuda.current_stream(self.device).record_event() if on_gpu else None
        self.copied: torch.cuda.Event | None = None
        self.is_under_way = threading.Event()  # all copies are made, or asked for

    def take(self) -> dict[str, dict[str, Piece]]:
        """Return the copies, by part and name."""
        try:
            if self.device is None:
                copies, self.parts = self._copies(), {}
                return copies
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream()) as _:
                torch.cuda.current_stream().wait_event(self.begun)
                copies = self._copies()
                self.copied = torch.cuda.current_stream().record_event()
        finally:
            self.is_under_way.set()
        self.copied.synchronize()
        self.parts = {}  # not before: memory that is let go of would be given to the work that goes on
        return copies

    def _copies(self) -> dict[str, dict[str, Piece]]:
        return {
            part: {name: replace(piece, values=copy_of(piece.values)) for name, piece in pieces.items()}
            for part, pieces in self.parts.items()
        }

    def wait(self) -> None:
        """Return when the tensors may be changed."""
        self.is_under_way.wait()
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU; of a tensor on a GPU one that is there when the stream has come so far."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=tensor.is_cuda)
