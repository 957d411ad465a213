"""Entry point: `python -m jit_accel.plan --config launch/recipes/imagenet256_h16.yaml --gpu H100 --num_gpus 16`."""

from jit_accel.config.command_line import exit_code_of, importing_torch, parse_flags
from jit_accel.plan.settings import PlanConfig, check, split_flags


def main(argv: list[str] | None = None) -> int:
    """Say what a training would take; return the exit code: 0 it fits, 1 in no way, 2 a user's error."""

    def run() -> int:
        own, training = split_flags(argv)
        settings = parse_flags(PlanConfig, own, "python -m jit_accel.plan")
        check(settings)
        with importing_torch():
            from jit_accel.plan.run import plan

        return plan(settings, training)

    return exit_code_of(run)
