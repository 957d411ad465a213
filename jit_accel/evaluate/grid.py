"""The settings that a sweep goes over, read from flags, whose values raise `UserError`. Imports no torch."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation

from jit_accel.base.errors import UserError, lookup
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
        # Without guidance the interval makes no difference; JSON has lists for pairs.
        interval = None if self.is_unguided or self.guidance_interval is None else tuple(self.guidance_interval)
        object.__setattr__(self, "guidance_interval", interval)

    @property
    def is_unguided(self) -> bool:
        return self.guidance_scale == 1

    @property
    def sampling(self) -> dict:
        """The fields of `SamplerSettings`."""
        return {name: value for name, value in asdict(self).items() if name != "ema"}

    def interval_text(self, form: str = "{:g} to {:g}") -> str:
        """The interval in words; "" without one."""
        return form.format(*self.guidance_interval) if self.guidance_interval else ""

    def __str__(self) -> str:
        ema = f"EMA {self.ema}, " if self.ema else ""
        guidance = f"guidance {self.guidance_scale:g}{self.interval_text(' in ({:g}, {:g})')}"
        guidance = "no guidance" if self.is_unguided else guidance
        return f"{ema}{guidance}, {self.num_inference_steps} {self.method} steps"


def grid(
    ema: Sequence[str | None],
    guidance_scale: Sequence[float],
    guidance_interval: Sequence[Interval],
    num_inference_steps: Sequence[int],
    method: Sequence[str],
    with_unguided: bool = True,
) -> list[Setting]:
    """Return all combinations, sorted, each once; with `with_unguided` those at guidance 1 too."""
    scales = sorted({*guidance_scale, 1.0} if with_unguided else {*guidance_scale})
    axes = itertools.product(ema, method, num_inference_steps, guidance_interval, scales)
    settings = [Setting(average, scale, interval, steps, solver) for average, solver, steps, interval, scale in axes]
    return list(dict.fromkeys(settings))


def axes_of(config) -> dict[str, list]:
    """Return the values of the flags that name settings, by the fields of `Setting`; [] for the pipeline's own."""
    return {name: read(name, getattr(config, name)) if getattr(config, name) else [] for name, read in AXES.items()}


def is_sweep(axes: dict[str, list]) -> bool:
    """Return True for more than one setting."""
    return ALL in axes["ema"] or any(len(values) > 1 for values in axes.values())


def words(parts: Iterable[str]) -> list[str]:
    """Return the words that commas or spaces divide, each once."""
    return list(dict.fromkeys(piece for part in parts for piece in str(part).replace(",", " ").split()))


def numbers(flag: str, parts: Iterable[str], least: float = 0, most: float = math.inf) -> list[float]:
    """Return the values of a flag in order: numbers and ranges `start:stop:step` with both ends, exact in decimals."""
    values: list[float] = []
    for part in words(parts):
        ends = [_decimal(flag, end, part) for end in part.split(":")]
        if len(ends) not in (1, 3):
            raise UserError("a range is start:stop:step, such as 1.0:4.0:0.1.", about=flag, value=part)
        start, stop, step = ends if len(ends) == 3 else (ends[0], ends[0], Decimal(1))
        if step <= 0 or start > stop:
            raise UserError("must have start <= stop and a step above 0, such as 1.0:4.0:0.1.", about=flag, value=part)
        count = int((stop - start) / step) + 1
        if len(values) + count > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES:,} values: take a larger step.", about=flag, value=part)
        values += [float(start + i * step) for i in range(count)]
    for value in values:
        if not least <= value <= most:
            limit = f"at least {least:g}" if value < least else f"at most {most:,}"
            raise UserError(f"must be {limit}.", about=flag, value=f"{value:g}")
    if not values:
        raise UserError("no value: give a number, a list 1,1.5,2 or a range 1.0:4.0:0.1.", about=flag)
    return sorted(set(values))


def whole_numbers(flag: str, parts: Iterable[str]) -> list[int]:
    """Return the same for numbers of steps, 1 or more."""
    values = numbers(flag, parts, 1, MOST_STEPS)
    for value in values:
        if value != int(value):
            raise UserError("must be a whole number.", about=flag, value=f"{value:g}")
    return [int(value) for value in values]


def intervals(flag: str, parts: Iterable[str]) -> list[Interval]:
    """Return intervals of t: `low:high`, several with commas or spaces between; or two numbers, `0.1 1.0`, for one."""
    if not any(":" in part for part in words(parts)):
        ends = [piece for part in parts for piece in part.replace(",", " ").split()]  # two may be equal
        parts = [":".join(ends[start : start + 2]) for start in range(0, len(ends), 2)]
    found = []
    for part in words(parts):
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
    """Return names of solvers."""
    names = words(part.lower() for part in parts)
    return [lookup(dict(zip(METHODS, METHODS)), name, flag) for name in names]


def averages(flag: str, parts: Iterable[str], available: Sequence[str]) -> list[str]:
    """Return names of averages out of those `available`: `all` is all of them, `model` the weights themselves."""
    table = {name: [name] for name in (*available, UNAVERAGED)} | {ALL: list(available)}
    found = []
    for part in words(parts):
        alike = [name for name in table if _number(name) == _number(part) is not None]  # 0.99990 is 0.9999
        found += lookup(table, alike[0] if alike else part, flag, rule="not there")
    return list(dict.fromkeys(found))


def _decimal(flag: str, text: str, part: str) -> Decimal:
    value = _number(text)
    if value is None or math.isinf(float(value)):
        remedy = "give numbers such as 1.5, lists such as 1,1.5,2 and ranges start:stop:step such as 1.0:4.0:0.1."
        raise UserError(f"{text!r} is not a number: {remedy}", about=flag, value=part)
    return value


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


# How the values of each flag are read; names of averages are compared with those of the checkpoint later.
AXES = {
    "ema": lambda flag, parts: words(parts),
    "guidance_scale": numbers,
    "guidance_interval": intervals,
    "num_inference_steps": whole_numbers,
    "method": methods,
}
