"""The log of a run on its own machine, by the main process: metrics.jsonl, the terminal, report.html."""

import contextlib
import errno
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
from tqdm.auto import tqdm

from jit_accel.base.console import redacted, say, warn
from jit_accel.base.errors import UserError
from jit_accel.base.files import append_json_lines, check_guard, json_line, parse_json_line, read_json_lines
from jit_accel.base.folder_lock import on_behalf_of_holder
from jit_accel.monitor.metric_table import EPOCH, IMAGES_PER_SECOND, STEP_TIME, TRAIN_LOSS

METRICS_FILE, REPORT_FILE = "metrics.jsonl", "report.html"
URL_FILE = "wandb_url.txt"  # the page of a run in W&B, where it has one
# Left by a run that a signal stopped, and by one that failed.
INTERRUPTED_FILE, FAILED_FILE = "INTERRUPTED", "FAILED"
# Rows that wait in memory for a disk with room.
MOST_PENDING = 100_000
# Between two plain lines: a fiftieth of the time so far, within these bounds.
_LEAST_S, _MOST_S, _SHARE = 10.0, 300.0, 0.02
# A build of the report takes up to a core: so it may take a hundredth of the time of one.
_REST = 100.0
_LONGEST_BUILD_S = 120.0


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
            if not self.is_trimmed and self.path.exists():
                os.truncate(self.path, end_of_rows(self.path, self.step))
            self.is_trimmed = True
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
        check_guard(self.path)
        try:
            start = end_of_rows(self.path, step - 1)
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(start)
                row = parse_json_line(file.readline())
                if not _has_step(row) or row["step"] != step:
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

    def _fail(self, error: OSError) -> None:
        if not self.has_failed:
            warn(f"{self.path} cannot be written ({error.strerror}): metrics are kept in memory until it can.")
        self.has_failed = True


def end_of_rows(path: Path, step: int) -> int:
    """Return the place in the file, in bytes, where the last whole row up to `step` ends.

    A damaged row, whose step is out of order, costs no other one.
    """
    end, position, newest = 0, 0, -1
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            row = parse_json_line(line)
            if _has_step(row) and line.endswith(b"\n") and newest < row["step"] <= step:
                end, newest = position, row["step"]
    return end


def iterate_metrics(output_dir: Path) -> Iterator[dict]:
    """Yield the rows of a run's `metrics.jsonl`; lines that were cut short are left out."""
    return filter(_has_step, read_json_lines(output_dir / METRICS_FILE))


def is_measured(output_dir: Path, step: int, keys: set[str]) -> bool:
    """Return False where a run's log has a row of this step without any of these values."""
    return not any(row["step"] == step and keys.isdisjoint(row) for row in iterate_metrics(output_dir))


def _has_step(row: dict | None) -> bool:
    return row is not None and type(row.get("step")) is int and 0 <= row["step"] < 2**63


def read_metrics(output_dir: Path) -> list[dict]:
    return list(iterate_metrics(output_dir))


def leave_interruption(output_dir: Path, step: int) -> None:
    """Leave a file that says where a signal stopped a run."""
    with contextlib.suppress(OSError):
        (output_dir / INTERRUPTED_FILE).write_text(f"stopped at step {step}; go on with --resume auto\n")


def remove_notes(output_dir: Path) -> None:
    """Remove what an earlier start has left of its end. Raises `OSError`."""
    for name in (INTERRUPTED_FILE, FAILED_FILE):
        (output_dir / name).unlink(missing_ok=True)


def leave_failure(output_dir: Path, reason: str) -> None:
    """Leave the reason for which a run failed as a file, unless the folder is another's by now."""
    with contextlib.suppress(OSError, UserError):
        check_guard(output_dir)
        (output_dir / FAILED_FILE).write_text(redacted(reason) + "\n", encoding="utf-8")


def read_failure(output_dir: Path) -> str | None:
    """Return the reason that `leave_failure` has left; None where there is none."""
    try:
        return (output_dir / FAILED_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


class Progress:
    """Shows step, epoch, loss, images/s and the time left; silent where not `is_shown`."""

    def __init__(self, total_steps: int, step: int, is_shown: bool):
        self.total_steps, self.is_shown = total_steps, is_shown
        self.began, self.shown_at = time.monotonic(), -math.inf
        is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        how = {"unit": "step", "dynamic_ncols": True, "disable": not (is_shown and is_terminal)}
        self.bar = tqdm(total=total_steps, initial=step, desc="train", **how)
        self.step_done, self.close = self.bar.update, self.bar.close

    def show(self, row: dict) -> None:
        """Bring in an interval's last row of metrics."""
        loss, speed = row[TRAIN_LOSS], row[IMAGES_PER_SECOND]
        words = [
            f"epoch {row[EPOCH]:.2f}",
            f"loss {loss:.4f}" if abs(loss) < 1000 else f"loss {loss:.3e}",
            f"{speed:,.0f} images/s" if speed >= 100 else f"{speed:.3g} images/s",
        ]
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(words), refresh=False)
            return
        now = time.monotonic()
        rest_s = min(_MOST_S, max(_LEAST_S, _SHARE * (now - self.began)))
        if self.is_shown and (now - self.shown_at >= rest_s or row["step"] == self.total_steps):
            self.shown_at = now
            step = f"step {row['step']:,}/{self.total_steps:,} ({row['step'] / self.total_steps:.0%})"
            left = timedelta(seconds=round(row[STEP_TIME] * (self.total_steps - row["step"])))
            say(" | ".join([step, *words, f"left {left}"]))


class ReportProcess:
    """Builds the report of an output folder by a process of its own; a failure costs the report, never the run."""

    def __init__(self, output_dir: Path, is_wanted: bool):
        self.output_dir, self.is_wanted = output_dir, is_wanted
        self.process: subprocess.Popen | None = None
        self.has_failed, self.began, self.not_before = False, 0.0, 0.0

    def build(self) -> None:
        """Begin to build the report of what is there now, unless the last build still goes on or has just ended."""
        if self.process and (self.process.poll() is not None or time.monotonic() > self.began + _LONGEST_BUILD_S):
            self.wait(0.0)
        if self.is_wanted and self.process is None and time.monotonic() >= self.not_before:
            self._start()

    def build_last(self, timeout_s: float = _LONGEST_BUILD_S) -> None:
        """Build it once more, whatever was built before; each of the two is waited for so long at most."""
        if self.is_wanted:
            self.wait(timeout_s)
            try:
                check_guard(self.output_dir)
            except UserError:  # another's by now, as the end of the run says
                return
            self._start()
            self.wait(timeout_s)

    def wait(self, timeout_s: float = _LONGEST_BUILD_S) -> None:
        """Wait until the build that goes on is done; one that takes longer is given up."""
        if self.process is None:
            return
        try:
            _, errors = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            errors = f"not done after {timeout_s:.0f} s".encode()
        now = time.monotonic()
        self.not_before = now + _REST * (now - self.began)
        code, self.process = self.process.returncode, None
        if code:
            lines = errors.decode(errors="replace").strip().splitlines()
            self._fail(lines[-1] if lines else f"exit code {code}")

    def _start(self) -> None:
        self.began = time.monotonic()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jit_accel.report", str(self.output_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=on_behalf_of_holder(self.output_dir),
                start_new_session=True,  # Ctrl-C is for the training
            )
        except OSError as error:
            return self._fail(str(error))
        with contextlib.suppress(psutil.Error, OSError):
            psutil.Process(self.process.pid).nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if os.name == "nt" else 10)

    def _fail(self, reason: str) -> None:
        if not self.has_failed:
            warn(
                f"report.html cannot be built ({reason}). Nothing else is lost; try "
                f"`python -m jit_accel.report {self.output_dir}` later."
            )
        self.has_failed = True
