"""Entry point: `python -m jit_accel.prepare --data_path photos --output_dir photos-256`."""

from __future__ import annotations

from jit_accel.config.command_line import exit_code_of, parse_flags
from jit_accel.prepare.settings import PrepareConfig, check


def main(argv: list[str] | None = None) -> int:
    """Prepare images as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal."""

    def run() -> int:
        config = parse_args(argv)
        check(config)
        # torch is imported only now, so that --help and wrong flags answer at once.
        if config.verify is not None:
            from jit_accel.prepare.verify import verify

            return verify(config.verify)
        from jit_accel.prepare.run import prepare

        return prepare(config)

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> PrepareConfig:
    """Read the command line.

    Raises:
        UserError: an unknown flag.
        SystemExit: `--help` (0), a value of the wrong type (2).
    """
    return parse_flags(PrepareConfig, argv, "python -m jit_accel.prepare")
