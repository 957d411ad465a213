"""The progress of a run: a bar on a terminal, plain lines now and then in a log file."""

import math
import os
import sys
import time
from datetime import timedelta

from tqdm.auto import tqdm

from jit_accel.base.console import say
from jit_accel.monitor.metric_table import EPOCH, IMAGES_PER_SECOND, STEP_TIME, TRAIN_LOSS

# Between two plain lines: a fiftieth of the time so far, within these bounds.
_LEAST_S, _MOST_S, _SHARE = 10.0, 300.0, 0.02


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
        now, words = time.monotonic(), _in_words(row)
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(words), refresh=False)
            return
        rest_s = min(_MOST_S, max(_LEAST_S, _SHARE * (now - self.began)))
        if self.is_shown and (now - self.shown_at >= rest_s or row["step"] == self.total_steps):
            self.shown_at = now
            step = f"step {row['step']:,}/{self.total_steps:,} ({row['step'] / self.total_steps:.0%})"
            left = timedelta(seconds=round(row[STEP_TIME] * (self.total_steps - row["step"])))
            say(" | ".join([step, *words, f"left {left}"]))


def _in_words(row: dict) -> list[str]:
    loss, speed = row[TRAIN_LOSS], row[IMAGES_PER_SECOND]
    return [
        *([f"epoch {row[EPOCH]:.2f}"] if EPOCH in row else []),
        f"loss {loss:.4f}" if abs(loss) < 1000 else f"loss {loss:.3e}",
        f"{speed:,.0f} images/s" if speed >= 100 else f"{speed:.3g} images/s",
    ]
