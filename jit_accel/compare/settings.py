"""The settings of `jit_accel.compare`, and the trainings that its words name; imports no torch."""

import contextlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

from jit_accel.base.errors import UserError, check_ranges, lookup, message_of, renamed_settings, within
from jit_accel.config.command_line import Words, checked_config, over, parse_flags, read_flags, read_settings
from jit_accel.config.settings import SETTINGS
from jit_accel.evaluate.drawing import axes_of
from jit_accel.evaluate.settings import (
    PAIR_SCORES,
    READING,
    EvaluateConfig,
    chosen_metrics,
    chosen_scores,
    metric_names,
)
from jit_accel.evaluate.settings import check as check_evaluation

# Settings of a training that each run is given its own of, and those of an evaluation; what to use instead.
OF_RUNS = dict.fromkeys(("output_dir", "resume", "dry_run", "wandb_name", "push_to_hub"), "leave it out") | {
    "seed": "use --seeds"
}
OF_EVALUATIONS = ("model", "images", "make_reference", "output", "write_best", "unguided", "few_on_card")
LENGTHS = ("epochs", "max_steps")
QUOTED = ("--evaluate", "--launch")  # whose value is a command line
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,59}")
YAML = (".yaml", ".yml")
HIGHER_IS_BETTER = ("psnr", "ssim")
RANGES = [*within(1, 1000, "seeds"), *within(5, 100_000, "time_steps")]


@dataclass(frozen=True)
class CompareConfig:
    """Train two or more settings with the same seeds, and say which is better and how sure that is.

    python -m jit_accel.compare BASE OTHER ... --output_dir DIR -- FLAGS

    BASE and each OTHER is a name with flags of jit_accel.train ("muon: --optimizer muon"), a YAML file, or both ("muon:
    muon.yaml --learning_rate 0.01"). OTHER states what differs from BASE. FLAGS are common to all, and win over files.
    Runs of the same seed have the same images in the same order, the same noise and initial weights. The same command
    goes on where it was stopped.
    """

    output_dir: str
    """Folder of the runs and of the results: compare.md, compare.json, compare.png."""
    seeds: int = 5
    """Runs of each setting, with the seeds 0, 1, ...; a greater number later adds runs."""
    equal: Literal["steps", "time"] = "steps"
    """What all settings have equally much of. With time those beside the base have as many steps as fit into its time,
    by short runs that measure a step on this machine."""
    time_steps: int = 40
    """Steps of each of those short runs, of which there are two for each setting."""
    evaluate: str = ""
    """Flags of jit_accel.evaluate, quoted: "--reference photos --num_images 5000 --features efficientnet_lite0"
    (default: its own, with the images that were trained on as --reference)."""
    metric: str | None = None
    """Metric to compare by (default: the Fréchet distance; with --pairs the first of its --metrics)."""
    launch: str | None = None
    """Launcher that stands before -m jit_accel.train, quoted, such as "accelerate launch --num_processes 2" (default:
    this Python)."""


class Arm(NamedTuple):
    """One of the settings that are compared: its name, its words by setting, and all settings as they are recorded."""

    name: str
    words: dict[str, Words]
    recorded: dict[str, Any]
    uses_wandb: bool

    def flags(self, **more: object) -> list[str]:
        """Return the command line of `jit_accel.train` with these settings over its own."""
        given = over(self.words, {name: [str(value)] for name, value in more.items()})
        return [part for name, words in given.items() for part in _as_flag(name, words)]


class Measure(NamedTuple):
    """The evaluation of each run: its flags, and the name of the deciding result among its metrics."""

    flags: list[str]
    metric: str
    is_better_higher: bool
    num_images: int

    def words(self) -> dict[str, str]:
        """Return the words of each flag, in one."""
        parts = reduce(over, read_flags(self.flags, EvaluateConfig.__dataclass_fields__))
        return {name: " ".join(words) for name, words in parts.items()}


def check(settings: CompareConfig) -> None:
    """Raise `UserError` for settings out of range."""
    check_ranges(vars(settings), RANGES)
    if settings.launch is not None:
        program = next(iter(_shell_words("launch", settings.launch)), "")
        if shutil.which(program) is None:
            rule = f"{program!r} is no program here: give a launcher, such as 'accelerate launch', or leave it out."
            raise UserError(rule, about="launch", value=settings.launch)


def divided(argv: Sequence[str] | None) -> tuple[list[str], list[str], list[str]]:
    """Return the texts of the settings to compare, the program's own flags, and those that are common to all.

    Raises `UserError`: fewer than two settings, unless help is asked for.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    own, common = argv[:at], argv[at + 1 :]
    first = next((index for index, word in enumerate(own) if word.startswith("-")), len(own))
    texts, flags, rest = own[:first], [], iter(own[first:])
    if len(texts) < 2 and not {"-h", "--help"} & {*own}:
        rule = f"{len(texts)} settings to compare: give two or more before the first flag, such as base.yaml "
        raise UserError(f"{rule}'muon: --optimizer muon'. --help says more.")
    for word in rest:
        value = next(rest, None) if word in QUOTED else None
        flags.append(word if value is None else f"{word}={value}")
    return texts, flags, common


def read_arms(texts: Sequence[str], common: list[str], equal: str) -> list[Arm]:
    """Return the settings to compare, the base first, all of them checked.

    Raises `UserError`: a name that stands twice, what `jit_accel.train` refuses, unequal lengths.
    """
    with _naming("behind --"):
        shared = _read(common)
    arms: list[Arm] = []
    below: dict[str, Words] = {}
    for text in texts:
        name, argv = _parted(text)
        if any(name.lower() == arm.name.lower() for arm in arms):
            raise UserError(f"two settings are called {name}: put another name and a colon before one of them.")
        with _naming(name):
            own = _read(argv)
            if arms and equal == "time" and (given := next((key for key in LENGTHS if key in own), None)):
                raise UserError("follows from --equal time: leave it out.", about=given, value=" ".join(own[given]))
            _refuse_common(own, argv, shared)
            own = over(below, own)
            words = over(own, shared)
            for setting in OF_RUNS:
                words.pop(setting, None)
            config = checked_config(words)
        arms.append(Arm(name, words, config.recorded(), config.tracking.use_wandb or bool(config.tracking.report_to)))
        below = below or own
    if equal == "steps":
        _check_lengths(arms)
    return arms


def read_measure(settings: CompareConfig, arms: Sequence[Arm]) -> Measure:
    """Return the evaluation of each run; `UserError` for flags that `jit_accel.evaluate` refuses, or for a sweep."""
    flags = _shell_words("evaluate", settings.evaluate)
    with _naming("--evaluate"):
        given = reduce(over, read_flags(flags, EvaluateConfig.__dataclass_fields__))
        for name in OF_EVALUATIONS:
            if name in given:
                raise UserError("is given by jit_accel.compare: leave it out.", about=name, value=" ".join(given[name]))
        if not {"reference", "pairs"} & given.keys():
            flags += _reference_of(arms)
        flags.append("--no_unguided")
        config = parse_flags(EvaluateConfig, [*flags, "--model=run"], "python -m jit_accel.evaluate")
        check_evaluation(config)
        for name, values in axes_of(config).items():
            if len(values) > 1 or values == ["all"]:
                raise UserError("must be one value: there is no sweep.", about=name, value=" ".join(map(str, values)))
    wanted = config.metrics or ((settings.metric,) if settings.metric else ())
    with renamed_settings(**({} if config.metrics else {"metrics": "metric"})):
        if config.pairs is None:
            found = chosen_metrics(config.features, wanted or ("fd",))
        else:
            scores, distance = chosen_scores(wanted, config.features)
            found = (distance,) if distance and not config.metrics else (*scores, *filter(None, [distance]))
    rows = metric_names(config.features)
    choices = {name: name for name in found} | {row.short: name for name, row in rows.items() if name in found}
    metric = lookup(choices, settings.metric, "metric") if settings.metric else found[0]
    is_higher = metric in HIGHER_IS_BETTER if metric in PAIR_SCORES else rows[metric].is_better_higher
    if not config.metrics and (wanted or config.pairs is None):
        flags.append(f"--metrics={wanted[0] if wanted else 'fd'}")
    return Measure(flags, metric, is_higher, config.num_images)


def differences(base: Arm, other: Arm) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two differ, by name: the base's value and the other's."""
    pairs = {name: (value, other.recorded[name]) for name, value in base.recorded.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in OF_RUNS}


def _parted(text: str) -> tuple[str, list[str]]:
    """Return the name of a setting and its command line, files as `--config`."""
    name, colon, rest = text.partition(":")
    if text.endswith(YAML) and (not colon or re.match(r"[A-Za-z]:[/\\]", text)):  # C:/base.yaml is a file alone
        name, rest = re.split(r"[/\\]", text)[-1].rpartition(".")[0], shlex.quote(text)
    name = name.strip()
    if not NAME.fullmatch(name):
        rule = "is no name: write letters, digits and -_.+ before the colon, such as 'muon: --optimizer muon'."
        raise UserError(f"{text!r}: {name!r} {rule}")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"{text!r}: cannot be read ({error}).") from None
    argv: list[str] = []
    while words and not words[0].startswith("--"):
        if not words[0].endswith(YAML):
            rule = f"{words[0]} is neither a flag nor a YAML file: flags begin with --, files end in .yaml."
            raise UserError(f"{text!r}: {rule}")
        argv += ["--config", words.pop(0)]
    return name, [*argv, *words]


def _read(argv: list[str]) -> dict[str, Words]:
    """Return the words of a command line; those that each run has its own of may stand in files alone."""
    for part in read_flags(argv, {"config": None} | SETTINGS):
        for name in part:
            if name == "help":
                raise UserError("--help: stands before -- and the settings; python -m jit_accel.train has one, too.")
            if name in OF_RUNS:
                rule = f"is given to each run by jit_accel.compare: {OF_RUNS[name]}."
                raise UserError(rule, about=name, value=" ".join(part[name]))
    return read_settings(argv)


def _refuse_common(own: dict[str, Words], argv: list[str], shared: dict[str, Words]) -> None:
    """Raise `UserError` for a flag of one setting that all have another value of."""
    flags = {name for part in read_flags(argv, {"config": None} | SETTINGS) for name in part}
    for name in flags & shared.keys():
        if own[name] != shared[name]:
            rule = f"is {' '.join(shared[name])} behind --, for all: leave it out there, and give it to each."
            raise UserError(rule, about=name, value=" ".join(own[name]))


def _check_lengths(arms: Sequence[Arm]) -> None:
    """Raise `UserError` where settings have another number of steps than the base."""
    base = arms[0]
    for arm in arms[1:]:
        if any(arm.recorded[name] != base.recorded[name] for name in LENGTHS):
            rule = f"{arm.name} trains for another length than {base.name}: give both the same, or --equal time."
            raise UserError(rule, about="equal", value="steps")
        batch = "batch_size", "gradient_accumulation_steps"
        if base.recorded["max_steps"] is None and any(arm.recorded[name] != base.recorded[name] for name in batch):
            rule = f"{arm.name} has other batches than {base.name}, so that epochs have other numbers of steps: "
            raise UserError(f"{rule}give --max_steps, or --equal time.", about="equal", value="steps")


def _reference_of(arms: Sequence[Arm]) -> list[str]:
    """Return the flags of the real images that all are trained on; `UserError` where these are not the same."""
    names = ("data_path", "split", *READING)
    for arm in arms[1:]:
        if name := next((name for name in names if arm.words.get(name) != arms[0].words.get(name)), None):
            rule = f"is needed, since {arm.name} has another {name} than {arms[0].name}: name the real images for all."
            raise UserError(rule, about="reference")
    found = {"reference" if name == "data_path" else name: arms[0].words.get(name) for name in names}
    return [part for name, words in found.items() if words is not None for part in _as_flag(name, words)]


def _as_flag(name: str, words: Words) -> list[str]:
    return [f"--{name}={words[0]}", *words[1:]] if words else [f"--{name}"]


def _shell_words(about: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot be read ({error}).", about=about, value=text) from None


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Raise the block's errors with the place of the wrong word before them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {message_of(error)}") from None
