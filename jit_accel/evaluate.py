"""Entry point: `python -m jit_accel.evaluate --model runs/mine --reference photos`, or with `accelerate launch -m`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

from jit_accel.console import say
from jit_accel.errors import UserError, nearest
from jit_accel.evaluation.settings import EvaluateConfig, check


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal."""
    try:
        config = parse_args(argv)
        check(config)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from jit_accel.evaluation.run import evaluate

        return evaluate(config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse_args(argv: list[str] | None = None) -> EvaluateConfig:
    """Read the command line; lists may be written with commas.

    Raises:
        UserError: an unknown flag.
        SystemExit: `--help` (0), a value of the wrong type (2).
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    flags = list(EvaluateConfig.__dataclass_fields__)
    for argument in argv:
        name = argument[2:].partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in (*flags, "help", "") and name.removeprefix("no_") not in flags:
            hint = nearest(name, flags).replace("Did you mean '", "Did you mean '--")
            raise UserError(f"{argument}: no such flag.{hint} --help lists them all.")
    config = tyro.cli(
        EvaluateConfig,
        args=argv,
        prog="python -m jit_accel.evaluate",
        use_underscores=True,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    names = ",".join(config.metrics).split(",")
    return replace(config, metrics=tuple(name.strip() for name in names if name.strip()))


if __name__ == "__main__":
    sys.exit(main())
