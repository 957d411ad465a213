"""Entry point: `python -m jit_accel.prepare --data_path photos --output_dir photos-256`."""

from __future__ import annotations

import signal
import sys

from jit_accel.console import say
from jit_accel.errors import UserError
from jit_accel.preparation.settings import PrepareConfig, check


def main(argv: list[str] | None = None) -> int:
    """Prepare images as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal."""
    try:
        config = parse_args(argv)
        check(config)
        # torch is imported only now, so that --help and wrong flags answer at once.
        if config.verify is not None:
            from jit_accel.preparation.verify import verify

            return verify(config.verify)
        from jit_accel.preparation.run import prepare

        return prepare(config)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse_args(argv: list[str] | None = None) -> PrepareConfig:
    """Read the command line.

    Raises:
        SystemExit: `--help` (0), an unknown flag or a value of the wrong type (2).
    """
    import tyro

    return tyro.cli(PrepareConfig, args=argv, prog="python -m jit_accel.prepare", use_underscores=True)


if __name__ == "__main__":
    sys.exit(main())
