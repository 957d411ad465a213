"""Who reads what of a stream: pure arithmetic on the numbers of an epoch's images.

In each epoch the stream's *units* (row groups, tar files) come in a shuffled order, and their images are numbered
in it. A *span* is a half-open range [a, b) of these numbers. Where units do not tell their sizes, each is
given 2**32 numbers, of which it uses the first few.
"""

from __future__ import annotations

import base64
import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jit_accel.base import rng

Span = tuple[int, int]
UNKNOWN_SIZE = 2**32


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch. units: int64 (U,), the n-th to read. starts: int64 (U + 1,), its first number."""

    units: np.ndarray
    starts: np.ndarray

    @property
    def whole(self) -> list[Span]:
        return [(0, int(self.starts[-1]))]

    def in_units(self, spans: list[Span]) -> Iterator[tuple[int, int, list[Span]]]:
        """Yield (unit, number of its row 0, ranges of its rows) in the order of reading; `spans` are sorted."""
        current, ranges = -1, []
        for a, b in spans:
            first, last = np.searchsorted(self.starts, [a, b - 1], side="right") - 1
            for n in range(int(first), int(last) + 1):
                start, end = int(self.starts[n]), int(self.starts[n + 1])
                if start == end:
                    continue
                if n != current:
                    if ranges:
                        yield int(self.units[current]), int(self.starts[current]), ranges
                    current, ranges = n, []
                ranges.append((max(a, start) - start, min(b, end) - start))
        if ranges:
            yield int(self.units[current]), int(self.starts[current]), ranges


def epoch_order(seed: int, epoch: int, num_units: int, sizes: np.ndarray | None) -> EpochOrder:
    """Shuffle the units of an epoch; `sizes` are their numbers of images, int64 (U,), if known."""
    units = np.argsort(rng.hash64(seed, f"units/{epoch}", np.arange(num_units)), kind="stable")
    lengths = np.full(num_units, UNKNOWN_SIZE) if sizes is None else sizes[units]
    return EpochOrder(units, np.concatenate([[0], np.cumsum(lengths)]))


def total(spans: list[Span]) -> int:
    return sum(b - a for a, b in spans)


def merged(spans: list[Span]) -> list[Span]:
    """The same numbers as few sorted spans."""
    result: list[Span] = []
    for a, b in sorted(spans):
        if result and a <= result[-1][1]:
            result[-1] = (result[-1][0], max(b, result[-1][1]))
        elif a < b:
            result.append((a, b))
    return result


def from_numbers(numbers: np.ndarray) -> list[Span]:
    """Spans of any numbers, int64 (k,)."""
    return merged([(n, n + 1) for n in numbers.tolist()])


def numbers_in(spans: Iterable[Span]) -> np.ndarray:
    """All numbers of the spans, int64."""
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in spans])


def clipped(spans: list[Span], start: int) -> list[Span]:
    """What of `spans` is not below `start`."""
    return [(max(a, start), b) for a, b in spans if b > start]


def cut(spans: list[Span], counts: list[int]) -> list[list[Span]]:
    """Cut sorted `spans` into neighbouring parts of the given numbers of images, which add up to theirs."""
    assert sum(counts) == total(spans), f"{counts} do not add up to {total(spans)}"
    parts, rest = [], list(reversed(spans))
    for count in counts:
        part = []
        while count:
            a, b = rest.pop()
            stop = min(b, a + count)
            part.append((a, stop))
            count -= stop - a
            if stop < b:
                rest.append((stop, b))
        parts.append(part)
    return parts


def dealt(spans: list[Span], starts: np.ndarray, num_parts: int) -> list[list[Span]]:
    """Cut `spans` between units into neighbouring parts of about equally many units, where sizes are unknown."""
    pieces = []
    for a, b in spans:
        bounds = [a, *(int(s) for s in starts[(starts > a) & (starts < b)]), b]
        pieces += itertools.pairwise(bounds)
    edges = [len(pieces) * n // num_parts for n in range(num_parts + 1)]
    return [merged(pieces[a:b]) for a, b in itertools.pairwise(edges)]


def evenly(count: int, num_parts: int) -> list[int]:
    return [count * (n + 1) // num_parts - count * n // num_parts for n in range(num_parts)]


def packed(spans: list[Span]) -> str:
    """Spans as text for JSON, a byte or so each where they lie close together."""
    steps = np.diff(np.array(spans, np.int64).reshape(-1), prepend=0)
    return base64.b64encode(zlib.compress(steps.tobytes())).decode()


def unpacked(text: str) -> list[Span]:
    """What `packed` packed."""
    numbers = np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int64)).reshape(-1, 2)
    return [(a, b) for a, b in numbers.tolist()]
