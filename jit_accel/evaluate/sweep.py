"""A sweep: a grid of settings measured on few images, the best of them on all, and the one that wins there.

What has been measured is kept line by line, so that a sweep goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jit_accel.base.files import append_json_lines, read_json_lines
from jit_accel.evaluate.grid import Setting, setting_of

LOG_FILE = "sweep.jsonl"
# Of 50,000 images the FID's standard deviation is 1 to 2% over trainings, and a third of that over other noise for one
# network (arXiv 2606.20536): two of the latter, and more for fewer images.
NOISE, NOISE_IMAGES = 0.01, 50_000

Values = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """Values of one setting, over `num_images` images."""

    setting: Setting
    num_images: int
    values: Values


class SweepLog:
    """`sweep.jsonl`: one JSON object for each setting that has been measured.

    Args:
        path: of the file; made with the first line.
        context: whatever else the values depend on, as JSON: weights, reference, features, seed. Lines of another
            context stay and are not used.
    """

    def __init__(self, path: Path, context: dict):
        self.path, self.context = path, context
        self.key = hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> dict[tuple[Setting, int], Measured]:
        """What was measured in this context; a line that was cut short is passed over."""
        found = {}
        for row in read_json_lines(self.path):
            try:
                if row["key"] == self.key:
                    setting, count = setting_of(row["setting"]), row["num_images"]
                    values = {name: math.nan if v is None else v for name, v in row["values"].items()}
                    if (setting, count) in found:  # other metrics were asked for then
                        values = found[setting, count].values | values
                    found[setting, count] = Measured(setting, count, values)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return found

    def add(self, measured: Measured) -> None:
        """Append a line, on disk when this returns.

        Raises:
            OSError: the disk does not take it.
        """
        row = {
            "key": self.key,
            "setting": measured.setting.plain(),
            "num_images": measured.num_images,
            "values": measured.values,
            "context": self.context,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_lines(self.path, [row], durable=True)


@dataclass(frozen=True)
class Outcome:
    """What a sweep found. `few` and `full` are in the grid's order; `full` holds the winner and the unguided one."""

    select: str
    higher_is_better: bool
    few: list[Measured]
    full: list[Measured]

    @property
    def best(self) -> Measured:
        """The winner: by the values over all images, and of equal ones the cheaper."""
        return ranked(self.full, self.select, self.higher_is_better)[0]

    @property
    def best_unguided(self) -> Measured | None:
        unguided = [measured for measured in self.full if measured.setting.is_unguided]
        return ranked(unguided, self.select, self.higher_is_better)[0] if unguided else None

    @property
    def not_told_apart(self) -> list[Measured]:
        """Other settings whose value over all images is as good as the winner's but for noise."""
        best = self.best
        near = abs(best.values[self.select]) * noise_of(best.num_images)
        return [
            measured
            for measured in self.full
            if measured is not best and abs(measured.values[self.select] - best.values[self.select]) <= near
        ]


def sweep(
    settings: Sequence[Setting],
    measure: Callable[[Setting, int], Values],
    *,
    sweep_images: int,
    num_images: int,
    top: int,
    select: str,
    higher_is_better: bool,
    done: dict[tuple[Setting, int], Measured],
    keep: Callable[[Measured], None],
    wanted: Callable[[int], Sequence[str]] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure all settings on `sweep_images` images, the `top` best and the best unguided one on `num_images`.

    Where that would be all of them, or few images are all images, everything is measured once, on all.

    Args:
        measure: values of a setting over the images 0 to n - 1; called by all processes alike.
        done: what is measured already; extended.
        keep: called with each new measurement.
        wanted: the metrics that a measurement of so many images must have to be used again (None: `select`).
    """

    def is_done(setting: Setting, count: int) -> bool:
        known = done.get((setting, count))
        return known is not None and {select, *(wanted(count) if wanted else ())} <= known.values.keys()

    def measured(these: Iterable[Setting], count: int) -> list[Measured]:
        these, found = list(these), []
        for i, setting in enumerate(these, 1):
            if not is_done(setting, count):
                done[setting, count] = Measured(setting, count, measure(setting, count))
                keep(done[setting, count])
            found.append(done[setting, count])
            tell(f"[{i}/{len(these)}] {setting}, {count:,} images: {select} {found[-1].values[select]:.5g}")
        return found

    if sweep_images >= num_images or len(settings) <= top:
        return Outcome(select, higher_is_better, [], measured(settings, num_images))
    few = measured(settings, sweep_images)
    order = [one.setting for one in ranked(few, select, higher_is_better)]
    unguided = [setting for setting in order if setting.is_unguided]
    finalists = {*order[:top], *unguided[:1]}
    full = measured([setting for setting in settings if setting in finalists], num_images)
    return Outcome(select, higher_is_better, few, full)


def noise_of(num_images: int) -> float:
    """The share of a Fréchet distance by which two settings must differ to be told apart, roughly."""
    return NOISE * max(1.0, NOISE_IMAGES / num_images) ** 0.5


def ranked(these: Sequence[Measured], select: str, higher_is_better: bool) -> list[Measured]:
    """The best first; of equal ones that which costs fewer network calls. Values that are no numbers come last."""

    def rank(measured: Measured) -> tuple:
        value, setting = measured.values[select], measured.setting
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        goodness = (-value if higher_is_better else value) if is_number else math.inf
        calls = setting.num_inference_steps * (2 if setting.method == "heun" else 1)
        return goodness, not setting.is_unguided, calls, setting.guidance_scale

    return sorted(these, key=rank)
