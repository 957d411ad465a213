"""The one exception that is the user's to mend, and the table look-up that raises it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can put right. Entry points print it without a traceback and exit with 2.

    The message names the flag, the value, the rule and the remedy. `everywhere` tells whether every process of the
    run meets it, so that one of them need say it.
    """

    everywhere = True


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
