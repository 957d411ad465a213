"""Entry point: `python -m jit_accel.convert --input checkpoint-last.pth --output jit-b16`."""

import os

from jit_accel.base.errors import StopRequest
from jit_accel.config.command_line import exit_code_of, importing_torch, parse_flags
from jit_accel.convert.settings import ConvertConfig, check


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says; return the exit code: 0 done, 2 a user's error, 128 + signal stopped."""

    def run() -> int:
        config = parse_flags(ConvertConfig, argv, "python -m jit_accel.convert")
        check(config)
        with importing_torch():
            from jit_accel.convert.run import convert

        if os.environ.get("RANK", "0") == "0":  # a launcher's other processes have nothing to do
            with StopRequest(at_once=True):
                convert(config)
        return 0

    return exit_code_of(run)
