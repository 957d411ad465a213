"""Entry point: `accelerate launch -m jit_accel.train`, or `python -m jit_accel.train` on one device."""

from __future__ import annotations

from jit_accel.config.command_line import exit_code_of, parse_args


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0 done, 2 something to mend, 128 + signal stopped."""

    def run() -> int:
        config = parse_args(argv)
        # torch is imported only now, so that --help and wrong flags answer at once.
        from jit_accel.train.build import start

        return start(config)

    return exit_code_of(run)
