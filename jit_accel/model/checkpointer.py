"""Checkpoints, written while the training goes on: aside, by all processes, synced, sealed by a manifest, renamed."""

import _thread
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from jit_accel.base.console import say
from jit_accel.base.errors import UserError, message_of
from jit_accel.base.files import atomic_file, check_guard, move, sync
from jit_accel.base.processes import on_main
from jit_accel.base.spans import span
from jit_accel.model.checkpoints import (
    NOT_FINITE,
    PROVEN,
    complete_checkpoints,
    is_proven,
    newest_checkpoint,
    set_aside,
    step_of,
)
from jit_accel.model.manifest import FORMAT_VERSION, STATE, is_complete, write_manifest
from jit_accel.model.snapshots import Snapshot, pieces_of
from jit_accel.model.tensor_files import Unsound, Written, summed_file, write_tensors

T = TypeVar("T")
SLOWEST_WRITER = timedelta(hours=1)  # behind the first one that is done
LONGEST_CLOSE_S = 60.0
DIVERGED = (
    "Lower --learning_rate, set --max_grad_norm 1, or use --mixed_precision bf16 or no, then go on with --resume auto."
)


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Do the work in a thread, which does not keep the program from ending."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    _thread.start_new_thread(run, ())  # a `Thread` waits for its beginning: on a busy machine ten times as long
    return future


class Checkpointer:
    """Saves the checkpoints of one output folder, all processes together.

    The newest `keep` stay, and the newest that is *proven*: finite steps have followed it. One is written at a time, in
    a thread of each process, which agree over gloo in a group of their own; the main process seals it.
    """

    def __init__(self, accelerator, output_dir: Path, keep: int, on_progress: Callable[[], None] = lambda: None):
        self.accelerator, self.folder, self.keep = accelerator, output_dir / "checkpoints", keep
        self.on_progress = on_progress  # called when a part has been written
        self.unproven: int | None = None  # the step of the newest checkpoint, until finite steps have followed
        self.finite_to = 0  # the last step that is known to be finite
        self.ranks = accelerator.num_processes
        self.rank = accelerator.process_index if self.ranks > 1 else 0
        gloo = {"backend": "gloo", "timeout": SLOWEST_WRITER}
        self.group = torch.distributed.new_group(**gloo) if self.ranks > 1 else None
        self.snapshot: Snapshot | None = None
        self.save_s: float | None = None  # that the last checkpoint took, as its manifest says
        self.begun: tuple[int, Future[tuple[Path, float]]] | None = None  # the step that is being written

    def save(self, step: int, parts: Mapping[str, Stateful | None]) -> Path:
        """Write a checkpoint; when this returns, it is on disk under its final name. Errors as of `begin`, `finish`."""
        self.begin(step, parts)
        return self.finish()

    def begin(self, step: int, parts: Mapping[str, Stateful | None]) -> None:
        """Begin to write a checkpoint; the one before it is finished first.

        The state of a part (None where this run has no such part) is tensors by name or JSON values. The tensors must
        not change until `wait_for_copies`. Raises `UserError` on every process where the disk does not take it.
        """
        self.finish()
        final = self.folder / f"step_{step:08d}"
        temporary = final.with_name(f"tmp_{final.name}")
        on_main(self.accelerator, partial(self._prepare, step, temporary))
        values, tensors = {"format": FORMAT_VERSION, "step": step}, {}
        for name, part in parts.items():
            state = part.state_dict() if part else None
            if state and all(isinstance(value, Tensor) for value in state.values()):
                tensors[name] = pieces_of(state, self.rank, self.ranks)
            else:
                values[name] = state
        self.snapshot = Snapshot(tensors)
        content = json.dumps(values, indent=1).encode() if self.accelerator.is_main_process else b""
        self.begun = step, in_thread(partial(self._write, step, self.snapshot, content, temporary, final))

    @span("copies")
    def wait_for_copies(self) -> None:
        """Return when the tensors that were handed to `begin` may be changed."""
        if self.snapshot:
            self.snapshot.wait()
            self.snapshot = None

    def finish_if_written(self) -> Path | None:
        """Return the path of a checkpoint that is written by now, the same on all processes; errors as of `finish`."""
        if self.begun is None:
            return None
        mine = [self.begun[1].done()]
        return self.finish() if all(gather_object(mine) if self.ranks > 1 else mine) else None

    def finish(self) -> Path | None:
        """Wait until what was begun is on the disk under its final name; return its path, or None if nothing was begun.

        Raises `UserError` on every process: the disk does not take it, or its values are not finite.
        """
        if self.begun is None:
            return None
        (step, written), self.begun = self.begun, None
        self.wait_for_copies()
        path, self.save_s = written.result()
        if self.accelerator.is_main_process:
            say(f"Saved {path}")
        self.unproven = step
        self.prove(self.finite_to)
        return path

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Wait a while for what was begun, where something else has failed; not for whoever cannot wait."""
        if self.begun and not isinstance(error, KeyboardInterrupt):
            wait([self.begun[1]], LONGEST_CLOSE_S)

    def diverged(self, what: str) -> UserError:
        """Return the error of a training that cannot go on, of which `what` says why."""
        rule = f"{what}: training stopped and no checkpoint was overwritten; {self._last_good()}."
        return UserError(rule, remedy=DIVERGED)

    def _last_good(self) -> str:
        found = newest_checkpoint(self.folder)
        return f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"

    def _problem(self, step: int, error: BaseException) -> UserError:
        """Return what an error while writing means to the user."""
        if isinstance(error, Unsound):
            return self.diverged(f"{error} after step {step}")
        if not isinstance(error, OSError):
            return UserError(f"the checkpoint of step {step} cannot be written ({message_of(error)}).")
        rule = f"the checkpoint of step {step} cannot be written ({error}): make room or choose a smaller "
        rule += f"--keep_checkpoints, then go on with --resume auto; {self._last_good()}."
        return UserError(rule, about="output_dir", value=self.folder.parent)

    def _prepare(self, step: int, temporary: Path) -> None:
        """Make the folder to write to, an empty one."""
        check_guard(temporary)
        try:
            for left_over in self.folder.glob("tmp_*"):
                shutil.rmtree(left_over)
            temporary.mkdir(parents=True)
        except OSError as error:
            raise self._problem(step, error) from None

    def _write(self, step: int, snapshot: Snapshot, values: bytes, temporary: Path, final: Path) -> tuple[Path, float]:
        """Write this process's share, and on the main process, when all have, what makes a checkpoint of it.

        Return its place and the seconds that it took.
        """
        is_main, began = self.accelerator.is_main_process, time.monotonic()
        try:
            shares = self._together(step, partial(self._write_share, snapshot, temporary))
            files = {name: file for share in shares for name, file in share.items()}
            seconds, *_ = self._together(
                step, partial(self._seal, began, values, files, temporary, final) if is_main else lambda: None
            )
        except Exception:
            with contextlib.suppress(UserError):  # it may be another's by now
                check_guard(temporary)
                if is_main:  # the room is needed
                    shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final, seconds

    def _together(self, step: int, work) -> list:
        """Do the work in the thread of each process, and return the results of all; what fails is raised on all."""
        result, problem, bug = None, None, None
        try:
            result = work()
        except UserError as error:  # of whoever guards the folder
            problem = error
        except (OSError, Unsound) as error:
            problem = self._problem(step, error)
        except BaseException as error:  # the others must not wait for this process
            problem, bug = self._problem(step, error), error
        both = [(result, problem)] * self.ranks
        if self.group:
            torch.distributed.all_gather_object(both, (result, problem), self.group)
        if bug:
            raise bug
        results, problems = zip(*both)
        for problem in filter(None, problems):
            raise problem
        return list(results)

    def _write_share(self, snapshot: Snapshot, temporary: Path) -> dict[str, Written]:
        ending = f"-{self.rank + 1:05d}-of-{self.ranks:05d}" if self.ranks > 1 else ""
        copies, files = snapshot.take(), {}
        for part in list(copies):
            if pieces := copies.pop(part):
                check_guard(temporary)
                name = f"{part}{ending}.safetensors"
                files[name] = write_tensors(temporary / name, pieces)
            self.on_progress()  # of all processes alike
        return files

    def _seal(self, began: float, values: bytes, files: dict[str, Written], temporary: Path, final: Path) -> float:
        check_guard(temporary)
        with summed_file(temporary / STATE) as file:
            file.write(values)
        write_manifest(temporary, files | {STATE: file.written}, seconds := time.monotonic() - began)
        sync(temporary)
        if is_complete(final):  # of this very step: a whole checkpoint is never touched
            shutil.rmtree(temporary)
            return seconds
        if os.path.lexists(final):
            set_aside(final)
        move(temporary, final)
        sync(final.parent)
        whole = complete_checkpoints(self.folder)
        proven = [path for path in whole if is_proven(path)]
        for old in whole[: -self.keep]:
            if old not in proven[-1:]:
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                doomed = old.with_name(f"tmp_old_{old.name}")
                move(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        return seconds

    def prove(self, step: int) -> None:
        """Note that all steps to this one were finite, beside the newest checkpoint if it lies before."""
        self.finite_to = step
        if self.unproven is not None and self.unproven < step:
            path = self.folder / f"step_{self.unproven:08d}"
            if self.accelerator.is_main_process and path.is_dir():
                note = json.dumps({"finite_to_step": step})
                # Nobody waits for the disk; what is lost of it in a power cut, or on a full disk, is proven again.
                with contextlib.suppress(OSError), atomic_file(path / PROVEN, durable=False) as temporary:
                    temporary.write_text(note)
            self.unproven = None

    def distrust(self, resumed: int) -> None:
        """Rename the unproven checkpoint that this start went on from, at the step `resumed`, if one is proven."""
        self.finish()

        def judge() -> None:
            whole = complete_checkpoints(self.folder)
            proven = [path for path in whole if is_proven(path)]
            if whole and proven and step_of(whole[-1]) == self.unproven == resumed and whole[-1] not in proven:
                with contextlib.suppress(OSError):
                    set_aside(whole[-1], NOT_FINITE)

        on_main(self.accelerator, judge)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename later checkpoints, which a run that goes on from `step` leaves behind; on the main process."""
        # Otherwise the newest would not be this run's, and rotation would delete what it writes.
        later = [path for path in complete_checkpoints(self.folder) if step_of(path) > step]
        for path in later:
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            move(path, aside)
        return later
