"""Work of several processes, where none waits for one that has failed."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from jit_accel.base.errors import UserError, common_error, message_of
from jit_accel.base.signals import Stopped, StopRequest

T = TypeVar("T")


def on_all(accelerator, work: Callable[[], T], in_turn: bool = False, stop: StopRequest | None = None) -> T:
    """Do the work on each process, and raise its `UserError` or `Stopped` on all; it must not wait for the others.

    With `in_turn` one process a machine goes first, and the others find what it found out in the caches. `stop` is
    looked at afterwards.
    """
    result, problems = _attempt(accelerator, work, in_turn, stop)
    _raise_everywhere(common_error(problems))
    return result


def on_main(accelerator, work: Callable[[], T], stop: StopRequest | None = None) -> T:
    """Do the work on the main process; all processes get its result, `UserError` or `Stopped`."""
    result, problems = _attempt(accelerator, work if accelerator.is_main_process else lambda: None, False, stop)
    _raise_everywhere(problems[0])
    return broadcast_object_list([result])[0] if accelerator.num_processes > 1 else result


def _attempt(accelerator, work: Callable[[], T], in_turn: bool, stop: StopRequest | None) -> tuple[T, Sequence]:
    """Return the result of the work, and the `UserError` or None of each process; a bug and `Stopped` are raised."""
    result, problem, bug, number = None, None, None, 0
    with accelerator.local_main_process_first() if in_turn else contextlib.nullcontext():
        try:
            result = work()
        except Stopped as stopped:
            number = stopped.number
        except UserError as error:
            problem = error
        except Exception as error:  # the others must not wait for this process
            problem, bug = UserError(message_of(error)), error
    # One that works alone, such as `measure`, waits for nobody, whatever else is launched.
    ours = [(problem, number or (stop.number if stop else 0))]
    problems, numbers = zip(*(gather_object(ours) if accelerator.num_processes > 1 else ours))
    if bug:
        raise bug
    if max(numbers) and not any(problems):
        raise Stopped(max(numbers))
    return result, problems


def _raise_everywhere(problem: UserError | None) -> None:
    if problem is not None:
        problem.everywhere = True
        raise problem


def gather_rows(rows: Tensor, accelerator) -> Tensor:
    """Return the rows (n, ...) of all processes, which may have different numbers of them, on the CPU."""
    rows = rows.cpu()
    return torch.cat(gather_object([rows])) if accelerator.num_processes > 1 else rows


@contextlib.contextmanager
def process_group(accelerator) -> Iterator[None]:
    """End the group of processes after the block, whatever happens in it."""
    try:
        yield
    finally:
        if accelerator.num_processes > 1:
            # gloo's threads need the GIL to drop their last results, and destroying the process group (which
            # `end_training` does) waits for them while it holds the GIL: one exit in twenty hung, torch 2.13.
            time.sleep(0.2)
        # Trackers may take a minute to send what is left: a stop asked for meanwhile is too late to mean anything.
        with StopRequest() if accelerator.trackers else contextlib.nullcontext():
            accelerator.end_training()
