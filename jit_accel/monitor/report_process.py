"""The building of report.html beside the training, at low priority."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from jit_accel.base.console import warn

REPORT_FILE = "report.html"
# A build takes up to a core: so it may take a hundredth of the time of one.
_REST = 100.0
_LONGEST_BUILD_S = 120.0


class ReportProcess:
    """Builds the report of an output folder by a process of its own; a failure costs the report, never the run."""

    def __init__(self, output_dir: Path, is_wanted: bool):
        self.output_dir, self.is_wanted = output_dir, is_wanted
        self.process: subprocess.Popen | None = None
        self.has_failed = False
        self.began = self.not_before = 0.0

    def build(self) -> None:
        """Begin to build the report of what is there now, unless the last build still goes on or has just ended."""
        if self.process:
            age_s = time.monotonic() - self.began
            self.wait(0.0 if age_s > _LONGEST_BUILD_S else None)
        if self.is_wanted and self.process is None and time.monotonic() >= self.not_before:
            self._start()

    def build_last(self, timeout_s: float = _LONGEST_BUILD_S) -> None:
        """Build it once more, whatever was built before; each of the two is waited for so long at most."""
        if self.is_wanted:
            self.wait(timeout_s)
            self._start()
            self.wait(timeout_s)

    def wait(self, timeout_s: float | None = _LONGEST_BUILD_S) -> None:
        """Wait for the build that goes on, and give it up after this time; None: only look whether it has ended."""
        if self.process is None or (timeout_s is None and self.process.poll() is None):
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._end()

    def _start(self) -> None:
        self.began = time.monotonic()
        command = [sys.executable, "-m", "jit_accel.report", str(self.output_dir)]
        try:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _end)
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                start_new_session=True,  # Ctrl-C is for the training
            )
        except OSError as error:
            self._fail(str(error))
            return
        with contextlib.suppress(psutil.Error, OSError):
            psutil.Process(self.process.pid).nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if os.name == "nt" else 10)

    def _end(self) -> None:
        now = time.monotonic()
        self.not_before = now + _REST * (now - self.began)
        code, self.process = self.process.returncode, None
        if code:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines()
            self._fail(lines[-1] if lines else f"exit code {code}")
        self.errors.close()

    def _fail(self, reason: str) -> None:
        if not self.has_failed:
            warn(
                f"report.html cannot be built ({reason}). Training goes on; try "
                f"`python -m jit_accel.report {self.output_dir}` later."
            )
        self.has_failed = True
