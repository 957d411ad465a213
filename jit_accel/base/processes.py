"""Work of several processes, where none waits for one that has failed; weights that they share (FSDP2)."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from jit_accel.base.errors import Stopped, StopRequest, UserError, common_error, message_of, shutdown_timeout_s
from jit_accel.base.shared_tables import tables_shared

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of Linux's prctl
TORCHRUN_GRACE_S = 30.0  # unless its environment says otherwise
LAUNCHERS = (b"accelerate", b"accelerate-launch", b"torchrun")  # programs
LAUNCHER_MODULES = (b"accelerate.", b"torch.distributed.")


class Sliceable(Protocol):
    """A tensor, or one that is read only as far as it is asked for."""

    shape: torch.Size

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor: ...


def on_all(accelerator, work: Callable[[], T], in_turn: bool = False, stop: StopRequest | None = None) -> T:
    """Do the work on each process, and raise its `UserError` or `Stopped` on all; it must not wait for the others.

    With `in_turn` one process a machine goes first, and the others find what it found out in the caches and in
    `shared_table`s. `stop` is looked at afterwards.
    """
    return _attempt(accelerator, work, in_turn, stop, common_error)


def on_main(accelerator, work: Callable[[], T], stop: StopRequest | None = None) -> T:
    """Do the work on the main process; all processes get its result, `UserError` or `Stopped`."""
    mine = work if accelerator.is_main_process else lambda: None
    result = _attempt(accelerator, mine, False, stop, lambda problems: problems[0])
    return broadcast_object_list([result])[0] if accelerator.num_processes > 1 else result


def _attempt(accelerator, work: Callable[[], T], in_turn: bool, stop: StopRequest | None, judge: Callable) -> T:
    """Return the result; raise what `judge` makes of the `UserError` or None of each process, a bug, or `Stopped`."""
    result, problem, bug, number = None, None, None, 0
    # One that works alone, such as `measure`, waits for nobody, whatever else is launched.
    is_alone, nothing = accelerator.num_processes == 1, contextlib.nullcontext()
    with tables_shared(accelerator) if in_turn and not is_alone else nothing:
        with accelerator.local_main_process_first() if in_turn else nothing:
            try:
                result = work()
            except Stopped as stopped:
                number = stopped.number
            except UserError as error:
                problem = error
            except Exception as error:  # the others must not wait for this process
                problem, bug = UserError(message_of(error)), error
        ours = [(problem, number or (stop.number if stop else 0))]
        problems, numbers = zip(*(ours if is_alone else gather_object(ours)))
    if bug:
        raise bug
    if max(numbers) and not any(problems):
        raise Stopped(max(numbers))
    if problem := judge(problems):
        problem.everywhere = True
        raise problem
    return result


class SharedStop:
    """A request to stop that all processes heed at the same place, whichever of them has got the signal.

    Each look sends what this process knows, over gloo in a group of its own, and reads what was sent at the look
    before: nobody waits for a device. All processes look equally often.
    """

    def __init__(self, accelerator, request: StopRequest):
        self.request, self.number = request, 0
        self.on_look: Callable[[], None] = lambda: None
        is_alone = accelerator.num_processes == 1
        self._is_sharded = accelerator.distributed_type == DistributedType.FSDP
        self._group = None if is_alone else torch.distributed.new_group(backend="gloo")
        self._sent: tuple[torch.distributed.Work, Tensor] | None = None

    def look(self) -> int:
        """Return the number of a signal that any process had got by its look before this one; 0: none."""
        self.on_look()
        self.number = self.number or (self._exchange() if self._group else self.request.number)
        return self.number

    def look_now(self) -> int:
        """Return the number of a signal that any process has got by now; they wait for each other."""
        self.look()
        return self.look() if self._group else self.number

    @contextlib.contextmanager
    def looking(self, most: int) -> Iterator[Callable[..., None]]:
        """Give a function that looks, and raises `Stopped`, to be called at most so many times in the block.

        A process that fails goes on looking for the others; not with shards (FSDP2), where they wait elsewhere.
        """
        left = most

        def look(*_) -> None:
            nonlocal left
            left -= 1
            if number := self.look():
                raise Stopped(number)

        try:
            yield look
        finally:
            while left > 0 and not self.number and not self._is_sharded:
                left -= 1
                self.look()

    def close(self) -> None:
        """Wait for what was sent last."""
        if self._sent:
            self._sent[0].wait()
            self._sent = None

    def _exchange(self) -> int:
        before, mine = self._sent, torch.tensor(self.request.number)
        maximum = torch.distributed.ReduceOp.MAX
        self._sent = torch.distributed.all_reduce(mine, maximum, self._group, async_op=True), mine
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])


def gather_rows(rows: Tensor, accelerator) -> Tensor:
    """Return the rows (n, ...) of all processes, which may have different numbers of them, on the CPU."""
    rows = rows.cpu()
    return torch.cat(gather_object([rows])) if accelerator.num_processes > 1 else rows


def reshard(network: torch.nn.Module) -> None:
    """Let go of gathered weights, which FSDP2 keeps after a forward until a backward; without FSDP2 do nothing."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensors(named: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor | None]:
    """Gather sharded tensors; all processes take part, those that `keep` get the values, on the CPU."""
    found = {}
    for name, tensor in named.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = tensor.cpu().contiguous() if keep else None
    return found


def sharded_like(value: Sliceable, reference: Tensor) -> Tensor:
    """Return a whole tensor on the device of `reference`, sharded as that is; of `value` no more is read than that."""
    if not isinstance(reference, DTensor):
        return value[tuple(slice(0, n) for n in value.shape)].to(reference.device)
    if value.shape != reference.shape:
        raise ValueError(f"a tensor has the shape {tuple(value.shape)} in place of {tuple(reference.shape)}")
    offset, shape = block_of(reference)
    local = value[tuple(slice(o, o + n) for o, n in zip(offset, shape))].to(reference.device).contiguous()
    how = {"shape": reference.shape, "stride": reference.stride(), "run_check": False}
    return DTensor.from_local(local, reference.device_mesh, reference.placements, **how)


def block_of(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where the block that this process holds of a sharded tensor begins, and its shape."""
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def end_with_launcher() -> None:
    """Let this process get SIGTERM when its launcher is gone, as `accelerate launch` and torchrun leave it else.

    Linux alone can; a parent that is no launcher, such as the shell of `nohup`, may go.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        if is_launcher(Path(f"/proc/{parent}/cmdline").read_bytes()):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # gone meanwhile
                os.kill(os.getpid(), signal.SIGTERM)


def is_launcher(command: bytes) -> bool:
    """Return True for the command line, as in /proc, of a program that starts trainings."""
    words = command.split(b"\0")
    return any(os.path.basename(word) in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in words)


def grace_s() -> float | None:
    """Return how long a launcher waits after SIGTERM before it kills this process; None: nobody kills it.

    Raises `UserError` as `shutdown_timeout_s`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    given = shutdown_timeout_s()
    return TORCHRUN_GRACE_S if given is None else given


@contextlib.contextmanager
def process_group(accelerator) -> Iterator:
    """Give an accelerator to the block, and end its group of processes after it, whatever happens in it."""
    try:
        yield accelerator
    finally:
        if accelerator.num_processes > 1:
            # gloo's threads need the GIL to drop their last results, and destroying the process group (which
            # `end_training` does) waits for them while it holds the GIL: one exit in twenty hung, torch 2.13.
            time.sleep(0.2)
        # Trackers may take a minute to send what is left: a stop asked for meanwhile is too late to mean anything.
        with StopRequest() if accelerator.trackers else contextlib.nullcontext():
            accelerator.end_training()
