"""`metrics.jsonl`, which every run keeps, and how a run warns. Only the main process writes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jit_accel.redact import redacted

METRICS_FILE = "metrics.jsonl"
# What a run leaves that did not reach its end: told to stop, or met something.
INTERRUPTED_FILE, FAILED_FILE = "INTERRUPTED", "FAILED"


class MetricsLog:
    """Append-only `metrics.jsonl`: one JSON object a line, each with its `step`; NaN and infinity are null."""

    def __init__(self, output_dir: Path, step: int):
        """Open the log of `output_dir` and drop what an interrupted run wrote after `step`, the one resumed from."""
        self.path = output_dir / METRICS_FILE
        self.has_failed = False
        replacement = self.path.with_suffix(".tmp")
        try:
            with open(replacement, "w", encoding="utf-8") as file:
                file.writelines(as_line(row) for row in iterate_metrics(output_dir) if step and row["step"] <= step)
            os.replace(replacement, self.path)
        except OSError as error:
            self._fail(error)

    def write(self, rows: list[dict]) -> None:
        """Append rows; a full disk is reported once and costs rows, never the run."""
        text = "".join(map(as_line, rows))
        try:
            with open(self.path, "ab", buffering=0) as file:
                if self.has_failed and file.tell():
                    text = "\n" + text  # what was written last may have been cut
                file.write(text.encode())
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.has_failed:
            warn(f"{self.path} cannot be written ({error.strerror}): metrics are lost until it can.")
        self.has_failed = True


def as_line(row: dict) -> str:
    """`row` as a line of strict JSON."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def iterate_metrics(output_dir: Path) -> Iterator[dict]:
    """The rows of a run's `metrics.jsonl` one by one; lines that were cut short are left out."""
    path = output_dir / METRICS_FILE
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield row


def read_metrics(output_dir: Path) -> list[dict]:
    """All of them."""
    return list(iterate_metrics(output_dir))


def warn(message: str) -> None:
    print(f"Warning: {redacted(message)}", file=sys.stderr, flush=True)
