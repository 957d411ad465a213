"""Entry point: `python -m jit_accel.convert --input checkpoint-last.pth --output jit-b16`."""

from __future__ import annotations

import os
import sys

from jit_accel.base.signals import StopRequest
from jit_accel.config.command_line import exit_code_of, reject_unknown_flags
from jit_accel.convert.settings import SETTINGS, ConvertConfig, check


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal stopped."""

    def run() -> int:
        config = parse_args(argv)
        check(config)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from diffusers.utils.logging import disable_progress_bar

        from jit_accel.convert.run import convert

        disable_progress_bar()
        if os.environ.get("RANK", "0") == "0":  # a launcher's other processes have nothing to do
            with StopRequest(at_once=True):
                convert(config)
        return 0

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> ConvertConfig:
    """Read the command line.

    Raises:
        UserError: an unknown flag.
        SystemExit: `--help` (0), a missing flag or a value of the wrong type (2).
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    reject_unknown_flags(argv, SETTINGS)
    return tyro.cli(
        ConvertConfig,
        args=argv,
        prog="python -m jit_accel.convert",
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
