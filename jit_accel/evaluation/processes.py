"""What the processes of an evaluation do together, so that none waits for one that has met something."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from jit_accel.errors import UserError, common_problem

T = TypeVar("T")


def together(accelerator, work: Callable[[], T], in_turn: bool = False) -> T:
    """`work()` on each process, and then what any of them met on all of them; it must not wait for the others.

    Args:
        in_turn: one process a machine goes first, and the others find what it found out in the caches.

    Raises:
        UserError: on all processes.
    """
    result, problem, bug = None, None, None
    is_first = accelerator.is_local_main_process
    if in_turn and not is_first:
        accelerator.wait_for_everyone()
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    except Exception as error:  # the others must not wait for this process
        problem, bug = f"{type(error).__name__}: {error}", error
    if in_turn and is_first:
        accelerator.wait_for_everyone()
    problems = gather_object([problem])
    if bug:
        raise bug
    if problem := common_problem(problems):
        raise UserError(problem)
    return result


def on_main(accelerator, work: Callable[[], T]) -> T:
    """`work()` of the main process, whose result or `UserError` all get."""
    result = together(accelerator, lambda: work() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0]


def gather_rows(rows: Tensor, accelerator) -> Tensor:
    """Rows (n, ...) of all processes, which may have different numbers of them, on the CPU."""
    if accelerator.num_processes == 1:
        return rows.cpu()
    rows = rows.to(accelerator.device)
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = accelerator.gather(padded[None]).cpu()
    return torch.cat([part[:count] for part, count in zip(parts, counts)])
