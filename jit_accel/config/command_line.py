"""From the command line and YAML files to checked settings, and the exit code of every program.

A setting is given as words: behind its flag, or as the text that stands in a file. Its type says what they mean.
"""

import ast
import contextlib
import gc
import inspect
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache, partial, reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from jit_accel.base.console import say
from jit_accel.base.errors import UserError, check_places, message_of, nearest
from jit_accel.config.checks import alternatives, check
from jit_accel.config.settings import SETTINGS, Config

T = TypeVar("T")
Words = list[str]

SWITCH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
OFF = ("false", "no", "off")
OPEN = ("none", "null", "~", "")  # for a setting that may be left open and is no text; of a single value also OFF
# Two names for one thing: the one that is given last counts.
SAME = (("epochs", "max_steps"), ("warmup_epochs", "warmup_steps"))
# What a list's one word may be cut at, where its items may have spaces, or spaces and commas.
SEPARATORS = {"wandb_tags": r"\s*,\s*", "classes": None}


def parse_args(argv: list[str] | None = None) -> Config:
    """Read the command line (and the YAML file that `--config` names) into a checked `Config`.

    What stands behind a lone `--` wins over what stands before it, a file over flags too: scripts put it between their
    own settings and the user's.

    Raises `UserError`: unknown flag or key, values out of range, settings that contradict each other; `SystemExit`
    as `parse_flags`.
    """
    return checked_config(read_settings(argv))


def read_settings(argv: list[str] | None) -> dict[str, Words]:
    """Return the words of each setting that a command line, or the YAML file that it names, gives; see `parse_args`."""
    stack: list[dict[str, Words]] = []
    recipe = None
    for flags in read_flags(argv, {"config": None} | SETTINGS):
        if (path := flags.pop("config", None)) is not None:
            if len(path) != 1 or not path[0]:
                raise UserError("no file behind it; write --config run.yaml.", about="config")
            stack = [values for values in stack if values is not recipe]
            stack.append(recipe := read_recipe(Path(path[0])))
        stack.append(flags)
    return reduce(over, stack)


def checked_config(values: dict[str, Words]) -> Config:
    """Return the checked settings that these words give. Raises as `parse_args`."""
    description = f"{Config.__doc__} --config FILE reads settings from a YAML file; flags win over it."
    config = _parsed(Config, dict(values), SETTINGS, "python -m jit_accel.train", description)
    check(config)
    return config


def parse_flags(settings: type[T], argv: list[str] | None, prog: str) -> T:
    """Read the command line of a program whose settings are the fields of this dataclass, or of groups in it.

    `UserError`: an unknown flag. `SystemExit`: `--help` (0), a missing flag or a value of the wrong type (2).
    """
    groups = [getattr(field.type, "__dataclass_fields__", {field.name: field}) for field in fields(settings)]
    known = {name: field for group in groups for name, field in group.items()}
    return _parsed(settings, reduce(over, read_flags(argv, known)), known, prog)


@cache
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


@contextlib.contextmanager
def importing_torch() -> Iterator[None]:
    """Keep the collector of garbage off while a program imports torch, a fifth of which it would take.

    It passes over the modules later, too. Programs import only once their flags are known to be right, so that --help
    and wrong ones are answered at once.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def read_flags(argv: list[str] | None, settings: Mapping[str, Field | None]) -> list[dict[str, Words]]:
    """Return the words behind each flag, the last of equal ones, for each part that a lone `--` divides.

    Raises `UserError`: a flag that is none of these settings, with the nearest match; words that stand behind none.
    """
    parts: list[dict[str, Words]] = [{}]
    words = None
    for argument in sys.argv[1:] if argv is None else argv:
        if argument == "--":
            parts.append({})
            words = None
        elif argument in ("-h", "--help"):
            parts[-1]["help"] = []
        elif re.match("--[A-Za-z]", argument):
            flag, equals, value = argument.partition("=")
            name = flag[2:].replace("-", "_")
            switch = name.removeprefix("no_")
            if name not in settings and not (switch in settings and settings[switch].type is bool):
                raise UserError(f"{argument}: no such flag.{nearest(name, settings, '--')} --help lists them all.")
            parts[-1].pop(switch if name not in settings else f"no_{name}", None)
            words = parts[-1][name] = [value] if equals else []
        elif words is None:
            raise UserError(f"{argument}: stands behind no flag. --help lists them all.")
        else:
            words.append(argument)
    return [dict(_positive(part, settings)) for part in parts]


def _positive(part: Mapping[str, Words], settings: Mapping[str, Field | None]) -> Iterator[tuple[str, Words]]:
    """Yield flags with `--no_name` as `--name false`."""
    for name, words in part.items():
        if name in settings or name == "help":
            yield name, words
        else:
            yield name.removeprefix("no_"), ["false" if _is_on(name, words) else "true"]


def over(lower: Mapping[str, Words], upper: Mapping[str, Words]) -> dict[str, Words]:
    """Return settings over others, which also lose what says the same by another name, or no longer fits."""
    given = {name: words for name, words in upper.items() if words != ["None"]}
    lost = {other for pair in SAME for name, other in (pair, pair[::-1]) if name in given}
    for warmup, length in zip(*reversed(SAME)):
        if length in given and warmup in lower and _number(lower[warmup]) > _number(given[length]):
            lost.add(warmup)
    return {name: words for name, words in lower.items() if name not in lost} | upper


def _number(words: Words) -> float:
    """Return the number that they are; NaN, which is neither above nor below any other, for anything else."""
    for number in (float, lambda word: int(word, 0)):  # 0x10 is one of the latter alone
        with contextlib.suppress(TypeError, ValueError):
            return float(number(*words))
    return float("nan")


def read_recipe(path: Path, above: tuple[str, ...] = ()) -> dict[str, Words]:
    """Return the settings of a YAML file, over those of the file that it names as its `base`, if any.

    `UserError`: a file that cannot be read, is no YAML, or is its own base; an unknown setting.
    """
    import yaml

    check_places({"config": str(path)})
    wrong = partial(UserError, about="config", value=path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(f"cannot be read ({error}); give the path of a YAML file.") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # of a tag's own reader
        raise wrong(f"not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise wrong("must hold `setting: value` lines, such as `batch_size: 32`.")
    base, files = values.pop("base", None), (*above, os.path.realpath(path))
    found = {}
    for name, value in values.items():
        if name not in SETTINGS:
            raise wrong(f"{name} is no setting.{nearest(str(name), SETTINGS)}")
        parts = value if isinstance(value, list) else [value]
        found[name] = list(map(str, parts))
        if any(isinstance(part, dict | list) for part in parts):
            raise wrong(f"{name} must be a plain value or a list, not a mapping.")
        if SETTINGS[name].type is bool and str(value).lower() not in SWITCH:
            raise wrong(f"{name}: {value} must be true or false.")
    if base is None:
        return found
    file = path.parent / str(base)
    check_places({"config": str(file)})
    if os.path.realpath(file) in files:
        raise wrong(f"its base {base} has it as a base: leave one of them out.")
    return over(read_recipe(file, files), found)


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds, with numbers, dates and the words for true and false as the text they are.

    YAML alone would make `no` False, 1e-4 text, 010 the number 8, 12:30 the number 750, and 1.10 the same as 1.1.
    """
    import yaml

    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, type("TextLoader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": kept}))


def _parsed(
    settings: type[T], values: dict[str, Words], known: Mapping[str, Field], prog: str, description: str | None = None
) -> T:
    import tyro

    check_places(values)
    names = {"config": (tyro.conf.OmitArgPrefixes,), "use_underscores": True}
    is_main = os.environ.get("RANK", "0") == "0"
    for group in filter(is_dataclass, (settings, *(field.type for field in fields(settings)))):
        _put_defaults_in_words(group)
    if values.pop("help", None) is not None:
        arguments = ["--help"]
    else:
        kinds = {name: known[name].type for name in values if not _is_taken_back(values[name], known[name].type)}
        arguments = [argument for name, kind in kinds.items() for argument in _spelled(name, values[name], kind)]
    return tyro.cli(settings, args=arguments, prog=prog, description=description, console_outputs=is_main, **names)


def _is_taken_back(words: Words, kind: Any) -> bool:
    """Return whether they leave open, as a file's null does, what cannot be: then its default counts."""
    return words == ["None"] and kind is not bool and type(None) not in alternatives(kind)


def _spelled(name: str, words: Words, kind: Any) -> Words:
    """Return a setting as the arguments that tyro takes for this type, where the words are meant for it."""
    if kind is bool:
        return [f"--{name}" if _is_on(name, words) else f"--no_{name}"]
    kinds = alternatives(kind)
    is_list, has_choices = (any(get_origin(each) is origin for each in kinds) for origin in (tuple, Literal))
    word = words[0].strip().lower() if len(words) == 1 else None
    is_list = is_list and not (int in kinds and words and len(_items(name, words[0])) == len(words) == 1)
    is_open = word in OPEN or (word in OFF and not is_list and not has_choices)
    if is_open and type(None) in kinds and str not in kinds:
        words = ["None"]
    elif is_list:
        items = [item for word in words for item in _items(name, word)]
        is_empty = words == [""] or (name == "report_to" and word in (*OPEN, *OFF))
        words = [] if is_empty and name in SETTINGS else items or words  # others refuse what names nothing
        return [f"--{name}={words[0]}", *words[1:]] if words else [f"--{name}"]
    elif len(words) == 1:
        words = [_meant(name, words[0], kinds)]
    return [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]


def _is_on(name: str, words: Words) -> bool:
    """Return what the words behind a switch say; none at all switch it on."""
    if not words:
        return True
    word = " ".join(words)
    if word.lower() not in SWITCH:
        raise UserError("must be true or false.", about=name, value=word)
    return SWITCH[word.lower()]


def _items(name: str, word: str) -> Words:
    """Return the items of a list that stand in one word: 0.9,0.99 or (0.9, 0.99) or ['a', 'b']."""
    import yaml

    separator = SEPARATORS.get(name, r"[\s,]+")
    if re.fullmatch(r"\[.*\]" if name in SEPARATORS else r"\[.*\]|\(.*\)", word):  # a class may be called (other)
        try:
            return [str(item) for item in read_yaml(f"[{word[1:-1]}]")]
        except yaml.YAMLError:
            return [word]
    if separator is None or not re.search(separator, word):
        return [word]
    return [item for item in re.split(separator, word.strip()) if item]


def _meant(name: str, word: str, kinds: tuple) -> str:
    """Return the word that tyro takes for a type: 32 for 32.0, the choice that a word for true or false means."""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    choices += ["None"] if choices and type(None) in kinds else []
    is_number = (int in kinds or float in kinds) and (str not in kinds or name == "holdout")
    choices = choices or {"resume": ["auto", "none"]}.get(name, ["0"] if is_number and word.lower() in OFF else [])
    switch = SWITCH.get(word.lower())
    if word not in choices and switch is not None:
        meant = ("true", "auto") if switch else ("false", "no", "none", "None", "0")
        return next((choice for choice in meant if choice in choices), word)
    number = _number([word])
    if int in kinds and not re.fullmatch(r"\s*[+-]?\d[\d_]*\s*", word) and number == number // 1:
        return str(int(number))
    return word
