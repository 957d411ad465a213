"""The one exception that is the user's to mend, and the table look-up that raises it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can put right. Programs print it without a traceback and exit with 2.

    Args:
        rule: what holds, and the remedy unless it is given by itself.
        about: the setting, or argument, that is at fault.
        value: what was given for it.
        remedy: what to do about it.

    `everywhere` says whether every process of the run raises it, so that one of them need print it.
    """

    everywhere = True

    def __init__(self, rule: str, *, about: str | None = None, value: object = None, remedy: str | None = None):
        super().__init__(rule, about, value, remedy)
        self.rule, self.about, self.value, self.remedy = rule, about, value, remedy

    def __str__(self) -> str:
        given = "" if self.value is None else f" {self.value}"
        subject = f"--{self.about}{given}: " if self.about else ""
        return subject + self.rule + (f" {self.remedy}" if self.remedy else "")


def common_problem(problems: list[str | None]) -> str | None:
    """What the processes of a run met, as one message that names processes where not all met the same."""
    met = {problem: [rank for rank, other in enumerate(problems) if other == problem] for problem in problems}
    if list(met) == [problems[0]]:
        return problems[0]
    return "\n".join(
        f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {problem}"
        for problem, ranks in met.items()
        if problem is not None
    )


def nearest(name: str, choices) -> str:
    """` Did you mean 'x'?`, or nothing where no choice is like `name`."""
    match = difflib.get_close_matches(name.lower(), [str(c).lower() for c in choices], n=1, cutoff=0.5)
    by_lower = {str(c).lower(): c for c in choices}
    return f" Did you mean {by_lower[match[0]]!r}?" if match else ""


def lookup(table: Mapping[str, T], name: str, flag: str) -> T:
    """Return `table[name]`, or raise `UserError` with the choices and the nearest match."""
    if name in table:
        return table[name]
    raise UserError(f"{flag} {name}: unknown; choose from {', '.join(table)}.{nearest(name, table)}")
