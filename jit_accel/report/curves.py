"""The measurements of a run, thinned while they are read: any number of rows in bounded memory."""

from dataclasses import dataclass, field
from math import exp, isfinite
from pathlib import Path

from jit_accel.monitor.log import METRICS_FILE, as_row
from jit_accel.monitor.metric_table import HEALTH, metric_of, part_of

MAX_BUCKETS = 2000
SIGNIFICANT_DIGITS = 5


class Bucket:
    """The values of neighbouring steps: their number, sum and extremes, and where these lie."""

    __slots__ = ("count", "first", "high", "high_step", "last", "low", "low_step", "sum")

    def __init__(self, step: int):
        self.count, self.sum = 0, 0.0
        self.low, self.high = float("inf"), float("-inf")
        self.first = self.last = self.low_step = self.high_step = step

    def add(self, step: int, value: float) -> None:
        if value < self.low:
            self.low, self.low_step = value, step
        if value > self.high:
            self.high, self.high_step = value, step
        self.count += 1
        self.sum += value
        self.last = step

    def merge(self, later: "Bucket") -> None:
        if later.low < self.low:
            self.low, self.low_step = later.low, later.low_step
        if later.high > self.high:
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
        ordered, self.buckets = self.ordered, {}
        for bucket in ordered:
            known = self.buckets.setdefault(bucket.first // self.width, bucket)
            if known is not bucket:
                known.merge(bucket)

    @property
    def ordered(self) -> list[Bucket]:
        return [self.buckets[index] for index in sorted(self.buckets)]

    @property
    def count(self) -> int:
        """Number of finite values."""
        return sum(bucket.count for bucket in self.buckets.values())

    @property
    def low(self) -> float:
        return min(bucket.low for bucket in self.buckets.values())

    @property
    def high(self) -> float:
        return max(bucket.high for bucket in self.buckets.values())

    def means(self, factor: float = 1) -> dict[str, list]:
        """Return each bucket's middle step `x`, mean `y` (None: nothing finite) and number of values `n`."""
        buckets = self.ordered
        return {
            "x": [plain((bucket.first + bucket.last) / 2) for bucket in buckets],
            "y": [rounded(factor * bucket.sum / bucket.count) if bucket.count else None for bucket in buckets],
            "n": [bucket.count for bucket in buckets],
        }

    def extremes(self, factor: float = 1) -> dict[str, list]:
        """Return lowest and highest value of each bucket at their true steps `x`, in order: spikes survive."""
        points: list[tuple[int, float | None]] = []
        for bucket in self.ordered:
            ends = {bucket.low_step: bucket.low, bucket.high_step: bucket.high}
            points += sorted(ends.items()) if bucket.count else [(bucket.first, None)]
        return {"x": [step for step, _ in points], "y": [value and rounded(factor * value) for _, value in points]}

    def smoothed_end(self, memory_steps: float) -> float | None:
        """Return the last value of the running mean with this memory, as the page draws it (`smooth` in charts.js)."""
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
class Occurrences:
    """All events of one kind of trouble: the steps they came at, and the finite ones of the measured values."""

    steps: Curve = field(default_factory=Curve)
    values: Curve = field(default_factory=Curve)

    def add(self, step: int, value: float | None) -> None:
        self.steps.add(step, 1.0)
        self.values.add(step, value)

    @property
    def count(self) -> int:
        return self.steps.count

    @property
    def ends(self) -> tuple[int, int]:
        """First and last step."""
        buckets = self.steps.ordered
        return buckets[0].first, buckets[-1].last


@dataclass
class Measurements:
    """Everything in a `metrics.jsonl` that is shown: curves by key, events by kind, and the last step."""

    curves: dict[str, Curve] = field(default_factory=dict)
    events: dict[str, Occurrences] = field(default_factory=dict)
    last_step: int = 0
    num_rows: int = 0
    num_unreadable: int = 0
    _dropped: set[str] = field(default_factory=set)

    def add(self, row: dict) -> None:
        step = row["step"]
        self.num_rows += 1
        self.last_step = max(self.last_step, step)
        for key, value in row.items():
            if type(value) is not float or value - value != 0:  # seldom: a million rows pass here
                if not (value is None or isinstance(value, (int, float))) or isinstance(value, bool):
                    continue
                value = finite(value)
            place = self.curves.get(key)
            if place is None and key not in self._dropped:
                place = self._place_of(key)
            if place is not None:
                place.add(step, value)

    def _place_of(self, key: str) -> Curve | Occurrences | None:
        """Return where the values of a new key go; None for those that no page shows."""
        if (kind := part_of(key, HEALTH)) is not None:
            return self.events.setdefault(kind, Occurrences())
        metric = metric_of(key)
        if metric is None or metric.thinned == "nothing":
            self._dropped.add(key)
            return None
        return self.curves.setdefault(key, Curve())

    def curve(self, *keys: str) -> Curve | None:
        """Return the curve of the first of these keys that has a finite value."""
        found = (self.curves.get(key) for key in keys)
        return next((curve for curve in found if curve and curve.count), None)


def read_measurements(folder: Path) -> Measurements:
    """Read `metrics.jsonl` of a run's folder; lines that cannot be read are left out and counted."""
    measurements = Measurements()
    if (folder / METRICS_FILE).exists():
        with open(folder / METRICS_FILE, "rb") as lines:
            for line in lines:
                if (row := as_row(line)) is not None:
                    measurements.add(row)
                elif line.strip():
                    measurements.num_unreadable += 1
    return measurements


def finite(value: float | None) -> float | None:
    """Return the value as a float; None for one that is not finite."""
    try:
        value = float(value) if value is not None else None
    except OverflowError:  # an integer of more than 308 digits
        return None
    return value if value is not None and isfinite(value) else None


def rounded(value: float | None) -> float | None:
    """Return as many digits as a screen can show; None for a sum that overflowed."""
    return None if value is None or not isfinite(value) else plain(float(f"{value:.{SIGNIFICANT_DIGITS}g}"))


def plain(value: float) -> float | int:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
