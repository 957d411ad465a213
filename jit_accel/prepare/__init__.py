"""Entry point: `python -m jit_accel.prepare --data_path photos --output_dir photos-256`."""

from jit_accel.config.command_line import exit_code_of, importing_torch, parse_flags
from jit_accel.prepare.settings import PrepareConfig, check


def main(argv: list[str] | None = None) -> int:
    """Prepare images as the command line says; return the exit code: 0 done, 2 a user's error, 128 + signal."""

    def run() -> int:
        config = parse_args(argv)
        with importing_torch():
            from jit_accel.prepare.run import prepare

        return prepare(config)

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> PrepareConfig:
    """Read the command line into checked settings. Raises `UserError`, or `SystemExit` for --help and wrong types."""
    config = parse_flags(PrepareConfig, argv, "python -m jit_accel.prepare")
    check(config)
    return config
