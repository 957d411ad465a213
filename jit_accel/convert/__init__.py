"""Entry point: `python -m jit_accel.convert --input checkpoint-last.pth --output jit-b16`."""

from __future__ import annotations

import os
import sys

from jit_accel.base.signals import StopRequest
from jit_accel.config.command_line import exit_code_of, reject_unknown_flags
from jit_accel.convert.settings import SETTINGS, ConvertConfig, check


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0 done, 2 a user's error, 128 + signal stopped."""

    def run() -> int:
        config = parse_args(argv)
        check(config)
        from jit_accel.convert.run import convert  # imports torch: --help and wrong flags answer at once

        if os.environ.get("RANK", "0") == "0":  # a launcher's other processes have nothing to do
            with StopRequest(at_once=True):
                convert(config)
        return 0

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> ConvertConfig:
    """Read the command line. Raises `UserError` for an unknown flag, `SystemExit` for --help and wrong types."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    reject_unknown_flags(argv, SETTINGS)
    how = {"prog": "python -m jit_accel.convert", "use_underscores": True}
    return tyro.cli(ConvertConfig, args=argv, config=(tyro.conf.OmitArgPrefixes,), **how)
