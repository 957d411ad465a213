"""Entry point: `python -m jit_accel.compare base.yaml "muon: --optimizer muon" --output_dir cmp -- …`; no torch."""

from jit_accel.compare.run import compare
from jit_accel.compare.settings import CompareConfig, check, divided
from jit_accel.config.command_line import exit_code_of, parse_flags


def main(argv: list[str] | None = None) -> int:
    """Compare settings of a training. Returns the exit code.

    0 done, 1 a training or evaluation failed, 2 wrong settings, 128 + signal stopped.
    """

    def run() -> int:
        texts, own, common = divided(argv)
        settings = parse_flags(CompareConfig, own, "python -m jit_accel.compare")
        check(settings)
        return compare(settings, texts, common)

    return exit_code_of(run)
