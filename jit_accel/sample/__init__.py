"""Entry point: `python -m jit_accel.sample --model runs/mine`, also under `accelerate launch -m`."""

from __future__ import annotations

from jit_accel.config.command_line import exit_code_of, parse_flags
from jit_accel.sample.settings import SampleConfig, check


def main(argv: list[str] | None = None) -> int:
    """Sample as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal stopped."""

    def run() -> int:
        config = parse_args(argv)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from jit_accel.sample.run import sample

        return sample(config)

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> SampleConfig:
    """Read the command line into checked settings.

    Raises:
        UserError: an unknown flag, values out of range, settings that contradict each other.
        SystemExit: `--help` (0), or a value of the wrong type (2).
    """
    config = parse_flags(SampleConfig, argv, "python -m jit_accel.sample")
    check(config)
    return config
