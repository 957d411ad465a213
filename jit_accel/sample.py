"""Entry point: `python -m jit_accel.sample --model runs/mine`, also under `accelerate launch -m`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import fields

from jit_accel.cli import reject_unknown_flags
from jit_accel.console import say
from jit_accel.errors import UserError
from jit_accel.sampling.settings import SampleConfig, check


def main(argv: list[str] | None = None) -> int:
    """Sample as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal stopped."""
    try:
        config = parse_args(argv)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from jit_accel.sampling.run import sample

        return sample(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or not error.everywhere:
            say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second Ctrl-C: at once
        return 128 + signal.SIGINT


def parse_args(argv: list[str] | None = None) -> SampleConfig:
    """Read the command line into checked settings.

    Raises:
        UserError: an unknown flag, values out of range, settings that contradict each other.
        SystemExit: `--help` (0), or a value of the wrong type (2).
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    reject_unknown_flags(argv, {field.name: field for field in fields(SampleConfig)})
    config = tyro.cli(
        SampleConfig,
        args=argv,
        prog="python -m jit_accel.sample",
        use_underscores=True,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    check(config)
    return config


if __name__ == "__main__":
    sys.exit(main())
