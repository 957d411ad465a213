"""Many processes on many images: what holds for few holds for them, and costs none of them more."""

import importlib.util
import random
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jit_accel.data.batches import order

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"
_spec = importlib.util.spec_from_file_location("scale_benchmark", SCRIPT)
benchmark = sys.modules["scale_benchmark"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)

BILLION = 10**9


def images_of_a_step(base, world_size, batch_size, n=BILLION):
    positions = [order.batch_positions(base, rank, batch_size) for rank in range(world_size)]
    return np.concatenate([order.image_indices(3, part, n, order.FEISTEL) for part in positions])


@pytest.mark.parametrize("base", [0, 123_456_789, BILLION - 5000, 7 * BILLION - 1])  # two of them across an epoch's end
def test_256_processes_see_a_billion_images_as_one_does(base):
    together = images_of_a_step(base, 1, 8192)
    for world_size in (2, 16, 256):
        assert np.array_equal(images_of_a_step(base, world_size, 8192 // world_size), together)
    of_this_epoch = together[: BILLION - base % BILLION]
    assert len(set(of_this_epoch.tolist())) == len(of_this_epoch)
    # And 64 processes that go on in the middle of the step see the rest of it
    assert np.array_equal(images_of_a_step(base + 4096, 64, 64), together[4096:])


def test_an_epoch_of_256_processes_has_every_image_once():
    n, step_images = 2**18 + 12_345, 256 * 512
    steps = -(-2 * n // step_images)
    seen = np.concatenate([images_of_a_step(step * step_images, 256, 512, n) for step in range(steps)])
    assert np.array_equal(np.sort(seen[:n]), np.arange(n))
    assert np.array_equal(np.sort(seen[n : 2 * n]), np.arange(n))
    assert np.mean(seen[:n] == seen[n : 2 * n]) < 1e-4


@pytest.mark.parametrize("seed", range(20))
def test_a_place_of_random_many_images_is_the_same_alone_and_among_others(seed):
    chance = random.Random(seed)
    n = chance.randrange(order.MOST_SORTED + 1, 2**44)
    positions = np.array([chance.randrange(20 * n) for _ in range(50)])
    together = order.image_indices(seed, positions, n, order.FEISTEL)
    assert together.min() >= 0
    assert together.max() < n
    for place in (0, 17, 49):
        alone = order.image_indices(seed, positions[place : place + 1], n, order.FEISTEL)
        assert alone.tolist() == [together[place]]


def test_the_memory_for_a_batch_does_not_follow_the_number_of_images():
    def most_bytes(n):
        tracemalloc.start()
        order.image_indices(0, np.arange(n, n + 256), n, order.default_kind(n))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert max(most_bytes(n) for n in (2**21, BILLION, 2**50)) < 100_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_a_process_of_256_holds_and_writes_its_share():
    ddp, *others = (None, 0), ((256,), 0), ((256,), 255), ((32, 8), 0), ((32, 8), 7), ((32, 8), 255)
    (whole, _), *shares = benchmark.sharded_as_each(*(("JiT-Ti/16", *each) for each in (ddp, *others)))
    for (shape, rank), (held, written) in zip(others, shares):
        assert 0 < held < 1.5 * whole / shape[-1]  # the last one has what is left of the rows
        assert written == (held if len(shape) == 1 or rank < 8 else 0)  # one copy of the model is written
