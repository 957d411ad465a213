"""What all processes of a run do, and end, together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from jit_accel.errors import UserError, common_problem
from jit_accel.signals import StopSignal

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked the program to stop. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def together(accelerator: Accelerator, action: Callable[[], T], stop: StopSignal, on_main: bool = False) -> T | None:
    """Do something on all processes, or on the main one alone while the others wait; return what came of it here.

    Raises:
        UserError, Stopped: on all processes, whichever met something.
    """
    result, problem, bug = None, None, None
    if accelerator.is_main_process or not on_main:
        try:
            result = action()
        except Stopped:
            pass
        except UserError as error:
            problem = str(error)
        except Exception as error:  # the others must not wait for this process
            problem, bug = f"{type(error).__name__}: {error}", error
    problems, numbers = zip(*gather_object([(problem, stop.number)]))
    if bug:
        raise bug
    if on_main:
        problems = [problem for problem in problems if problem] or [None]
    if problem := common_problem(list(problems)):
        raise UserError(problem)
    if number := max(numbers):
        raise Stopped(number)
    return result
