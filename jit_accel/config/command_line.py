"""From the command line and a YAML file to checked settings; what every program's `main` does."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import TypeVar

from jit_accel.base.console import say
from jit_accel.base.errors import UserError, message_of, nearest
from jit_accel.config.checks import check
from jit_accel.config.settings import DEFAULT_MODEL, SETTINGS, Config

T = TypeVar("T")


def parse_args(argv: list[str] | None = None) -> Config:
    """Read the command line (and the YAML file that `--config` names) into a checked `Config`.

    Raises:
        UserError: unknown flag or key, values out of range, settings that contradict each other.
        SystemExit: `--help` (0), or a value of the wrong type (2).
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    argv, config_path = _take_config_path(argv)
    reject_unknown_flags(argv, SETTINGS)
    from_file = _yaml_as_args(config_path) if config_path else []
    # One parser for both: the file's settings are flags that stand before the user's own.
    config = tyro.cli(
        Config,
        args=from_file + argv,
        prog="python -m jit_accel.train",
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        console_outputs=os.environ.get("RANK", "0") == "0",
        description=f"{Config.__doc__} --config FILE reads settings from a YAML file; flags win over it.",
    )
    if config.model.model is None and config.tune.init_from is None:
        config = config.updated(model=DEFAULT_MODEL)
    check(config)
    return config


def exit_code_of(run: Callable[[], int]) -> int:
    """What `run` returns; 2 where the user has something to mend, which one process says; 130 after Ctrl-C."""
    try:
        return run()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.everywhere:
            where = "" if error.everywhere else f" (process {rank})"
            say(f"error{where}: {message_of(error)}", sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # for programs that stop in order, the second one: at once
        return 128 + getattr(stop, "number", signal.SIGINT)


def parse_flags(settings: type[T], argv: list[str] | None, prog: str) -> T:
    """Read the command line of a program whose settings are the fields of this one dataclass.

    Raises:
        UserError: an unknown flag.
        SystemExit: `--help` (0), a missing flag or a value of the wrong type (2).
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    reject_unknown_flags(argv, {field.name: field for field in fields(settings)})
    return tyro.cli(
        settings,
        args=argv,
        prog=prog,
        use_underscores=True,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def _take_config_path(argv: list[str]) -> tuple[list[str], str | None]:
    rest, path = [], None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
            if path is None:
                raise UserError("no file behind it; write --config run.yaml.", about="config")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    return rest, path


def reject_unknown_flags(argv: list[str], settings: Mapping[str, Field]) -> None:
    """Raise `UserError` with the nearest match for a flag that is none of these fields of a configuration."""
    for argument in argv:
        if argument.startswith("--") and argument not in ("--", "--help"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            is_switch_off = name.startswith("no_") and name[3:] in settings and settings[name[3:]].type == "bool"
            if name not in settings and not is_switch_off:
                hint = nearest(name, settings, "--")
                raise UserError(f"{argument}: no such flag.{hint} --help lists them all.")


def _yaml_as_args(path: str) -> list[str]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read ({error}); give the path of a YAML file.", about="config", value=path
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", about="config", value=path) from None
    if not isinstance(values, dict):
        raise UserError("must hold `setting: value` lines, such as `batch_size: 32`.", about="config", value=path)
    args = []
    for name, value in values.items():
        if name not in SETTINGS:
            raise UserError(f"{name} is no setting.{nearest(str(name), SETTINGS)}", about="config", value=path)
        if isinstance(value, dict):
            raise UserError(f"{name} must be a plain value or a list, not a mapping.", about="config", value=path)
        if SETTINGS[name].type == "bool":
            if not isinstance(value, bool):
                raise UserError(f"{name}: {value} must be true or false.", about="config", value=path)
            args.append(f"--{name}" if value else f"--no_{name}")
        else:
            args += [f"--{name}", *map(_as_argument, value if isinstance(value, list) else [value])]
    return args


def _as_argument(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
