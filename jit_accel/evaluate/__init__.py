"""Entry point: `python -m jit_accel.evaluate --model runs/mine --reference photos`, or with `accelerate launch -m`."""

from __future__ import annotations

from dataclasses import replace

from jit_accel.config.command_line import exit_code_of, parse_flags
from jit_accel.evaluate import grid  # not its `names`: a module of this room has that name
from jit_accel.evaluate.settings import EvaluateConfig, check


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal."""

    def run() -> int:
        config = parse_args(argv)
        check(config)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from jit_accel.evaluate.run import evaluate

        return evaluate(config)

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> EvaluateConfig:
    """Read the command line; lists may be written with commas.

    Raises:
        UserError: an unknown flag.
        SystemExit: `--help` (0), a value of the wrong type (2).
    """
    config = parse_flags(EvaluateConfig, argv, "python -m jit_accel.evaluate")
    return replace(config, metrics=tuple(grid.names(config.metrics)) or config.metrics)  # a mere comma is refused later
