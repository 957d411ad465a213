"""Streams under random circumstances: shards, processes, workers, batch and buffer sizes, stops and resumes.

The rows are numbers instead of images, so that thousands of resumes take seconds.
"""

import json
import random

import numpy as np
import pytest
from data_samples import units_and_rows

from jit_accel.data import build_loader
from jit_accel.data.batches import lanes, loader
from jit_accel.data.batches.order import StreamOrder
from jit_accel.data.formats.columns import Columns
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.images import Stream


class Numbers(Stream):
    """Shards of `counts` rows; the n-th row of all holds n."""

    def __init__(self, counts):
        facts = {"sizes": np.array(counts, np.int64), "columns": Columns("image", "label"), "opened": 0, "min_key": 0}
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    num_units = property(lambda self: len(self.sizes))
    is_remote = False

    def training_rows(self, unit, start=0):
        assert start < self.sizes[unit]
        object.__setattr__(self, "opened", self.opened + 1)
        first = int(self.sizes[:unit].sum())
        return ({"image": b"", "label": first + row} for row in range(start, self.sizes[unit]))


@pytest.fixture(autouse=True)
def numbers_for_images(monkeypatch):
    pixels = np.zeros((3, 1, 1), np.uint8)
    monkeypatch.setattr(lanes.BatchPartReader, "_decode_row", lambda self, row, name, at: (pixels, row["label"]))
    monkeypatch.setattr(loader, "from_workers", lambda reader, num_workers: reader)  # the worker's order, without it


def source_of(counts):
    return Source("numbers", "parquet", Numbers(counts), sum(counts), (), "", None)


def start(source, world_size, batch_size, buffer, num_workers, num_lanes, state=None):
    how = {"world_size": world_size, "num_workers": num_workers, "shuffle_buffer": buffer, "lanes": num_lanes}
    ranks = [build_loader(source, img_size=1, batch_size=batch_size, seed=0, rank=r, **how) for r in range(world_size)]
    for one in ranks:
        if state:
            one.load_state_dict(json.loads(json.dumps(state)))
    return ranks


@pytest.mark.parametrize("seed", range(90))
def test_the_image_at_each_position_follows_from_seed_data_and_lanes_alone(seed):
    """Uneven, empty and single units, more processes than units, batches larger than units, resumes anywhere."""
    chance = random.Random(seed)
    counts = [chance.choice([0, 1, 2, 5, 9, 16]) for _ in range(chance.randint(1, 12))]
    counts[0] += not sum(counts)
    source, total, seen, state = source_of(counts), sum(counts), {}, None
    buffer, num_lanes = chance.choice([1, 3, 8, 30]), chance.choice([None, 1, 2, 5, 16])
    for _ in range(5):
        world_size, batch_size = chance.choice([1, 1, 2, 3, 4, 7]), chance.randint(1, 9)
        ranks = start(source, world_size, batch_size, buffer, chance.choice([0, 1, 2, 3, 8]), num_lanes, state)
        for _ in range(chance.randint(0, 2 * total // (world_size * batch_size) + 2)):
            step = {}
            for one in ranks:
                batch = next(one)
                assert (np.diff(batch.positions) > 0).all()
                assert len(batch.labels) == batch_size
                step |= dict(zip(batch.positions.tolist(), batch.labels.tolist()))
            assert sorted(step) == list(range(len(seen), len(seen) + world_size * batch_size))
            seen |= step
        assert all(one.state_dict() == ranks[0].state_dict() for one in ranks)
        assert {one.epoch for one in ranks} == {len(seen) // total}
        state = ranks[-1].state_dict()
        assert len(json.dumps(state)) < 300
    order = StreamOrder(0, np.array(counts), state["lanes"], buffer)
    starts = np.concatenate([[0], np.cumsum(counts)])
    units, rows = units_and_rows(order, np.arange(len(seen))).T
    assert [seen[position] for position in range(len(seen))] == (starts[units] + rows).tolist()
    for epoch in range(len(seen) // total):
        assert sorted(seen[p] for p in range(epoch * total, (epoch + 1) * total)) == list(range(total))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 4), (2, 2), (4, 0)])
def test_each_process_reads_its_own_lanes_once(world_size, num_workers):
    """A unit is opened by each lane that has a part of it, and by no other process or worker."""
    source = source_of([100] * 40)
    ranks = start(source, world_size, 16, 50, num_workers, 8)
    for _ in range(4000 // (16 * world_size) - num_workers):
        for one in ranks:
            next(one)
    assert 40 <= source.images.opened <= 40 + 8 + 8  # lanes begin inside units, and go on in the next epoch


def test_lanes_that_are_used_no_longer_are_closed():
    order, source = StreamOrder(0, np.full(8, 50), lanes=8, window=10), source_of([50] * 8)
    reader = lanes.LaneReader(source, order)
    for batch in range(20):
        for lane in range(8 if batch == 0 else 2):
            reader.window(0, lane, batch // 5)
        reader.end_batch()
    assert sorted(reader._lanes) == [0, 1]
