"""Entry point: `accelerate launch -m jit_accel.train`, or `python -m jit_accel.train` on one device."""

from __future__ import annotations

import os
import signal
import sys

from jit_accel.cli import parse_args
from jit_accel.console import say
from jit_accel.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal stopped."""
    try:
        config = parse_args(argv)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from jit_accel.startup import start

        return start(config)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.everywhere:
            where = "" if error.everywhere else f" (process {rank})"
            say(f"error{where}: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second Ctrl-C: at once
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
