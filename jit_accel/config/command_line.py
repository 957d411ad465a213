"""From the command line and YAML files to checked settings, and the exit code of every program."""

import argparse
import ast
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jit_accel.base.console import say
from jit_accel.base.errors import UserError, message_of, nearest
from jit_accel.config.checks import check
from jit_accel.config.settings import SETTINGS, Config

T = TypeVar("T")


def parse_args(argv: list[str] | None = None) -> Config:
    """Read the command line, and the file that `--config` names, into a checked `Config`; errors as `parse_flags`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    known, argv = parser.parse_known_args(argv)
    if known.config == "":
        raise UserError("no file behind it; write --config run.yaml.", about="config")
    if known.config:  # one parser for both: the file's settings are flags that stand before the user's own
        argv = [*_as_arguments(read_recipe(Path(known.config)), known.config), *argv]
    description = f"{Config.__doc__} --config FILE reads settings from a YAML file; flags win over it."
    config = parse_flags(Config, argv, "python -m jit_accel.train", description)
    check(config)
    return config


def parse_flags(settings: type[T], argv: list[str] | None, prog: str, description: str | None = None) -> T:
    """Read the command line of a program whose settings are the fields of this dataclass, or of groups in it.

    `UserError`: an unknown flag. `SystemExit`: `--help` (0), a missing flag or a value of the wrong type (2).
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    groups = [getattr(field.type, "__dataclass_fields__", {field.name: field}) for field in fields(settings)]
    known = {name: field for group in groups for name, field in group.items()}
    for argument in argv:
        if argument.startswith("--") and argument not in ("--", "--help"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            switch = known.get(name.removeprefix("no_"))
            if name not in known and not (switch and switch.type is bool):
                raise UserError(f"{argument}: no such flag.{nearest(name, known, '--')} --help lists them all.")
    if {"-h", "--help"} & {*argv}:
        for group in filter(is_dataclass, (settings, *(field.type for field in fields(settings)))):
            _put_defaults_in_words(group)
    names = {"config": (tyro.conf.OmitArgPrefixes,), "use_underscores": True}
    is_main = os.environ.get("RANK", "0") == "0"
    return tyro.cli(settings, args=argv, prog=prog, description=description, console_outputs=is_main, **names)


def _put_defaults_in_words(group: type) -> None:
    """Let tyro show the docstrings of these settings as one text, which says itself what an open one comes to."""
    import tyro

    statements = ast.parse(inspect.getsource(group)).body[0].body
    for setting, text in itertools.pairwise(statements):
        if isinstance(setting, ast.AnnAssign) and isinstance(text, ast.Expr):
            name, words = setting.target.id, " ".join(text.value.value.split())
            hint = "" if getattr(group, name, "") in (None, ()) else None  # None: the default as it is
            annotation = tyro.conf.arg(help=words, help_behavior_hint=hint)
            group.__annotations__[name] = Annotated[group.__annotations__[name], annotation]


def exit_code_of(run: Callable[[], int]) -> int:
    """Return what `run` returns; 2 after an error of the user, which one process prints; 130 after Ctrl-C."""
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


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a YAML file over those of its `base`; `above` are the files that have it as theirs.

    `UserError`: a file that cannot be read, is no YAML, or is its own base; an unknown setting.
    """
    import yaml

    wrong = partial(UserError, about="config", value=path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(f"cannot be read ({error}); give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise wrong(f"not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise wrong("must hold `setting: value` lines, such as `batch_size: 32`.")
    base, files = values.pop("base", None), (*above, path.resolve())
    for name in values:
        if name not in SETTINGS:
            raise wrong(f"{name} is no setting.{nearest(str(name), SETTINGS)}")
    if base is None:
        return values
    file = path.parent / str(base)
    if file.resolve() in files:
        raise wrong(f"its base {base} has it as a base: leave one of them out.")
    return read_recipe(file, files) | values


def _as_arguments(values: Mapping[str, Any], path: str) -> list[str]:
    """Return settings of a file as flags: YAML takes 1e-4 for text, which a flag's type makes a number."""
    arguments = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise UserError(f"{name} must be a plain value or a list, not a mapping.", about="config", value=path)
        if SETTINGS[name].type is not bool:
            parts = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)]
        elif isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        else:
            raise UserError(f"{name}: {value} must be true or false.", about="config", value=path)
    return arguments
