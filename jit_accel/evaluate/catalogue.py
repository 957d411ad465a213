"""The metrics, and the features that each is measured with; imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from jit_accel.base.errors import UserError, lookup

INCEPTION, EFFICIENTNET_LITE0 = "inception", "efficientnet_lite0"
FEATURES = dict.fromkeys((INCEPTION, EFFICIENTNET_LITE0))


class Metric(NamedTuple):
    """A row of `METRICS`.

    short: its name in `--metrics` with any features. inception: its name with the Inception network, which belongs to
    that network alone. other: its name with other features, before theirs; None: not measured with them. is_pairwise:
    images are compared one by one, by features that are kept.
    """

    short: str
    inception: str
    other: str | None
    is_better_higher: bool = False
    is_pairwise: bool = False


# A new one is a row here and a function in `formulas.MEASURES`.
METRICS = (
    Metric("fd", "fid", "fd"),
    Metric("sfd", "sfid", None),
    Metric("is", "inception_score", None, is_better_higher=True),
    Metric("kd", "kid", "kd", is_pairwise=True),
    Metric("precision", "precision", "precision", is_better_higher=True, is_pairwise=True),
    Metric("recall", "recall", "recall", is_better_higher=True, is_pairwise=True),
)


def metric_names(features: str) -> dict[str, Metric]:
    """Return the metrics of these features by the names of their results, the Fréchet distance first."""
    if features == INCEPTION:
        return {metric.inception: metric for metric in METRICS}
    return {f"{metric.other}_{features}": metric for metric in METRICS if metric.other}


def chosen_metrics(features: str, names: tuple[str, ...], about: str = "metrics") -> tuple[str, ...]:
    """Return the results' names of the metrics that the setting `about` names; all of the features' for none.

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
