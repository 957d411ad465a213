"""The measurements of a run, thinned while they are read: any number of rows in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import exp, isfinite
from pathlib import Path

from jit_accel.monitor.log import METRICS_FILE, as_row

MAX_BUCKETS = 2000
SIGNIFICANT_DIGITS = 5
HEALTH = "health/"
LOSS_BY_T = "train/loss_by_t/"
KEPT = frozenset(
    [
        *("train/loss", "train/learning_rate", "train/grad_norm", "train/epoch", "train/update_ratio"),
        *("train/epoch_loss", "train/epoch_time", "train/samples_per_second", "train/best_loss"),
        *("val/loss", "data/wait_fraction", "data/worker_rss_gib", "data/bad_images"),
        *("perf/images_per_second", "perf/step_time", "perf/mfu", "perf/peak_memory_gib"),
    ]
)
EVAL = "eval/"
KEPT_BEGINNINGS = ("ema/", EVAL, LOSS_BY_T, HEALTH)


class Bucket:
    """The values of neighbouring steps: their number, sum and extremes, and where these lie."""

    __slots__ = ("count", "first", "high", "high_step", "last", "low", "low_step", "sum")

    def __init__(self, step: int):
        self.count, self.sum = 0, 0.0
        self.low = self.high = 0.0
        self.first = self.last = self.low_step = self.high_step = step

    def add(self, step: int, value: float) -> None:
        if self.count == 0:
            self.low = self.high = value
            self.low_step = self.high_step = step
        elif value < self.low:
            self.low, self.low_step = value, step
        elif value > self.high:
            self.high, self.high_step = value, step
        self.count += 1
        self.sum += value
        self.last = step

    def merge(self, later: Bucket) -> None:
        if later.count and (not self.count or later.low < self.low):
            self.low, self.low_step = later.low, later.low_step
        if later.count and (not self.count or later.high > self.high):
            self.high, self.high_step = later.high, later.high_step
        self.count += later.count
        self.sum += later.sum
        self.last = later.last


class Curve:
    """One measurement over the steps, in at most `MAX_BUCKETS` buckets of equal width.

    The width doubles when there are more, so that a curve of few points keeps each of them.
    """

    def __init__(self):
        self.width = 1
        self.buckets: dict[int, Bucket] = {}
        self.latest: float | None = None
        self._index, self._bucket = -1, Bucket(0)

    def add(self, step: int, value: float | None) -> None:
        """Take the value of a step; None, for one that is not finite, leaves a gap where nothing else is near."""
        index = step // self.width
        if index != self._index:
            self._index, self._bucket = index, self.buckets.setdefault(index, Bucket(step))
            while len(self.buckets) > MAX_BUCKETS:  # once, or more often where the steps are far apart
                self._double_width()
                self._index, self._bucket = step // self.width, self.buckets[step // self.width]
        if value is not None:
            self._bucket.add(step, value)
            self.latest = value

    def _double_width(self) -> None:
        self.width *= 2
        merged: dict[int, Bucket] = {}
        for index in sorted(self.buckets):
            bucket = self.buckets[index]
            if index // 2 in merged:
                merged[index // 2].merge(bucket)
            else:
                merged[index // 2] = bucket
        self.buckets = merged

    @property
    def ordered(self) -> list[Bucket]:
        return [self.buckets[index] for index in sorted(self.buckets)]

    @property
    def count(self) -> int:
        """Number of finite values."""
        return sum(bucket.count for bucket in self.buckets.values())

    @property
    def low(self) -> float:
        return min(bucket.low for bucket in self.buckets.values() if bucket.count)

    @property
    def high(self) -> float:
        return max(bucket.high for bucket in self.buckets.values() if bucket.count)

    def means(self) -> dict[str, list]:
        """Of each bucket the middle step `x`, the mean `y` (None: nothing finite) and the number of values `n`."""
        buckets = self.ordered
        return {
            "x": [plain((bucket.first + bucket.last) / 2) for bucket in buckets],
            "y": [rounded(bucket.sum / bucket.count) if bucket.count else None for bucket in buckets],
            "n": [bucket.count for bucket in buckets],
        }

    def extremes(self) -> dict[str, list]:
        """Lowest and highest value of each bucket at their true steps `x`, in order: spikes survive."""
        points: list[tuple[int, float | None]] = []
        for bucket in self.ordered:
            if not bucket.count:
                points.append((bucket.first, None))
                continue
            ends = {bucket.low_step: bucket.low, bucket.high_step: bucket.high}
            points += sorted(ends.items())
        return {"x": [step for step, _ in points], "y": [rounded(value) for _, value in points]}

    def smoothed_end(self, memory_steps: float) -> float | None:
        """The last value of the running mean with this memory, as the page draws it (`smooth` in charts.js)."""
        total = weight = 0.0
        before = None
        for bucket in self.ordered:
            if not bucket.count:
                continue
            step = (bucket.first + bucket.last) / 2
            kept = exp((before - step) / min(memory_steps, step / 10)) if before is not None and memory_steps > 0 else 0
            total, weight, before = total * kept + bucket.sum, weight * kept + bucket.count, step
        return total / weight if weight else None


@dataclass
class Event:
    """All occurrences of one kind of health event. `low` and `high` are the extremes of the finite measured values."""

    count: int = 0
    first: int = 0
    last: int = 0
    low: float | None = None
    high: float | None = None
    steps: Curve = field(default_factory=Curve)

    def add(self, step: int, value: float | None) -> None:
        self.first = min(self.first, step) if self.count else step
        self.last = max(self.last, step)
        self.count += 1
        self.steps.add(step, 1.0)
        if value is not None:
            self.low = value if self.low is None else min(self.low, value)
            self.high = value if self.high is None else max(self.high, value)


@dataclass
class Measurements:
    """What a `metrics.jsonl` holds: curves by key, events by kind, and the last step."""

    curves: dict[str, Curve] = field(default_factory=dict)
    events: dict[str, Event] = field(default_factory=dict)
    last_step: int = 0
    num_rows: int = 0
    num_unreadable: int = 0

    def add(self, row: dict) -> None:
        step = row["step"]
        self.num_rows += 1
        self.last_step = max(self.last_step, step)
        curves = self.curves
        for key, value in row.items():
            curve = curves.get(key)
            if curve is None:
                if key not in KEPT and not key.startswith(KEPT_BEGINNINGS):
                    continue
                if key.startswith(HEALTH):
                    if is_number(value):
                        self.events.setdefault(key.removeprefix(HEALTH), Event()).add(step, finite(value))
                    continue
                curve = curves.setdefault(key, Curve())
            if type(value) is float and value - value == 0:  # the usual case first: a million rows pass here
                curve.add(step, value)
            elif is_number(value):
                curve.add(step, finite(value))

    def curve(self, key: str) -> Curve | None:
        """The curve of `key` where it has a finite value."""
        curve = self.curves.get(key)
        return curve if curve and curve.count else None


def read_measurements(folder: Path) -> Measurements:
    """Read `metrics.jsonl` of a run's folder; what cannot be read in it is left out and counted."""
    measurements = Measurements()
    try:
        with open(folder / METRICS_FILE, "rb") as file:
            for row in rows_of(file):
                if row is None:
                    measurements.num_unreadable += 1
                else:
                    measurements.add(row)
    except FileNotFoundError:
        pass
    return measurements


def rows_of(lines: Iterable[bytes]) -> Iterator[dict | None]:
    """The rows of a metrics file; None for a line that is none, such as a last one that was cut short."""
    for line in lines:
        row = as_row(line)
        if row is not None or line.strip():
            yield row


def is_number(value) -> bool:
    """Whether a value of a row is a measurement; null stands for one that is not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def finite(value: float | None) -> float | None:
    try:
        value = float(value) if value is not None else None
    except OverflowError:  # an integer of more than 308 digits
        return None
    return value if value is not None and isfinite(value) else None


def rounded(value: float | None) -> float | None:
    """To as many digits as a screen can show; None for a sum that overflowed."""
    return None if value is None or not isfinite(value) else plain(float(f"{value:.{SIGNIFICANT_DIGITS}g}"))


def plain(value: float) -> float | int:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
