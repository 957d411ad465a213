"""A sweep: a grid of settings measured on few images, the best of them on all, the one that wins, and their log."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jit_accel.base.files import append_json_lines, read_json_lines
from jit_accel.evaluate.drawing import Setting

# Of 50,000 images the FID's standard deviation is 1 to 2% over trainings, and a third of that over other noise for one
# network (arXiv 2606.20536): two of the latter, and more for fewer images.
NOISE, NOISE_IMAGES = 0.01, 50_000


@dataclass(frozen=True)
class Measured:
    """Values of one setting, over `num_images` images."""

    setting: Setting
    num_images: int
    values: dict[str, float]

    def place(self) -> dict:
        """Return everything but the values on one level."""
        return {**asdict(self.setting), "num_images": self.num_images}

    def plain(self) -> dict:
        """Return all of it on one level, as JSON has it."""
        return self.place() | self.values


class SweepLog:
    """`sweep.jsonl`: a JSON object for each setting that has been measured, with which a stopped sweep goes on.

    context: whatever else the values depend on, as JSON: weights, reference, features, seed. Lines of another context
    stay and are not used. on_writer: calls a function on the one process that reads and writes, for all.
    """

    def __init__(self, path: Path, context: dict, on_writer: Callable[[Callable], Any] = lambda work: work()):
        self.path, self.context, self.on_writer = path, context, on_writer
        self.key = hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()[:16]
        self.done: dict[tuple[Setting, int], Measured] = on_writer(self._read)

    def _read(self) -> dict[tuple[Setting, int], Measured]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found: dict[tuple[Setting, int], Measured] = {}
        for row in read_json_lines(self.path):
            if row.get("key") == self.key:
                place = (Setting(**row["setting"]), row["num_images"])
                known = found[place].values if place in found else {}  # other metrics were asked for then
                values = {name: math.nan if value is None else value for name, value in row["values"].items()}
                found[place] = Measured(*place, known | values)
        return found

    def measured(
        self, setting: Setting, num_images: int, metrics: Iterable[str], measure: Callable[[Setting, int], Measured]
    ) -> Measured:
        """Return what is known of a setting; where it lacks a metric, measure and append a line to the file."""
        found = self.done.get((setting, num_images))
        if found is None or not set(metrics) <= found.values.keys():
            found = self.done[setting, num_images] = measure(setting, num_images)
            row = {"key": self.key, **asdict(found), "context": self.context}
            self.on_writer(lambda: append_json_lines(self.path, [row], durable=True))
        return found


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep. `few` and `full` are in the grid's order; `full` holds the winner and the unguided one."""

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
        order = ranked(self.full, self.select, self.higher_is_better)
        return next((one for one in order if one.setting.is_unguided), None)

    @property
    def not_told_apart(self) -> list[Measured]:
        """Other settings whose value over all images is as good as the winner's but for noise."""
        best, value = self.best, self.best.values[self.select]
        near = abs(value) * noise_of(best.num_images)
        return [one for one in self.full if one is not best and abs(one.values[self.select] - value) <= near]

    @property
    def metrics(self) -> list[str]:
        """The metrics' names, the one that decides first."""
        return list(dict.fromkeys([self.select, *(name for one in self.full for name in one.values)]))

    def plain(self) -> dict:
        """Return all of it as JSON has it."""
        unguided = self.best_unguided
        return {
            "select": self.select,
            "best": self.best.plain(),
            "best_unguided": unguided and unguided.plain(),
            "not_told_apart_from_best": [one.plain() for one in self.not_told_apart],
            "all_images": [one.plain() for one in self.full],
            "few_images": [one.plain() for one in self.few],
        }


def sweep(
    settings: Sequence[Setting],
    measure: Callable[[Setting, int], Measured],
    *,
    sweep_images: int,
    num_images: int,
    top: int,
    select: str,
    higher_is_better: bool,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure all settings on `sweep_images` images, the `top` best and the best unguided one on `num_images`.

    Where that would be all of them, or few images are all images, everything is measured once, on all. `measure` takes
    a setting and the number of images; all processes call it alike.
    """

    def measured(these: Sequence[Setting], count: int) -> list[Measured]:
        found = []
        for i, setting in enumerate(these, 1):
            found.append(measure(setting, count))
            say(f"[{i}/{len(these)}] {setting}, {count:,} images: {select} {found[-1].values[select]:.5g}")
        return found

    if sweep_images >= num_images or len(settings) <= top:
        return Outcome(select, higher_is_better, [], measured(settings, num_images))
    few = measured(settings, sweep_images)
    order = [one.setting for one in ranked(few, select, higher_is_better)]
    finalists = {*order[:top], *[setting for setting in order if setting.is_unguided][:1]}
    full = measured([setting for setting in settings if setting in finalists], num_images)
    return Outcome(select, higher_is_better, few, full)


def noise_of(num_images: int) -> float:
    """Return the share of a Fréchet distance by which two settings must differ to count as different, roughly."""
    return NOISE * max(1.0, NOISE_IMAGES / num_images) ** 0.5


def ranked(these: Sequence[Measured], select: str, higher_is_better: bool) -> list[Measured]:
    """Sort the best first; of equal ones that which costs fewer network calls. Values that are no numbers come last."""

    def rank(measured: Measured) -> tuple:
        value, setting = measured.values[select], measured.setting
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        goodness = (-value if higher_is_better else value) if is_number else math.inf
        calls = setting.num_inference_steps * (2 if setting.method == "heun" else 1)
        return goodness, not setting.is_unguided, calls, setting.guidance_scale

    return sorted(these, key=rank)
