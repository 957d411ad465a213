"""What can be measured with which features; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from jit_accel.base.errors import UserError, lookup

INCEPTION, EFFICIENTNET_LITE0 = "inception", "efficientnet_lite0"
FEATURES = (INCEPTION, EFFICIENTNET_LITE0)


@dataclass(frozen=True)
class Metric:
    """One kind of number.

    short: what `--metrics` may call it, whatever the features. inception: what it is called with the Inception network,
    whose names belong to it alone. other: with other features, of which the name follows; None: not measured with them.
    """

    short: str
    inception: str
    other: str | None
    is_better_higher: bool


METRICS = (
    Metric("fd", "fid", "fd", False),
    Metric("sfd", "sfid", None, False),
    Metric("is", "inception_score", None, True),
    Metric("kd", "kid", "kd", False),
    Metric("precision", "precision", "precision", True),
    Metric("recall", "recall", "recall", True),
)


def metric_names(features: str) -> dict[str, Metric]:
    """The metrics of these features by the names that their results have, the Fréchet distance first."""
    if features == INCEPTION:
        return {metric.inception: metric for metric in METRICS}
    return {f"{metric.other}_{features}": metric for metric in METRICS if metric.other}


def is_better_higher(name: str) -> bool:
    """Whether a larger value of the metric of this name is the better one."""
    return next(names[name].is_better_higher for names in map(metric_names, FEATURES) if name in names)


def chosen_metrics(features: str, names: tuple[str, ...], about: str = "metrics") -> tuple[str, ...]:
    """The results' names of what the setting `about` names, all of the features' if that is nothing.

    Raises:
        UserError: no such metric, or not with these features.
    """
    table = metric_names(features)
    if not names:
        return tuple(table)
    aliases = {metric.short: name for name, metric in table.items()} | {name: name for name in table}
    for name in names:
        if name in metric_names(INCEPTION) and name not in aliases:
            remedy = f"use {next(iter(table))}, or --features {INCEPTION}"
            raise UserError(f"is measured with the Inception network alone: {remedy}.", about=about, value=name)
    chosen = [lookup(aliases, name, about) for name in names]
    return tuple(name for name in table if name in chosen)
