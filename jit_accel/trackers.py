"""The trackers that users ask for."""

from __future__ import annotations

from jit_accel.tracking import WandbTracker


class Trackers(WandbTracker):
    def __init__(self, accelerator, tracking, record, output_dir, step):
        super().__init__(accelerator, tracking, record, output_dir)

    def log_image(self, name, path, step, caption):
        super().log_image(name, path, step)

    def alert(self, title, text):
        pass

    def finish(self, exit_code=0, is_preempted=False):
        super().finish()
