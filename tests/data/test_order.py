"""The order of the images is a pure function of (seed, data, position)."""

import itertools
import random

import numpy as np
import pytest
from data_samples import units_and_rows

from jit_accel.data.batches import order
from jit_accel.data.batches.order import StreamOrder, default_lanes, shares


def seen_in_step(step, world_size, accumulation, batch_size):
    """Positions that the processes of one optimizer step read, as a set of the whole step."""
    base = step * accumulation * world_size * batch_size
    return [
        position
        for micro in range(accumulation)
        for rank in range(world_size)
        for position in order.batch_positions(base + micro * world_size * batch_size, rank, batch_size).tolist()
    ]


def test_the_order_of_an_epoch_never_changes():
    # A change here would make runs of older versions resume with images lost and repeated.
    assert order.epoch_permutation(7, 3, 10).tolist() == [6, 4, 8, 9, 1, 0, 2, 3, 5, 7]
    stream = StreamOrder(7, np.array([3, 0, 4]), lanes=2, window=2)
    found = units_and_rows(stream, np.arange(7, 14)).tolist()
    assert found == [[2, 0], [0, 0], [2, 1], [0, 1], [2, 3], [0, 2], [2, 2]]


def test_each_epoch_and_seed_has_its_own_order_of_all_images():
    orders = [order.epoch_permutation(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one.tolist()) == list(range(100)) for one in orders)
    assert len({tuple(one.tolist()) for one in orders}) == 4
    sizes = np.array([40, 0, 25, 35])
    streams = [
        units_and_rows(StreamOrder(seed, sizes, 4, 10), np.arange(epoch * 100, epoch * 100 + 100))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    rows = [[0, row] for row in range(40)] + [[2, row] for row in range(25)] + [[3, row] for row in range(35)]
    assert all(sorted(one.tolist()) == rows for one in streams)
    assert len({one.tobytes() for one in streams}) == 4


def test_batches_roll_over_epochs_and_lose_nothing():
    n, batch_size = 10, 7  # no batch ends with the epoch before the seventh epoch does
    positions = np.concatenate([order.batch_positions(base, 0, batch_size) for base in range(0, 70, batch_size)])
    indices = order.image_indices(3, positions, n)
    assert all(sorted(indices[epoch * n : (epoch + 1) * n].tolist()) == list(range(n)) for epoch in range(7))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_sees_the_same_positions_however_it_is_divided(world_size, accumulation):
    expected = [list(range(step * 12, step * 12 + 12)) for step in range(5)]
    assert [seen_in_step(step, world_size, accumulation, 3) for step in range(5)] == expected
    stream = StreamOrder(0, np.array([5, 6, 2]), lanes=4, window=3)
    for step in range(5):
        bases = range(step * 12, step * 12 + 12, world_size * 3)
        parts = [stream.positions_of(base, rank, world_size, 3) for base in bases for rank in range(world_size)]
        assert all(len(part) == 3 and (np.diff(part) > 0).all() for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == expected[step]


def test_flips_are_fair_and_depend_on_the_position_alone():
    together = order.flips(5, np.arange(10_000))
    assert abs(together.mean() - 0.5) < 0.02  # four standard deviations
    assert [bool(order.flips(5, p)) for p in range(50)] == together[:50].tolist()
    assert (together != order.flips(6, np.arange(10_000))).any()


@pytest.mark.parametrize("seed", range(60))
def test_lanes_and_windows_are_what_the_design_says_for_any_shape_of_data(seed):
    chance = random.Random(seed)
    sizes = np.array([chance.choice([0, 1, 3, 12, 40]) for _ in range(chance.randint(1, 9))])
    sizes[0] += not sizes.sum()
    n, lanes, window = int(sizes.sum()), chance.randint(1, 12), chance.choice([1, 3, 8, 50])
    stream, epoch = StreamOrder(seed, sizes, lanes, window), chance.randint(0, 3)
    positions = epoch * n + np.arange(n)
    units, starts = stream.units(epoch)
    assert sorted(units.tolist()) == list(range(len(sizes)))
    line = [(unit, row) for unit in units.tolist() for row in range(sizes[unit])]
    found = [tuple(pair) for pair in units_and_rows(stream, positions).tolist()]
    bounds = [stream.lane_bounds(lane) for lane in range(lanes)]
    assert (bounds[0][0], bounds[-1][1], starts[-1]) == (0, n, n)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
    for lane, (first, end) in enumerate(bounds):
        mine = found[lane::lanes]  # position p is lane p mod L, place p div L
        assert len(mine) == end - first
        for start in range(0, len(mine), window):
            assert sorted(mine[start : start + window]) == sorted(line[first:end][start : start + window])


def test_a_window_is_shuffled():
    stream = StreamOrder(0, np.array([60]), lanes=2, window=10)
    rows = units_and_rows(stream, np.arange(60))[::2, 1]
    windows = rows.reshape(3, 10)
    assert [sorted(window.tolist()) for window in windows] == [list(range(k, k + 10)) for k in (0, 10, 20)]
    assert all((np.diff(window) < 0).any() for window in windows)
    assert len({tuple(window - k) for k, window in zip((0, 10, 20), windows)}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_processes_that_divide_the_lanes_read_none_twice(world_size):
    stream = StreamOrder(0, np.full(32, 1000), lanes=8, window=16)
    for base in range(0, 16_000, 320):
        lanes = [stream.places(stream.positions_of(base, rank, world_size, 16)).lane for rank in range(world_size)]
        assert [sorted(set(some.tolist())) for some in lanes] == [
            list(range(rank * 8 // world_size, (rank + 1) * 8 // world_size)) for rank in range(world_size)
        ]


def test_shares_are_even_and_have_few_lanes():
    lanes = np.arange(100) % 6
    parts = shares(lanes, 7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert {len(part) for part in parts} == {14, 15}
    assert max(len(set(lanes[part].tolist())) for part in parts) == 2


@pytest.mark.parametrize(
    ("units", "world_size", "batch_size", "lanes"),
    [
        (1000, 1, 32, 8),
        (1000, 2, 32, 16),
        (1000, 3, 32, 24),
        (5, 1, 32, 4),  # a divisor of the batch
        (20, 3, 32, 12),  # a multiple of the processes
        (1000, 1, 31, 8),  # no divisor is near
        (1000, 1, 6, 6),
        (1, 4, 32, 1),
        (3, 8, 4, 2),
        (100_000, 256, 4, 1024),
        (0, 1, 1, 1),
    ],
)
def test_about_eight_lanes_a_process_are_chosen(units, world_size, batch_size, lanes):
    assert default_lanes(units, world_size, batch_size) == lanes
