"""Training: `accelerate launch -m jit_accel.train`, or `python -m jit_accel.train` on one device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jit_accel.config.command_line import exit_code_of, importing_torch, parse_args
from jit_accel.config.settings import Config

if TYPE_CHECKING:
    from jit_accel.data.formats.source import Source
    from jit_accel.model.objective import Objective


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0 done, 2 an error of the user, 128 + signal stopped."""

    def run() -> int:
        config = parse_args(argv)
        with importing_torch():
            from jit_accel.train.build import placed, start

        return start(placed(config))

    return exit_code_of(run)


def fit(config: Config, *, source: Source | None = None, objective: type[Objective] | None = None) -> Path:
    """Train in this process, and return the run's folder, which `jit_accel.load` takes.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save a checkpoint and end the training; `resume="auto"` goes on from there.

    Args:
        config: as `Config.of` returns it.
        source: images of one's own, in place of those that `data_path` names.
        objective: a subclass of `Objective`, made with the settings of the group of that name.

    Raises:
        UserError: a setting, the data or the device does not allow the training.

    Example:
        >>> run = fit(Config.of(data_path="photos", model="JiT-B/4", img_size=64, output_dir="runs/photos"))
    """
    from jit_accel.train.build import placed, start

    config = placed(config)
    start(config, source, objective)
    return Path(config.run.output_dir)
