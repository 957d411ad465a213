"""`metrics.jsonl`, which every run keeps. Only the main process writes."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from jit_accel.base.console import warn
from jit_accel.base.files import append_json_lines, json_line, parse_json_line, read_json_lines

METRICS_FILE = "metrics.jsonl"
# Left by a run that a signal stopped, and by one that failed.
INTERRUPTED_FILE, FAILED_FILE = "INTERRUPTED", "FAILED"
# Rows that wait in memory for a disk with room.
MOST_PENDING = 100_000


class MetricsLog:
    """Append-only `metrics.jsonl`: one JSON object a line, each with its `step`; NaN and infinity are null."""

    def __init__(self, output_dir: Path, step: int):
        """Open the log of `output_dir` and drop what an interrupted run wrote after `step`, the one resumed from."""
        self.path, self.step = output_dir / METRICS_FILE, step
        self.has_failed = self.is_trimmed = False
        self.pending: list[dict] = []
        self.write([])

    def write(self, rows: list[dict]) -> None:
        """Append rows, those of earlier calls that failed first; a full disk is reported once."""
        self.pending = [*self.pending, *rows][-MOST_PENDING:]
        try:
            self._trim()
            append_json_lines(self.path, self.pending)
            self.pending = []
        except OSError as error:
            self._fail(error)

    def amend(self, step: int, values: dict) -> None:
        """Put further values into the row of `step`, which must be the newest; without such a row they are dropped."""
        if self.pending:
            if self.pending[-1]["step"] == step:
                self.pending[-1] = {**self.pending[-1], **values}
            return self.write([])
        try:
            start = end_of_rows(self.path, step - 1)
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(start)
                row = as_row(file.readline())
                if row is None or row["step"] != step:
                    return None
                row |= values
                line = json_line(row)
                file.seek(start)  # what the row has is written over itself: a process that dies here loses nothing
                try:
                    if file.write(line.encode()) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(start)
                    self.pending = [row]
                    raise
        except OSError as error:
            self._fail(error)

    def _trim(self) -> None:
        if not self.is_trimmed and self.path.exists():
            os.truncate(self.path, end_of_rows(self.path, self.step))
        self.is_trimmed = True

    def _fail(self, error: OSError) -> None:
        if not self.has_failed:
            warn(f"{self.path} cannot be written ({error.strerror}): metrics are kept in memory until it can.")
        self.has_failed = True


def end_of_rows(path: Path, step: int) -> int:
    """Return the place in the file, in bytes, where the last whole row up to `step` ends."""
    end = position = 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            row = as_row(line)
            if row is None or not line.endswith(b"\n"):
                continue
            if row["step"] > step:
                break
            end = position
    return end


def iterate_metrics(output_dir: Path) -> Iterator[dict]:
    """Yield the rows of a run's `metrics.jsonl`; lines that were cut short are left out."""
    return filter(_has_step, read_json_lines(output_dir / METRICS_FILE))


def as_row(line: bytes) -> dict | None:
    """Return the row of a line of the file; None where it was cut short or is something else."""
    row = parse_json_line(line)
    return row if row is not None and _has_step(row) else None


def _has_step(row: dict) -> bool:
    return type(row.get("step")) is int and row["step"] >= 0


def read_metrics(output_dir: Path) -> list[dict]:
    return list(iterate_metrics(output_dir))
