"""The building of report.html beside the training, at low priority."""

import contextlib
import os
import subprocess
import sys
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
            _, errors = self.process.communicate()
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
                start_new_session=True,  # Ctrl-C is for the training
            )
        except OSError as error:
            return self._fail(str(error))
        with contextlib.suppress(psutil.Error, OSError):
            psutil.Process(self.process.pid).nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if os.name == "nt" else 10)

    def _fail(self, reason: str) -> None:
        if not self.has_failed:
            warn(
                f"report.html cannot be built ({reason}). Training goes on; try "
                f"`python -m jit_accel.report {self.output_dir}` later."
            )
        self.has_failed = True
