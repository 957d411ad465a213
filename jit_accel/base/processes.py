"""Work of several processes, where none waits for one that has failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from jit_accel.base.errors import UserError, common_error, message_of
from jit_accel.base.signals import StopSignal

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked the program to stop. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def on_all(accelerator, work: Callable[[], T], in_turn: bool = False, stop: StopSignal | None = None) -> T:
    """Do the work on each process, and raise on all of them what any of them raised; it must not wait for the others.

    Args:
        in_turn: one process a machine goes first, and the others find what it found out in the caches.
        stop: a signal to look at afterwards.

    Raises:
        UserError, Stopped: on all processes, whichever raised it.
    """
    result, problem, bug = None, None, None
    try:
        with _in_turn(accelerator) if in_turn else contextlib.nullcontext():
            result = work()
    except Stopped:
        pass  # the signal's number says so
    except Exception as error:  # the others must not wait for this process
        problem, bug = _shared(error)
    problems, numbers = zip(*_gathered((problem, stop.number if stop else 0), accelerator))
    _raise_first(bug, common_error(problems), max(numbers))
    return result


def on_main(accelerator, work: Callable[[], T], stop: StopSignal | None = None) -> T:
    """Do the work on the main process; all processes get its result, `UserError` or `Stopped`."""
    outcome, bug = (None, None, 0), None
    if accelerator.is_main_process:
        try:
            outcome = (work(), None, 0)
        except Stopped as stopped:
            outcome = (None, None, stopped.number)
        except Exception as error:  # the others must not wait for this process
            problem, bug = _shared(error)
            outcome = (None, problem, 0)
    if accelerator.num_processes > 1:
        (outcome,) = broadcast_object_list([outcome])
    result, problem, number = outcome
    if stop and not problem:
        number = max(_gathered(number or stop.number, accelerator))
    _raise_first(bug, problem, number)
    return result


def _gathered(item: T, accelerator) -> list[T]:
    """Return the items of all processes; one that works alone waits for nobody, whatever else is launched."""
    return [item] if accelerator.num_processes == 1 else gather_object([item])


def _shared(error: Exception) -> tuple[UserError, Exception | None]:
    """Return what the other processes raise, and what this one raises instead where that is a bug."""
    return (error, None) if isinstance(error, UserError) else (UserError(message_of(error)), error)


def _raise_first(bug: Exception | None, problem: UserError | None, number: int) -> None:
    if bug:
        raise bug
    if problem:
        problem.everywhere = True
        raise problem
    if number:
        raise Stopped(number)


@contextlib.contextmanager
def _in_turn(accelerator) -> Iterator[None]:
    """One process a machine goes first. Each waits exactly once, whatever happens, so that none waits for ever."""
    goes_first = accelerator.is_local_main_process
    if not goes_first:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if goes_first:
            accelerator.wait_for_everyone()


def gather_rows(rows: Tensor, accelerator) -> Tensor:
    """Rows (n, ...) of all processes, which may have different numbers of them, on the CPU."""
    if accelerator.num_processes == 1:
        return rows.cpu()
    rows = rows.to(accelerator.device)
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = accelerator.gather(padded[None]).cpu()
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


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
        with StopSignal() if accelerator.trackers else contextlib.nullcontext():
            accelerator.end_training()
