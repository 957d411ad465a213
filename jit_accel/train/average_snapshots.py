"""Snapshots of the averages that others are made of after the training, written beside it on the main process."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file, check_guard, disk_errors
from jit_accel.base.processes import on_main, whole_tensors
from jit_accel.model.checkpointer import in_thread
from jit_accel.model.tensor_files import Piece, Unsound, write_tensors
from jit_accel.model.width_averages import snapshot_path, stored_snapshots

GO_ON = "go on with --resume auto, and a larger --average_snapshots if need be"


class AverageSnapshots:
    """Stores these averages, by name, in a run's folder; all processes call it together, and one is written at a time.

    A file is there whole or not at all. `UserError` is raised on all processes: the disk does not take it.
    """

    def __init__(
        self,
        accelerator,
        output_dir: Path,
        averages: Mapping[str, Mapping[str, Tensor]],
        pause: Callable[[], AbstractContextManager] = nullcontext,  # of the clock of the steps
    ):
        self.accelerator, self.output_dir, self.averages, self.pause = accelerator, output_dir, averages, pause
        self.begun: Future[None] | None = None  # on the main process alone

    def begin(self, step: int) -> None:
        """Begin to write the averages of this step; they may change when this returns."""
        with self.pause():
            self.finish()
            is_main = self.accelerator.is_main_process
            copies: dict[Path, dict[str, Piece]] = {}
            for name, average in self.averages.items():
                whole = whole_tensors(average, keep=is_main)
                if is_main:  # of tensors on the CPU they are no copies yet
                    pieces = {key: Piece.whole(tensor.clone()) for key, tensor in whole.items()}
                    copies[snapshot_path(self.output_dir, step, name)] = pieces
            if is_main:
                self.begun = in_thread(partial(self._write, copies))

    def finish(self) -> None:
        """Wait until what was begun is on the disk."""
        if self.averages:
            on_main(self.accelerator, self._finish)

    def has(self, step: int) -> bool:
        """Return True where the averages of this step are stored, the same on all processes."""
        paths = [snapshot_path(self.output_dir, step, name) for name in self.averages]
        return on_main(self.accelerator, lambda: all(path.exists() for path in paths))

    def remove_after(self, step: int) -> None:
        """Remove later ones, of steps that a run which goes on from `step` takes anew; on the main process."""
        with disk_errors("output_dir", self.output_dir):
            for profile, path in stored_snapshots(self.output_dir).items():
                if profile.step > step:
                    check_guard(path)
                    path.unlink()

    def _write(self, copies: dict[Path, dict[str, Piece]]) -> None:
        for path in list(copies):
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as temporary:
                write_tensors(temporary, copies.pop(path))

    def _finish(self) -> None:
        begun, self.begun = self.begun, None
        if begun:
            try:
                with disk_errors("output_dir", self.output_dir, GO_ON):
                    begun.result()
            except Unsound as error:
                raise UserError(f"an average cannot be stored: {error}.", remedy="Go on with --resume auto.") from None
