"""The one table of metrics: what it says of a key, and that guides and trainings agree with it."""

import re
from pathlib import Path

import pytest

from jit_accel.monitor.metric_table import METRICS, metric_of, part_of

DOCS = Path(__file__).parents[2] / "docs"
WHEN = {when: when for when in ("step", "interval", "epoch", "val", "eval")}
WHEN |= {"步": "step", "区间": "interval", "验证": "val", "评测": "eval"}  # as the Chinese guide says it


def documented(page: str) -> dict[str, str]:
    """When each metric of a guide's tables is logged, by its key."""
    found = {}
    for line in (DOCS / page).read_text().splitlines():
        cells = line.split(" | ")
        if len(cells) > 1 and cells[1] in WHEN:
            found |= dict.fromkeys(re.findall(r"`(\w+/[^`]+)`", cells[0]), WHEN[cells[1]])
    return found


@pytest.mark.parametrize("page", ["monitoring.md", "monitoring.zh.md"])
def test_the_guides_have_every_metric_of_the_table_and_no_other(page):
    found = documented(page)
    rows = {key: metric_of(key) for key in found}
    assert {key: row.when for key, row in rows.items()} == found
    elsewhere = {
        "eval/{name}",
        "health/{kind}",
        "samples/grid",
        "samples/class/{name}",
    }  # in tables and text of their own
    assert {row.key for row in rows.values()} == set(METRICS) - elsewhere


def test_a_key_has_its_own_row_or_the_one_that_stands_for_several():
    assert metric_of("train/loss").title == "train"
    assert metric_of("ema/0.9996/distance").key == "ema/{decay}/distance"
    assert metric_of("ema/auto/decay").key == "ema/auto/decay"
    assert metric_of("eval/fid_unguided").better == "lower"
    assert metric_of("eval/fd_toy").key == "eval/{name}"
    assert metric_of("mine/own") is None
    assert part_of("train/loss_by_t/0.0-0.1", "train/loss_by_t/{bin}") == "0.0-0.1"
    assert part_of("train/loss", "train/loss_by_t/{bin}") is None
    assert part_of("train/loss", "train/loss") is None


def test_the_words_of_the_table_are_known():
    for metric in METRICS.values():
        assert metric.when in ("step", "interval", "epoch", "val", "eval", "sample")
        assert metric.better in ("", "lower", "higher")
        assert metric.thinned in ("mean", "extremes", "nothing")
        assert metric.unit in ("", "share", "s", "GiB", "images/s")
