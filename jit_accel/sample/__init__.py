"""Entry point: `python -m jit_accel.sample --model runs/mine`, also under `accelerate launch -m`."""

from jit_accel.config.command_line import exit_code_of, importing_torch, parse_flags
from jit_accel.sample.settings import SampleConfig, check


def main(argv: list[str] | None = None) -> int:
    """Sample as the command line says; return the exit code: 0 done, 2 a user's error, 128 + signal stopped."""

    def run() -> int:
        config = parse_args(argv)
        with importing_torch():
            from jit_accel.sample.run import sample

        return sample(config)

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> SampleConfig:
    """Read the command line into checked settings. Raises `UserError`, or `SystemExit` for --help and wrong types."""
    config = parse_flags(SampleConfig, argv, "python -m jit_accel.sample")
    check(config)
    return config
