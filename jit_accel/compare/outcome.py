"""The outcome of a comparison: each setting's values, its differences from the base, and how sure these are."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jit_accel.compare.experiment import Experiment, geometric_mean, is_number
from jit_accel.compare.settings import Arm, Measure
from jit_accel.compare.t_test import LEAST_SEEDS, LEVEL, PairedTest, holm, paired_test

SIGNIFICANT = 1 - LEVEL


@dataclass
class ArmOutcome:
    """A setting's values by seed, and beside the base its differences from that with the same seed.

    `p_holm` is the p-value corrected for several settings. `step_ratio` is the time of a step over the base's.
    """

    name: str
    metrics: dict[int, dict[str, float]]
    values: dict[int, float]
    step_s: float | None
    differences: dict[int, float] = field(default_factory=dict)
    test: PairedTest | None = None
    p_holm: float | None = None
    step_ratio: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass
class Comparison:
    """All settings, the base first, and what they are compared by."""

    arms: list[ArmOutcome]
    metric: str
    is_better_higher: bool
    seeds: int
    about: dict[str, Any]

    @property
    def base(self) -> ArmOutcome:
        return self.arms[0]

    def verdict(self, arm: ArmOutcome) -> str:
        """Say in a sentence how a setting does beside the base."""
        base, test = self.base.name, arm.test
        if test is None:
            return f"{arm.name}: no run is finished beside one of {base} with the same seed."
        count = len(arm.differences)
        of_seeds = f"{count} seed{'s' * (count > 1)}"
        if not any(arm.differences.values()):
            return f"{arm.name}: no difference from {base}, in {of_seeds}."
        if test.p is None:
            shown = ", ".join(f"{difference:+.4g}" for difference in arm.differences.values())
            rule = f"{LEAST_SEEDS} seeds or more tell whether that is chance."
            return f"{arm.name}: {self.metric} {shown} beside {base}; {rule}"
        is_better = (test.mean > 0) == self.is_better_higher
        interval = f"{test.mean:+.4g} on average, {LEVEL:.0%} interval {test.low:+.4g} to {test.high:+.4g}"
        p = f"p {p_text(test.p)}" + (f", corrected {p_text(arm.p_holm)}" if len(self.arms) > 2 else "")
        if arm.p_holm < SIGNIFICANT:
            return f"{arm.name}: {'better' if is_better else 'worse'} than {base} ({interval}; {p}; {of_seeds})."
        return f"{arm.name}: not told apart from {base} by {of_seeds} ({interval}; {p})."


def outcome_of(experiment: Experiment, arms: Sequence[Arm], measure: Measure, seeds: int) -> Comparison:
    """Return the outcome of the runs that are finished."""
    found: list[ArmOutcome] = []
    for arm in arms:
        results = {seed: result for seed in range(seeds) if (result := experiment.result(arm.name, seed))}
        values = {seed: result.metrics.get(measure.metric) for seed, result in results.items()}
        times = {seed: result.step_s for seed, result in results.items() if result.step_s}
        one = ArmOutcome(
            arm.name,
            {seed: result.metrics for seed, result in results.items()},
            {seed: value for seed, value in values.items() if is_number(value)},
            statistics.median(times.values()) if times else None,
        )
        if not found:
            base, base_times = one, times
        else:
            pairs = [seed for seed in one.values if seed in base.values]
            one.differences = {seed: one.values[seed] - base.values[seed] for seed in pairs}
            one.test = paired_test(list(one.differences.values())) if pairs else None
        # Of the same seed, whose runs stood side by side in time.
        one.step_ratio = geometric_mean(times[seed] / base_times[seed] for seed in times if seed in base_times)
        found.append(one)
    tested = [arm for arm in found if arm.test and arm.test.p is not None]
    for arm, p in zip(tested, holm([arm.test.p for arm in tested])):
        arm.p_holm = p
    about = {"base": experiment.base, "seeds": seeds, **experiment.about}
    return Comparison(found, measure.metric, measure.is_better_higher, seeds, about)


def p_text(p: float | None) -> str:
    """Return a p-value with two digits."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
