"""The values of flags that may name several: words, numbers and ranges, intervals, averages."""

import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial

from jit_accel.base.errors import UserError, lookup
from jit_accel.config.groups import UNAVERAGED, problem_of_width, width_of

ALL = "all"
MAX_VALUES = 10_000


def words(parts: Iterable[str]) -> list[str]:
    """Return the words that commas or spaces divide, each once."""
    return list(dict.fromkeys(piece for part in parts for piece in str(part).replace(",", " ").split()))


def numbers(
    flag: str, parts: Iterable[str], least: float = 0, most: float = math.inf, kind: Callable = float
) -> list[float]:
    """Return the values of a flag in order: numbers and ranges `start:stop:step` with both ends, exact in decimals."""
    values: list[float] = []
    for part in words(parts):
        wrong = partial(UserError, about=flag, value=part)
        ends = [_decimal(end, wrong) for end in part.split(":")]
        if len(ends) not in (1, 3):
            raise wrong("a range is start:stop:step, such as 1.0:4.0:0.1.")
        start, stop, step = ends if len(ends) == 3 else (ends[0], ends[0], Decimal(1))
        if step <= 0 or start > stop:
            raise wrong("must have start <= stop and a step above 0, such as 1.0:4.0:0.1.")
        count = int((stop - start) / step) + 1
        if len(values) + count > MAX_VALUES:
            raise wrong(f"more than {MAX_VALUES:,} values: take a larger step.")
        values += [float(start + i * step) for i in range(count)]
    for value in values:
        wrong = partial(UserError, about=flag, value=f"{value:g}")
        if not least <= value <= most:
            raise wrong(f"must be at least {least:g}." if value < least else f"must be at most {most:,}.")
        if value != kind(value):
            raise wrong("must be a whole number.")
    return sorted(map(kind, set(values)))


def intervals(flag: str, parts: Iterable[str]) -> list[tuple[float, float]]:
    """Return intervals of t: `low:high`, several with commas or spaces between; or two numbers, `0.1 1.0`, for one."""
    if not any(":" in part for part in words(parts)):
        ends = [piece for part in parts for piece in part.replace(",", " ").split()]  # two may be equal
        parts = [":".join(ends[start : start + 2]) for start in range(0, len(ends), 2)]
    found = []
    for part in words(parts):
        wrong, ends = partial(UserError, about=flag, value=part), part.split(":")
        if len(ends) != 2:
            raise wrong("must be low:high, such as 0.1:1.0; several as 0.1:1.0,0:1.")
        low, high = (float(_decimal(end, wrong)) for end in ends)
        if not 0 <= low <= high <= 1:
            raise wrong("must be low:high with 0 <= low <= high <= 1, such as 0.1:1.0.")
        found.append((low, high))
    return list(dict.fromkeys(found))


def widths(flag: str, parts: Iterable[str]) -> list[float]:
    """Return relative widths of averages, as `numbers`."""
    found = numbers(flag, parts)
    for width in found:
        if problem := problem_of_width(width):
            raise UserError(problem, about=flag, value=f"{width:g}")
    return found


def averages(flag: str, parts: Iterable[str], available: Sequence[str]) -> list[str]:
    """Return names of averages out of those `available`: `all` is all of them, `model` the weights themselves.

    Widths may have to be made: they are taken as they are.
    """
    table = {name: [name] for name in (*available, UNAVERAGED)} | {ALL: list(available)}
    found = []
    for part in words(parts):
        if width_of(part):
            found.append(part)
            continue
        alike = [name for name in table if _number(name) == _number(part) is not None]  # 0.99990 is 0.9999
        found += lookup(table, alike[0] if alike else part, flag, rule="not there")
    return list(dict.fromkeys(found))


def _decimal(text: str, wrong: partial) -> Decimal:
    if (value := _number(text)) is None:
        remedy = "give numbers such as 1.5, lists such as 1,1.5,2 and ranges start:stop:step such as 1.0:4.0:0.1."
        raise wrong(f"{text!r} is not a number: {remedy}")
    return value


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() and math.isfinite(value) else None
