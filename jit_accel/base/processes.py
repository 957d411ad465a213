"""What the processes of a run do together, so that none waits for one that has met something."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from jit_accel.base.errors import UserError, common_problem
from jit_accel.base.signals import StopSignal

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked the program to stop. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def together(accelerator, work: Callable[[], T], in_turn: bool = False, stop: StopSignal | None = None) -> T:
    """`work()` on each process, and then what any of them met on all of them; it must not wait for the others.

    Args:
        in_turn: one process a machine goes first, and the others find what it found out in the caches.
        stop: a signal to look at afterwards.

    Raises:
        UserError, Stopped: on all processes, whichever met something.
    """
    result, problem, bug = None, None, None
    try:
        with _in_turn(accelerator) if in_turn else contextlib.nullcontext():
            result = work()
    except Stopped:
        pass  # the signal's number says so
    except UserError as error:
        problem = str(error)
    except Exception as error:  # the others must not wait for this process
        problem, bug = f"{type(error).__name__}: {error}", error
    problems, signals = zip(*gather_object([(problem, stop.number if stop else 0)]))
    if bug:
        raise bug
    if problem := common_problem(list(problems)):
        raise UserError(problem)
    if number := max(signals):
        raise Stopped(number)
    return result


def on_main(accelerator, work: Callable[[], T], stop: StopSignal | None = None) -> T:
    """`work()` of the main process, whose result, `UserError` or `Stopped` all get."""
    outcome, bug = (None, None, 0), None
    if accelerator.is_main_process:
        try:
            outcome = (work(), None, 0)
        except Stopped as stopped:
            outcome = (None, None, stopped.number)
        except UserError as error:
            outcome = (None, str(error), 0)
        except Exception as error:  # the others must not wait for this process
            outcome, bug = (None, f"{type(error).__name__}: {error}", 0), error
    ((result, problem, number),) = broadcast_object_list([outcome])
    if bug:
        raise bug
    if problem:
        raise UserError(problem)
    if stop:
        number = max(gather_object([number or stop.number]))
    if number:
        raise Stopped(number)
    return result


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
def ended(accelerator) -> Iterator[None]:
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
