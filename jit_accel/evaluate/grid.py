"""The grid of a sweep: which settings its flags name. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation

from jit_accel.base.errors import UserError, nearest
from jit_accel.config.settings import MOST_STEPS, UNAVERAGED

ALL = "all"
METHODS = ("heun", "euler")
MAX_VALUES = 10_000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """One way to draw images. `ema` None: the weights of the pipeline folder. Guidance 1 has no interval."""

    ema: str | None = None
    guidance_scale: float = 1.0
    guidance_interval: Interval | None = None
    num_inference_steps: int = 50
    method: str = "heun"

    def __post_init__(self):
        if self.guidance_scale == 1:  # where it acts makes no difference then
            object.__setattr__(self, "guidance_interval", None)

    @property
    def is_unguided(self) -> bool:
        return self.guidance_scale == 1

    def unguided(self) -> Setting:
        """The same without guidance."""
        return replace(self, guidance_scale=1.0)

    def plain(self) -> dict:
        """As JSON has it."""
        interval = self.guidance_interval
        return {**asdict(self), "guidance_interval": None if interval is None else list(interval)}

    def __str__(self) -> str:
        ema = f"EMA {self.ema}, " if self.ema else ""
        interval = ""
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            interval = f" in ({low:g}, {high:g})"
        guidance = "no guidance" if self.is_unguided else f"guidance {self.guidance_scale:g}{interval}"
        return f"{ema}{guidance}, {self.num_inference_steps} {self.method} steps"


def setting_of(plain: dict) -> Setting:
    """The inverse of `Setting.plain`."""
    interval = plain["guidance_interval"]
    return Setting(**{**plain, "guidance_interval": None if interval is None else tuple(interval)})


def grid(
    emas: Sequence[str | None],
    guidance_scales: Sequence[float],
    guidance_intervals: Sequence[Interval],
    num_inference_steps: Sequence[int],
    methods: Sequence[str],
    with_unguided: bool = True,
) -> list[Setting]:
    """All combinations, sorted; each once, and with `with_unguided` also guidance 1."""
    scales = {*guidance_scales, 1.0} if with_unguided else {*guidance_scales}
    axes = (emas, methods, num_inference_steps, guidance_intervals, sorted(scales))
    found = [
        Setting(ema, scale, interval, steps, method)
        for ema, method, steps, interval, scale in itertools.product(*map(dict.fromkeys, axes))
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Axes:
    """What a sweep goes over; nothing on an axis means the pipeline's own. `emas` are names as they were given."""

    emas: list[str]
    guidance_scales: list[float]
    guidance_intervals: list[Interval]
    num_inference_steps: list[int]
    methods: list[str]

    @property
    def is_sweep(self) -> bool:
        """Whether there is more than one setting."""
        axes = (self.emas, self.guidance_scales, self.guidance_intervals, self.num_inference_steps, self.methods)
        return ALL in self.emas or any(len(axis) > 1 for axis in axes)


def names(parts: Iterable[str]) -> list[str]:
    """Names with commas or spaces between them, each once."""
    return list(dict.fromkeys(_split(parts)))


def numbers(flag: str, parts: Iterable[str], at_least: float = 0.0) -> list[float]:
    """The values of a flag: numbers and ranges `start:stop:step` that hold both ends, exact in decimals, in order.

    Raises:
        UserError: not a number, not a range, below `at_least`, or too many.
    """
    values: list[float] = []
    for part in _split(parts):
        values += _range(flag, part) if ":" in part else [float(_decimal(flag, part, part))]
        if len(values) > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES:,} values: take a larger step.", about=flag, value=part)
    for value in values:
        if not value >= at_least or math.isinf(value):
            raise UserError(f"must be at least {at_least:g}.", about=flag, value=f"{value:g}")
    if not values:
        raise UserError("no value: give a number, a list 1,1.5,2 or a range 1.0:4.0:0.1.", about=flag)
    return sorted(set(values))


def whole_numbers(flag: str, parts: Iterable[str]) -> list[int]:
    """The same for numbers of steps, 1 or more."""
    values = numbers(flag, parts, at_least=1)
    for value in values:
        if value > MOST_STEPS:
            raise UserError(f"must be at most {MOST_STEPS:,}.", about=flag, value=f"{value:g}")
        if value != int(value):
            raise UserError("must be a whole number.", about=flag, value=f"{value:g}")
    return [int(value) for value in values]


def intervals(flag: str, parts: Iterable[str]) -> list[Interval]:
    """Intervals of t: `low:high`, several with commas or spaces between them; or two numbers, `0.1 1.0`, for one.

    Raises:
        UserError: not of that form, or not 0 <= low <= high <= 1.
    """
    parts = _split(parts)
    if parts and not any(":" in part for part in parts) and len(parts) % 2 == 0:
        parts = [f"{low}:{high}" for low, high in zip(parts[::2], parts[1::2])]
    found = []
    for part in parts:
        ends = part.split(":")
        if len(ends) != 2:
            raise UserError("must be low:high, such as 0.1:1.0; several as 0.1:1.0,0:1.", about=flag, value=part)
        low, high = (float(_decimal(flag, end, part)) for end in ends)
        if not 0 <= low <= high <= 1:
            raise UserError("must be low:high with 0 <= low <= high <= 1, such as 0.1:1.0.", about=flag, value=part)
        found.append((low, high))
    if not found:
        raise UserError("no interval: give low:high, such as 0.1:1.0.", about=flag)
    return list(dict.fromkeys(found))


def methods(flag: str, parts: Iterable[str]) -> list[str]:
    """Names of solvers.

    Raises:
        UserError: one that is none.
    """
    found = [part.lower() for part in _split(parts)]
    for name in found:
        if name not in METHODS:
            raise UserError(f"choose from {', '.join(METHODS)}.{nearest(name, METHODS)}", about=flag, value=name)
    return list(dict.fromkeys(found))


def averages(flag: str, parts: Iterable[str], available: Sequence[str]) -> list[str]:
    """Names of averages out of those `available`: `all` is all of them, `model` the weights themselves.

    Raises:
        UserError: one that is not there.
    """
    found: list[str] = []
    for part in _split(parts):
        known = {UNAVERAGED: UNAVERAGED, **{name: name for name in available}}
        by_value = {_as_number(name): name for name in available if _as_number(name) is not None}
        if part == ALL:
            found += available
        elif part in known:
            found.append(part)
        elif _as_number(part) in by_value:  # 0.99990 is 0.9999
            found.append(by_value[_as_number(part)])
        else:
            choices = (*available, UNAVERAGED, ALL)
            raise UserError(
                f"not there; choose from {', '.join(choices)}.{nearest(part, choices)}", about=flag, value=part
            )
    if not found:
        raise UserError(f"no average: choose from {', '.join((*available, UNAVERAGED, ALL))}.", about=flag)
    return list(dict.fromkeys(found))


def _split(parts: str | Iterable[str]) -> list[str]:
    parts = [parts] if isinstance(parts, str) else parts
    return [piece for part in parts for piece in str(part).replace(",", " ").split()]


def _range(flag: str, text: str) -> list[float]:
    ends = text.split(":")
    if len(ends) != 3:
        raise UserError("a range is start:stop:step, such as 1.0:4.0:0.1.", about=flag, value=text)
    start, stop, step = (_decimal(flag, end, text) for end in ends)
    if step <= 0 or start > stop:
        raise UserError("must have start <= stop and a step above 0, such as 1.0:4.0:0.1.", about=flag, value=text)
    count = int((stop - start) / step) + 1
    if count > MAX_VALUES:
        raise UserError(f"more than {MAX_VALUES:,} values: take a larger step.", about=flag, value=text)
    return [float(start + i * step) for i in range(count)]


def _decimal(flag: str, text: str, whole: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or math.isinf(float(value)):
        raise UserError(
            f"{text!r} is no number: give numbers such as 1.5, lists such as 1,1.5,2 and ranges "
            "start:stop:step such as 1.0:4.0:0.1.",
            about=flag,
            value=whole,
        )
    return value


def _as_number(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None
