"""Entry point: `python -m jit_accel.supervise accelerate launch … -m jit_accel.train …`; imports no torch."""

import sys
from pathlib import Path

from jit_accel.base.console import say
from jit_accel.base.errors import UserError
from jit_accel.config.command_line import exit_code_of, parse_args
from jit_accel.config.identity import is_named, run_folder
from jit_accel.supervise.run import RESTARTS, Supervisor

PROGRAM = "jit_accel.train"
HELP = f"""usage: python -m jit_accel.supervise COMMAND ... -m {PROGRAM} ...

Runs the command, which trains, and starts it again when a process, the launcher or another machine is lost: it goes on
from the newest checkpoint. {RESTARTS} restarts in a row without a newer checkpoint end it with the reason.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 to this program end the training in order. Exit codes: 0 done, 1 given up, 2 a
wrong command or flag, 128 + the signal's number after a stop that was asked for."""


def main(argv: list[str] | None = None) -> int:
    """Train by the command, again and again, until it is done. Returns the exit code, as `HELP` has them."""
    command = sys.argv[1:] if argv is None else argv
    if command[:1] in ([], ["-h"], ["--help"]):
        say(HELP)
        return 0 if command else 2

    def run() -> int:
        if PROGRAM not in command:
            raise UserError(f"runs a command that trains: no -m {PROGRAM} in {' '.join(command)!r}. --help says more.")
        config = parse_args(command[command.index(PROGRAM) + 1 :])  # what is wrong there is said once, and here
        goes_on = config.run.resume == "auto" and not config.run.dry_run
        if goes_on and not is_named(config):
            rule = "not given, so that a restart could take another folder: give it, or --wandb_name."
            raise UserError(rule, about="output_dir")
        limit_s = 60 * (config.run.max_stall_minutes or 60)
        return Supervisor(command, Path(run_folder(config)), RESTARTS if goes_on else 0, limit_s).run()

    return exit_code_of(run)
