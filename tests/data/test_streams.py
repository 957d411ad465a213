"""Streams: every image once an epoch, whatever the shards; resumed exactly in the middle of anything."""

import json
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import SIZE, numbers_in, parquet, png, take, tar
from http_server import FailingServer

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches import lanes
from jit_accel.data.batches.batch import ready
from jit_accel.data.reading.units import Stream

UNEVEN = (1, 17, 5, 8, 2)  # rows of the files; a row group has at most 5
N = sum(UNEVEN)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("shards"), 0
    for shard, rows in enumerate(UNEVEN):
        parquet(folder / f"{shard}.parquet", range(start, start + rows))
        start += rows
    return open_images(folder)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("tars"), 0
    for shard, rows in enumerate(UNEVEN):
        members = {}
        for n in range(start, start + rows):
            members |= {f"{n:04d}.png": png(n), f"{n:04d}.cls": b"%d" % (n % 2)}
        tar(folder / f"{shard}.tar", members)
        start += rows
    return open_images(folder)


@pytest.fixture
def loaders():
    """Build loaders that are closed after the test."""
    opened = []

    def build(source, **changes):
        settings = {"img_size": SIZE, "batch_size": 3, "seed": 11, "shuffle_buffer": 4} | changes
        opened.append(build_loader(source, **settings))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def in_turn(ranks, count):
    """The numbers of the next `count` batches of all processes, in the order of their positions in the run."""
    return [number for _ in range(count) for loader in ranks for number in take(loader, 1)]


def start(source, loaders, world_size, **settings):
    return [loaders(source, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]


def states_of(ranks):
    return json.loads(json.dumps([loader.state_dict() for loader in ranks]))


def epochs_of(seen):
    return [seen[n : n + N] for n in range(0, len(seen) - N + 1, N)]


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 1), (11, 0)])
def test_every_image_comes_once_an_epoch(request, loaders, kind, world_size, num_workers):
    """On all processes together: the run's images number 0 .. N - 1 are those of the data, and so on."""
    ranks = start(request.getfixturevalue(kind), loaders, world_size, num_workers=num_workers)
    epochs = epochs_of(in_turn(ranks, 3 * N // (3 * world_size) + 2))
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_change_nothing(request, loaders, kind, world_size):
    source = request.getfixturevalue(kind)
    settings = {"world_size": world_size, "rank": world_size - 1}
    expected = batches(loaders(source, **settings), 14)
    for num_workers in (1, 3):
        assert_equal_batches(expected, batches(loaders(source, num_workers=num_workers, **settings), 14))


# (processes, batch size, batches, workers), one after the other
CHANGES = {
    "1-2-3-1": [(1, 3, 3, 0), (2, 3, 2, 2), (3, 3, 3, 1), (1, 3, 8, 2)],
    "a resume after every batch": [(2, 1, 1, 0), (3, 1, 1, 0), (1, 5, 1, 0), (4, 1, 1, 0)] * 4,
    "at the very start and the epoch's end": [(2, 3, 0, 0), (3, 11, 1, 0), (1, 1, 0, 0), (2, 3, 6, 0)],
}


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_other_processes_workers_and_batch_sizes_resume_without_loss(request, loaders, kind, changes):
    source, seen, states = request.getfixturevalue(kind), [], None
    for world_size, batch_size, count, num_workers in changes:
        ranks = start(source, loaders, world_size, batch_size=batch_size, num_workers=num_workers)
        for loader in ranks:
            if states:
                loader.load_state_dict(states)
        seen += in_turn(ranks, count)
        states = states_of(ranks)
        assert ranks[0].epoch == len(seen) // N
    seen += in_turn(ranks, 2 * N // len(ranks))  # on to the end of an epoch
    epochs = epochs_of(seen)
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_process_gives_the_first_epoch_before_the_second(source, loaders, num_workers):
    seen = take(loaders(source, num_workers=num_workers, batch_size=1), 3 * N)
    epochs = [seen[start : start + N] for start in (0, N, 2 * N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_block_is_shuffled_and_not_in_the_order_of_the_shard(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(30), row_group_size=30))
    seen = take(loaders(source, batch_size=1, shuffle_buffer=10), 30)
    # four lanes at most share one unit, here 7, 8, 7 and 8 images each, handed out in turn
    parts = [list(range(7)), list(range(7, 15)), list(range(15, 22)), list(range(22, 30))]
    orders = [[n for n in seen if n in part] for part in parts]
    assert [sorted(order) for order in orders] == parts
    assert all(order != sorted(order) for order in orders)
    assert [next(k for k, part in enumerate(parts) if n in part) for n in seen[:8]] == [0, 1, 2, 3] * 2


def test_row_groups_are_read_as_they_are_from_any_row_on(source):
    images, unit = source.images, 0
    assert images.num_units > len(UNEVEN)
    for shard in images.shards:
        with pq.ParquetFile(shard.path) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number).to_pylist()
                for first in range(3):
                    assert list(images.rows(unit, first)) == rows[first:]
                unit += 1


def test_a_row_group_that_went_away_is_named(tmp_path, loaders):
    file = parquet(tmp_path / "a.parquet", range(40))
    source = open_images(file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"a.parquet: row group \d cannot be read .* --resume auto"):
        next(loaders(source))


def test_a_block_of_large_images_ends_early(source, loaders, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_BLOCK_BYTES", 3 * len(png(0)))
    whole = loaders(source, shuffle_buffer=1000)
    states, expected = [], []
    for _ in range(2 * N // 3):
        states.append(json.dumps(whole.state_dict()))
        expected.append(next(whole))
    assert sorted(n for batch in expected for n in numbers_in(batch.images))[: 2 * N] == sorted(2 * list(range(N)))
    for stop in (1, 5, 8):
        resumed = loaders(source, shuffle_buffer=1000)
        resumed.load_state_dict(json.loads(states[stop]))
        assert_equal_batches(expected[stop:], batches(resumed, len(expected) - stop))


def batches(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal_batches(expected, got):
    for a, b in zip(expected, got, strict=True):
        assert numbers_in(a.images) == numbers_in(b.images)
        assert torch.equal(a.images, b.images)
        assert a.mirror.tolist() == b.mirror.tolist()
        assert torch.equal(a.labels, b.labels)
        assert a.positions.tolist() == b.positions.tolist()
        assert a.bad_images == b.bad_images


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1), (11, 5)])
def test_resume_is_exact_after_every_batch(request, loaders, kind, world_size, rank):
    """Batches of 3, blocks of 4, row groups of 5: the stops lie within blocks, chunks, shards and epochs."""
    source = request.getfixturevalue(kind)
    settings = {"world_size": world_size, "rank": rank}
    whole, count = loaders(source, **settings), 2 * N // (3 * world_size) + 4
    states, expected = [], []
    for _ in range(count):
        states.append(json.dumps(whole.state_dict()))
        expected.append(next(whole))
    for stop, state in enumerate(states):
        resumed = loaders(source, **settings)
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert_equal_batches(expected[stop:], batches(resumed, count - stop))


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_resume_is_exact_with_workers(request, loaders, kind, stop):
    source = request.getfixturevalue(kind)
    settings = {"num_workers": 2, "world_size": 2, "rank": 1}
    whole = loaders(source, **settings)
    batches(whole, stop)
    resumed = loaders(source, **settings)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert_equal_batches(batches(whole, 12), batches(resumed, 12))
    assert whole.state_dict() == resumed.state_dict()


def test_a_run_resumed_at_every_batch_equals_the_uninterrupted_one(source, loaders):
    expected = batches(loaders(source, num_workers=0), 30)
    got, state = [], None
    for _ in range(30):
        loader = loaders(source, num_workers=0)
        if state is not None:
            loader.load_state_dict(state)
        got.append(next(loader))
        state = json.loads(json.dumps(loader.state_dict()))
    assert_equal_batches(expected, got)


def test_positions_interleave_the_processes(source, loaders):
    ranks = [loaders(source, rank=rank, world_size=2) for rank in range(2)]
    positions = [next(loader).positions.tolist() for _ in range(2) for loader in ranks]
    assert positions == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_half_of_the_images_are_mirrored_differently_each_epoch(tmp_path, loaders):
    from PIL import Image

    halves = Image.new("RGB", (SIZE, SIZE))
    halves.paste((255, 255, 255), (SIZE // 2, 0, SIZE, SIZE))
    halves.save(tmp_path / "x.png")
    members = {f"{n:03d}.png": (tmp_path / "x.png").read_bytes() for n in range(200)}
    source = open_images(tar(tmp_path / "a.tar", members))
    loader = loaders(source, batch_size=200, shuffle_buffer=64)
    mirrored = [ready(next(loader), "cpu").images[:, 0, 0, 0] == 1 for _ in range(2)]
    assert all(60 < m.sum() < 140 for m in mirrored)
    assert not torch.equal(*mirrored)
    upright = ready(next(loaders(source, batch_size=200, horizontal_flip=False)), "cpu").images
    assert not (upright[..., 0] == 1).any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_replaced_and_named_once_an_epoch(tmp_path, loaders, num_workers):
    bad = (0, 7, 8, 9, 10, 11, 19)  # more in a row than a block holds
    source = open_images(parquet(tmp_path / "a.parquet", range(20), bad=bad))
    loader = loaders(source, num_workers=num_workers, batch_size=1)
    for _ in range(2):
        epoch = batches(loader, 20)
        seen = [n for batch in epoch for n in numbers_in(batch.images)]
        assert set(seen) == set(range(20)) - set(bad)
        assert [batch.labels.tolist() for batch in epoch] == [[n % 2] for n in seen]
        reasons = [reason for batch in epoch for reason in batch.bad_images]
        assert sorted(reasons) == sorted(f"{n}.png: UnidentifiedImageError: not an image" for n in bad)


def test_broken_images_are_not_named_again_after_a_resume(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(20), bad=range(0, 20, 3)))
    expected = [reason for batch in batches(loaders(source), 12) for reason in batch.bad_images]
    got, state, stopped_inside = [], None, 0
    for _ in range(12):
        loader = loaders(source)
        if state:
            loader.load_state_dict(state)
        got += next(loader).bad_images
        state = loader.state_dict()
        stopped_inside += any(place["offset"] for place in state["places"])
    assert got == expected
    assert len(expected) >= 12
    assert stopped_inside


def test_a_stream_of_broken_images_stops_with_a_message(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(6), bad=range(6)))
    with pytest.raises(UserError, match=r"none of 6 images can be decoded.*not an image"):
        next(loaders(source))


def test_more_processes_than_images_wait_for_their_turn(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(2)))
    ranks = start(source, loaders, 3, batch_size=1)
    seen = in_turn(ranks, 4)
    assert [sorted(seen[n : n + 2]) for n in range(0, 12, 2)] == [[0, 1]] * 6


def test_a_state_of_another_seed_or_kind_is_refused(source, loaders):
    state = loaders(source).state_dict()
    with pytest.raises(UserError, match="--seed was 11"):
        loaders(source, seed=12).load_state_dict(state)
    with pytest.raises(UserError, match="--streaming was random_access"):
        loaders(source).load_state_dict(state | {"kind": "random_access"})


def test_labels_beyond_num_classes_are_refused(source, loaders):
    with pytest.raises(UserError, match="num_classes 1: the data has the label 1"):
        batches(loaders(source, num_classes=1), 3)


def test_unlabelled_images_in_a_stream_nobody_scanned_are_refused(tmp_path, loaders):
    members = {}
    for n, label in enumerate([0, 1, 0, -1, 0, 1]):
        members |= {f"{n}.png": png(n), f"{n}.cls": b"%d" % label}
    tar(tmp_path / "a.tar", members)
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": 6}))
    source = open_images(f"{FailingServer(tmp_path).url}/a.tar")
    with pytest.raises(UserError, match="no label, or a negative one"):
        batches(loaders(source), 2)


def test_the_state_is_small(source, loaders):
    loader = loaders(source, batch_size=5)
    batches(loader, 3)
    assert len(json.dumps(loader.state_dict())) < 2000


def test_a_broken_image_without_a_name_has_one_in_every_epoch(tmp_path, loaders):
    rows = [{"bytes": b"damaged" if n == 7 else png(n), "path": None} for n in range(12)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", row_group_size=5)
    loader = loaders(open_images(tmp_path), batch_size=1)
    reasons = [reason for batch in batches(loader, 36) for reason in batch.bad_images]
    assert reasons == ["a.parquet, row group 1, image 2: UnidentifiedImageError: not an image"] * 3


def test_the_state_stays_small_when_others_resume_it(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(4000), row_group_size=50))
    ranks = start(source, loaders, 2, shuffle_buffer=100)
    in_turn(ranks, 30)
    states = states_of(ranks)
    (one,) = ranks = start(source, loaders, 1, shuffle_buffer=100)
    one.load_state_dict(states)
    in_turn(ranks, 3)
    assert 500 < len(json.dumps(one.state_dict())) < 8000
    while one.epoch < 1 or len(json.dumps(one.state_dict())) > 2000:
        assert one.epoch < 2
        next(one)


def test_reading_ahead_changes_nothing_and_passes_errors_on(source, loaders, monkeypatch):
    expected = batches(loaders(source), 2 * N // 3)
    monkeypatch.setattr(Stream, "is_remote", True)
    assert_equal_batches(expected, batches(loaders(source), 2 * N // 3))
    monkeypatch.setattr(Stream, "rows", lambda self, unit, start=0: iter(()))
    with pytest.raises(UserError, match="a shard ended after 0 images"):
        next(loaders(source))
    for _ in range(50):
        if not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the threads that read ahead are still there")


def test_the_search_for_a_readable_image_ends(tmp_path, loaders, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_UNREADABLE", 3)
    source = open_images(parquet(tmp_path / "a.parquet", range(20), bad=range(20), row_group_size=4))
    with pytest.raises(UserError, match="none of 3 images can be decoded"):
        next(loaders(source))
