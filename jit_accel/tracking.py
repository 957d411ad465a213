"""Where the measurements of a run go: a progress bar, `metrics.jsonl`, and Weights & Biases when asked.

Only the main process writes, and no failure here stops a run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import sys
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Append-only `metrics.jsonl`: one JSON object a line, each with its `step`."""

    def __init__(self, output_dir: Path, step: int):
        """Open the log of `output_dir` and drop what an interrupted run wrote after `step`, the one resumed from."""
        self.path = output_dir / METRICS_FILE
        self.has_failed = False
        kept = [row for row in read_metrics(output_dir) if row["step"] <= step] if step else []
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(replacement, self.path)

    def write(self, rows: list[dict]) -> None:
        """Append rows; a full disk is reported once and costs rows, never the run."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows))
        except OSError as error:
            if not self.has_failed:
                warn(f"{self.path} cannot be written ({error.strerror}): metrics are lost until it can.")
            self.has_failed = True


def read_metrics(output_dir: Path) -> list[dict]:
    """All rows of a run's `metrics.jsonl`; a last line that was cut short is left out."""
    rows = []
    path = output_dir / METRICS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _finite(row: dict) -> dict:
    """With null in place of what JSON has no word for."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def warn(message: str) -> None:
    print(f"Warning: {message}", file=sys.stderr, flush=True)


class WandbTracker:
    """Weights & Biases through `accelerator.init_trackers`; does nothing on other processes and after a failure."""

    def __init__(self, accelerator, tracking, config: dict, output_dir: Path):
        """Start or, where `output_dir` remembers one, continue a W&B run.

        Args:
            accelerator: built with `log_with="wandb"` where `wandb_installed()`.
            tracking: the settings (`TrackingConfig`).
            config: what W&B shows as the run's configuration.
        """
        self.accelerator = accelerator
        self.active = False
        if not tracking.use_wandb or not accelerator.is_main_process:
            return
        if not wandb_installed():
            warn("wandb not available. Install with: pip install wandb")
            return
        try:
            self._start(tracking, config, output_dir)
        except Exception as error:  # a tracker's failure, whatever it is, must not stop the training
            accelerator.trackers = []  # a half-started one would fail again at the end
            warn(
                f"wandb could not start ({type(error).__name__}: {error}). Training goes on without it. "
                "Run `wandb login`, or set WANDB_MODE=offline."
            )

    def _start(self, tracking, config: dict, output_dir: Path) -> None:

        id_file = output_dir / "wandb_run_id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        settings = {
            "name": tracking.wandb_name,
            "entity": tracking.wandb_entity,
            "dir": str(output_dir),
            "id": run_id,
            "resume": "allow",
        }
        kwargs = {"wandb": {k: v for k, v in settings.items() if v is not None}}
        self.accelerator.init_trackers(tracking.wandb_project, config=config, init_kwargs=kwargs)
        run = self.accelerator.get_tracker("wandb", unwrap=True)
        run.define_metric("step")
        for room in ("train/*", "val/*", "data/*"):
            run.define_metric(room, step_metric="step")
        id_file.write_text(run_id)
        self.active = True
        print(f"Wandb initialized: project={tracking.wandb_project}, name={run.name}")
        if run.url:
            print(f"View run at: {run.url}")
        else:
            print(f"Wandb is offline; upload later with: wandb sync {Path(run.dir).parent}", flush=True)

    def log(self, rows: list[dict]) -> None:
        """Send rows, each under its own true `step`."""
        for row in rows if self.active else ():
            self._try("log", lambda row=row: self.accelerator.log(row, step=row["step"]))

    def log_image(self, name: str, path: Path, step: int) -> None:
        if self.active:
            import wandb

            self._try("log an image", lambda: self.accelerator.log({name: wandb.Image(str(path))}, step=step))

    def finish(self) -> None:
        if self.active:
            self._try("finish", self.accelerator.get_tracker("wandb").finish)
            self.active, self.accelerator.trackers = False, []

    def _try(self, what: str, action) -> None:
        try:
            action()
        except Exception as error:  # see __init__
            self.active, self.accelerator.trackers = False, []
            warn(f"wandb failed to {what} ({type(error).__name__}: {error}). Training goes on without it.")


def wandb_installed() -> bool:
    return importlib.util.find_spec("wandb") is not None
