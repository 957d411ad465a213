"""The order of the images is a pure function of (seed, position)."""

import numpy as np
import pytest

from jit_accel.data.batches import order


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


def test_each_epoch_and_seed_has_its_own_order_of_all_images():
    orders = [order.epoch_permutation(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one.tolist()) == list(range(100)) for one in orders)
    assert len({tuple(one.tolist()) for one in orders}) == 4


def test_batches_roll_over_epochs_and_lose_nothing():
    n, batch_size = 10, 7  # no batch ends with the epoch before the seventh epoch does
    positions = np.concatenate([order.batch_positions(base, 0, batch_size) for base in range(0, 70, batch_size)])
    indices = order.image_indices(3, positions, n)
    assert all(sorted(indices[epoch * n : (epoch + 1) * n].tolist()) == list(range(n)) for epoch in range(7))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_sees_the_same_positions_however_it_is_divided(world_size, accumulation):
    assert [seen_in_step(step, world_size, accumulation, 3) for step in range(5)] == [
        list(range(step * 12, step * 12 + 12)) for step in range(5)
    ]


def test_flips_are_fair_and_depend_on_the_position_alone():
    together = order.flips(5, np.arange(10_000))
    assert abs(together.mean() - 0.5) < 0.02  # four standard deviations
    assert [bool(order.flips(5, p)) for p in range(50)] == together[:50].tolist()
    assert (together != order.flips(6, np.arange(10_000))).any()
