"""Entry point: `accelerate launch -m jit_accel.train`, or `python -m jit_accel.train` on one device."""

from __future__ import annotations

import os
import sys

from jit_accel.cli import parse_args
from jit_accel.errors import UserError
from jit_accel.redact import redacted


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
            print(f"error{where}: {redacted(str(error))}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
