"""A profile of some steps: a trace that Chrome and Perfetto open, and a table of where their time went."""

import bisect
import contextlib
import gzip
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, supported_activities

from jit_accel.base.console import say, warn
from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, check_guard
from jit_accel.base.spans import span
from jit_accel.config.checks import steps_of

STEP = "step"
OPERATIONS = 12  # rows of the table


class StepProfile:
    """A profile of the steps that a text such as `10:15` means; None: of none.

    Each process writes a trace of its own, and the main one shows the table. What cannot be written costs the trace
    alone.
    """

    def __init__(self, steps: str | None, output_dir: Path, rank: int):
        self.steps = steps_of(steps or "") or range(0)  # that are still to come, or under way
        self.folder, self.rank = output_dir / "profile", rank
        self.profiler: profile | None = None
        self.taken: list[int] = []

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Write what there is, where the training ends amid the steps."""
        try:
            self.close()
        except Exception:
            if error is None:  # which is the one to tell of
                raise

    @contextlib.contextmanager
    def around(self, step: int, pause: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
        """Surround a step, counted from 1, which may be one of those; what happens in a `pause` is no training."""
        if self.steps and step >= self.steps.stop:
            if self.rank == 0:
                warn(f"the run goes on with step {step:,}, behind those of --profile_steps: nothing is profiled.")
            self.steps = range(0)
        if step not in self.steps:
            yield
            return
        if self.profiler is None:
            with pause():
                os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it prints a line at each start and end
                self.profiler = profile(activities=supported_activities())
                self.profiler.start()
        with span(STEP):
            yield
        self.taken.append(step)
        if step == self.steps[-1]:
            with pause():
                self.close()

    def close(self) -> None:
        """Write the steps that were taken, and show them; once."""
        profiler, self.profiler, self.steps = self.profiler, None, range(0)
        if profiler is None:
            return
        profiler.stop()
        if self.rank == 0 and self.taken:
            say(table_of(profiler.events(), len(self.taken)))
        steps = "_to_".join(map(str, sorted({*self.taken[:1], *self.taken[-1:]}))) or "none"
        path = self.folder / f"steps_{steps}_process_{self.rank}.json.gz"
        try:
            write_trace(profiler, path)
        except (OSError, UserError) as error:  # of a folder that another has taken over, all learn at the next reading
            warn(f"the trace {path} cannot be written: {error}")
        else:
            if self.rank == 0:
                size = path.stat().st_size / 1e6
                say(f"Trace: {path} ({size:.1f} MB), for https://ui.perfetto.dev or chrome://tracing")


def write_trace(profiler: profile, path: Path) -> None:
    """Write a trace, compressed. Raises `OSError`, and `UserError` where the folder is another's; the old one stays."""
    check_guard(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # kineto leaves a file beside its target where it fails, and says nothing: so it gets a folder of its own.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trace_") as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        if not plain.exists():
            raise OSError("the disk is full, or the folder may not be written to.")
        with atomic_file(path) as temporary, open(plain, "rb") as source, gzip.open(temporary, "wb", 6) as target:
            shutil.copyfileobj(source, target)


def table_of(events: Iterable[FunctionEvent], count: int) -> str:
    """Return where the time of the first `count` steps went, by spans and by operations, in milliseconds a step.

    On a GPU the kernels count where they were launched, by whatever thread, since the host waits for backward's.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    named = [event for event in events if event.is_user_annotation]
    steps = sorted((event for event in named if event.name == STEP), key=_start)[:count]  # one more may have failed
    parts = [event for event in named if event.cpu_parent in steps]
    spans = {part.name: [0.0, 0.0] for part in sorted(parts, key=_start)}
    operations: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    whole = [0.0, 0.0]
    for totals, found in ((spans, parts), ({STEP: whole}, steps)):
        for event in found:
            totals[event.name][0] += event.time_range.elapsed_us()
    at_step, at_part = _finder(steps), _finder(parts)
    for event in events:
        if event.is_user_annotation or not at_step(event):
            continue
        kernels_us = sum(kernel.duration for kernel in event.kernels)
        part = at_part(event)
        for place in (whole, operations[event.name], *([spans[part.name]] if part else [])):
            place[1] += kernels_us
        operations[event.name][0] += event.self_cpu_time_total
    return _lines(count, whole, spans, operations)


def _start(event: FunctionEvent) -> float:
    return event.time_range.start


def _finder(among: Sequence[FunctionEvent]) -> Callable[[FunctionEvent], FunctionEvent | None]:
    """Return what finds the event among these, which do not overlap, that another one begins in."""
    among = sorted(among, key=_start)
    starts = [_start(event) for event in among]

    def find(event: FunctionEvent) -> FunctionEvent | None:
        place = bisect.bisect_right(starts, _start(event)) - 1
        return among[place] if place >= 0 and _start(event) < among[place].time_range.end else None

    return find


def _lines(steps: int, whole: list[float], spans: dict[str, list[float]], operations: dict[str, list[float]]) -> str:
    """Return the table of these microseconds, each [host, device]."""
    columns = ("host", "device") if whole[1] else ("host",)

    def row(name: str, times: Sequence[float]) -> str:
        cells = (f"{us / 1000 / steps:10.2f} {us / max(of, 1e-9):4.0%}" for us, of, _ in zip(times, whole, columns))
        return f"  {name:<58.58s}" + "".join(cells)

    rest = [total - sum(times) for total, times in zip(whole, zip([0.0, 0.0], *spans.values()))]
    longest = sorted(operations.items(), key=lambda item: item[1][len(columns) - 1], reverse=True)
    head = "".join(f"{f'{name} ms':>10s}     " for name in columns)
    lines = [f"{f'Profile of {steps} steps, a step:':<60s}{head.rstrip()}"]
    lines += [row(name, times) for name, times in (*spans.items(), ("the rest", rest), ("all", whole))]
    lines += ["of it, operations without what they call:", *(row(name, times) for name, times in longest[:OPERATIONS])]
    return "\n".join(lines)
