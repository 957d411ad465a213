"""Streams under random circumstances: shards, processes, workers, batch and buffer sizes, stops and resumes.

The rows are numbers instead of images, so that thousands of resumes take seconds.
"""

import json
import random

import numpy as np
import pytest

from jit_accel.data.batches import lanes, streams
from jit_accel.data.batches.lanes import Decoding
from jit_accel.data.batches.streams import StreamLoader
from jit_accel.data.formats.columns import Columns
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.units import Stream

SEEDS = 120


class Numbers(Stream):
    """Shards of `counts` rows; the n-th row of all holds n."""

    def __init__(self, counts, is_sized):
        sizes = np.array(counts, np.int64) if is_sized else None
        super().__init__((), None, Columns("image", "label"), sizes)
        object.__setattr__(self, "counts", counts)

    @property
    def num_units(self):
        return len(self.counts)

    def rows(self, unit, start=0):
        first = sum(self.counts[:unit])
        return ({"image": b"", "label": first + row} for row in range(start, self.counts[unit]))


@pytest.fixture(autouse=True)
def numbers_for_images(monkeypatch):
    monkeypatch.setattr(lanes.Lane, "_decode", lambda self, item: (np.zeros((3, 1, 1), np.uint8), item.value["label"]))
    monkeypatch.setattr(streams, "make_loader", lambda group, num_workers: group)  # the worker's order, without it


def start(source, world_size, batch_size, buffer, num_workers, states):
    decoding = Decoding(1, batch_size, 0, buffer, horizontal_flip=False)
    how = {"world_size": world_size, "num_workers": num_workers, "pin_memory": False, "num_classes": None}
    ranks = [StreamLoader(source, decoding, rank=rank, **how) for rank in range(world_size)]
    for loader in ranks:
        if states:
            loader.load_state_dict(json.loads(json.dumps(states)))
    return ranks


def run(seed, is_sized):
    """Yield (source, ranks, seen) after each of a few starts; seen: position in the run -> number."""
    chance = random.Random(seed)
    counts = [chance.randint(0 if is_sized else 1, 12) for _ in range(chance.randint(1, 12))]
    counts[0] += not sum(counts)
    images = Numbers(counts, is_sized)
    total = sum(counts)
    source = Source("numbers", "parquet", images, total if is_sized else None, (), "", None)
    seen, states, circumstances = {}, None, None
    for _ in range(4):
        if circumstances is None or chance.random() < 0.6:
            world_size = min(chance.choice([1, 1, 2, 3]), len(counts))
            circumstances = world_size, chance.randint(1, 5), chance.choice([1, 3, 8, 50])
            reference = None
        else:
            reference = start(source, *circumstances, 0, states)
        ranks = start(source, *circumstances, chance.choice([0, 1, 2, 3, 8]), states)
        for _ in range(chance.randint(0, 2 * total // (circumstances[0] * circumstances[1]) + 2)):
            for rank, loader in enumerate(ranks):
                batch = next(loader)
                if reference:
                    assert batch.labels.tolist() == next(reference[rank]).labels.tolist()
                assert not seen.keys() & set(batch.positions.tolist())
                seen |= dict(zip(batch.positions.tolist(), batch.labels.tolist()))
        states = [loader.state_dict() for loader in ranks]
        yield total, ranks, seen


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_images_of_each_epoch_stand_at_its_positions(seed):
    for total, ranks, seen in run(seed, is_sized=True):
        assert sorted(seen) == list(range(len(seen)))
        for epoch in range(len(seen) // total):
            numbers = [seen[position] for position in range(epoch * total, (epoch + 1) * total)]
            assert sorted(numbers) == list(range(total))
        assert {loader.epoch for loader in ranks} == {len(seen) // total}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_without_known_sizes_each_image_came_once_in_each_epoch_that_ended(seed):
    for total, ranks, seen in run(seed, is_sized=False):
        states = [loader.state_dict() for loader in ranks]
        epochs = [place["epoch"] for state in states for place in state["places"]]
        begun = [epoch for state in states for epoch, _ in state["left"]]  # by processes that were ahead of others
        counts = np.bincount(list(seen.values()), minlength=total)
        assert min(epochs) <= counts.min()
        assert counts.max() <= max(epochs + begun) + 1
