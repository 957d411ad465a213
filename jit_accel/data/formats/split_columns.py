"""Columns that say of what split an image is."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jit_accel.data.formats.columns import label_kind
from jit_accel.data.reading.splits import OTHERS, TEST, TRAIN, VALIDATION, choose_splits, split_of

SPLIT_NAMES = ("split", "subset", "partition", "set", "dataset", "data set")  # of columns of splits, in any case
MOST_SPLITS = 100  # a column with more values, of a file or row group, says something else


def split_column(features: Mapping[str, Any]) -> str | None:
    """Return the column that may say of what split an image is; None where there is none."""
    spelled = {name.lower().replace("_", " "): name for name in features if label_kind(features[name]) == "text"}
    return next((spelled[name] for name in SPLIT_NAMES if name in spelled), None)


def counts_of(column: pa.ChunkedArray) -> dict[str | None, int]:
    """Return the rows of each value of a `split_column`; {} for more values than there are splits."""
    counts = pc.value_counts(column.cast(pa.string()))
    return {item["values"]: item["counts"] for item in counts.to_pylist()} if len(counts) <= MOST_SPLITS else {}


def choose_values(counts: Mapping[str | None, int], wanted: str | None, where: str) -> tuple[str | None, ...] | None:
    """Return the values of a `split_column` in rows of the splits that `--split` means; None where that is all rows.

    `counts`: the rows of each value, {} without such a column. Without a word for a split it says nothing of that; see
    `choose_splits`.
    """
    splits = {value: split_of(value.strip()) if value else OTHERS for value in counts}
    sizes: Counter = Counter()
    for value, split in splits.items():
        sizes[split] += counts[value]
    if not sizes.keys() & {TRAIN, VALIDATION, TEST}:
        sizes = Counter({TRAIN: sum(counts.values())})
        splits = dict.fromkeys(counts, TRAIN)
    chosen = choose_splits(sizes, wanted, where)
    kept = tuple(value for value, split in splits.items() if split in chosen)
    return kept if len(kept) < len(counts) else None
