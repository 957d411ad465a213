"""Streams: every image once an epoch, whatever the shards; the same in every step, resumed anywhere."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import SIZE, image_folder, numbers_in, parquet, png, take, tar
from http_server import FailingServer

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches import lanes
from jit_accel.data.batches.batch import ready
from jit_accel.data.reading.images import Stream
from jit_accel.prepare import main as prepare

UNEVEN = (1, 17, 5, 8, 2)  # rows of the files; a row group has at most 5
N = sum(UNEVEN)
LANES = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same numbers in every kind of container."""
    root, first = tmp_path_factory.mktemp("kinds"), 0
    image_folder(root / "folder", N)
    for shard, rows in enumerate(UNEVEN):
        members = {}
        for n in range(first, first + rows):
            members |= {f"{n:04d}.png": png(n), f"{n:04d}.cls": b"%d" % (n % 2)}
        parquet(root / "parquet" / f"{shard}.parquet", range(first, first + rows))
        tar(root / "tar" / f"{shard}.tar", members)
        first += rows
    for format in ("uint8", "png"):
        flags = ("--data_path", str(root / "folder"), "--img_size", str(SIZE), "--format", format)
        assert prepare([*flags, "--output_dir", str(root / format), "--num_workers", "1"]) == 0
    return root


@pytest.fixture(scope="module")
def source(root):
    return open_images(root / "parquet")


@pytest.fixture(scope="module")
def tars(root):
    return open_images(root / "tar")


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


def start(source, loaders, world_size, state=None, **settings):
    ranks = [loaders(source, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    for loader in ranks:
        if state:
            loader.load_state_dict(state)
    return ranks


def steps(ranks, count):
    """The next `count` batches of all processes: for each step {position: number of its image}."""
    found = []
    for _ in range(count):
        found.append({})
        for loader in ranks:
            batch = next(loader)
            found[-1] |= dict(zip(batch.positions.tolist(), numbers_in(batch.images)))
    return found


def in_order(found):
    """The numbers of steps in the order of their positions."""
    seen = {position: number for step in found for position, number in step.items()}
    return [seen[position] for position in sorted(seen)]


def epochs_of(seen):
    return [seen[n : n + N] for n in range(0, len(seen) - N + 1, N)]


KINDS = ["folder", "parquet", "tar", "url", "uint8", "png"]
# (processes, batch size, steps, workers), one after the other, with 12 images a step
PHASES = [(1, 12, 2, 0), (2, 6, 1, 2), (4, 3, 3, 0), (3, 4, 1, 1), (1, 12, 4, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_the_same_images_on_any_processes_and_after_any_resume(root, loaders, kind, hf_cache):
    server = FailingServer(root / "parquet") if kind == "url" else None
    source = open_images(f"{server.url}/{{0..4}}.parquet" if server else root / kind)
    try:
        uninterrupted = steps(start(source, loaders, 1, batch_size=12, lanes=LANES), 11)
        for world_size in (2, 3, 4):
            ranks = start(source, loaders, world_size, batch_size=12 // world_size, lanes=LANES)
            assert steps(ranks, 5) == uninterrupted[:5]
        found, state = [], None
        for world_size, batch_size, count, num_workers in PHASES:
            how = {"batch_size": batch_size, "num_workers": num_workers, "lanes": LANES}
            ranks = start(source, loaders, world_size, state, **how)
            found += steps(ranks, count)
            state = json.loads(json.dumps(ranks[-1].state_dict()))
            assert all(loader.state_dict() == state for loader in ranks)
            assert len(json.dumps(state)) < 300
            for loader in ranks:
                loader.close()
        assert found == uninterrupted
        assert all(sorted(epoch) == list(range(N)) for epoch in epochs_of(in_order(found)))
    finally:
        if server:
            server.go_away()


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 2), (3, 1), (11, 0)])
def test_every_image_comes_once_an_epoch(request, loaders, kind, world_size, num_workers):
    """On all processes together: the run's images number 0 .. N - 1 are those of the data, and so on."""
    ranks = start(request.getfixturevalue(kind), loaders, world_size, num_workers=num_workers)
    epochs = epochs_of(in_order(steps(ranks, 3 * N // (3 * world_size) + 2)))
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("kind", ["source", "tars"])
def test_workers_change_nothing(request, loaders, kind):
    source = request.getfixturevalue(kind)
    settings = {"world_size": 2, "rank": 1}
    expected = batches(loaders(source, **settings), 14)
    for num_workers in (1, 3):
        assert_equal_batches(expected, batches(loaders(source, num_workers=num_workers, **settings), 14))


# (processes, batch size, batches, workers), one after the other
CHANGES = {
    "1-2-3-1": [(1, 3, 3, 0), (2, 3, 2, 2), (3, 3, 3, 1), (1, 3, 8, 2)],
    "a resume after every batch": [(2, 1, 1, 0), (3, 1, 1, 0), (1, 5, 1, 0), (4, 1, 1, 0)] * 4,
    "at the very start and the epoch's end": [(2, 3, 0, 0), (3, 11, 1, 0), (1, 1, 0, 0), (2, 3, 6, 0)],
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_other_processes_workers_and_batch_sizes_go_on_in_the_same_order(source, loaders, changes):
    expected, found, state = take(loaders(source, batch_size=1, lanes=LANES), 3 * N), [], None
    for world_size, batch_size, count, num_workers in changes:
        how = {"batch_size": batch_size, "num_workers": num_workers, "lanes": LANES}
        ranks = start(source, loaders, world_size, state, **how)
        found += steps(ranks, count)
        state = json.loads(json.dumps(ranks[0].state_dict()))
        assert ranks[0].epoch == len(in_order(found)) // N
    assert in_order(found) == expected[: len(in_order(found))]


def test_lanes_and_windows_of_a_run_stay_and_it_is_said(source, loaders, caplog):
    first = loaders(source, lanes=2, shuffle_buffer=7)
    seen = take(first, 4)
    resumed = loaders(source, lanes=3, shuffle_buffer=5)
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict() == first.state_dict()
    assert "--lanes 3: the run began with 2" in caplog.text
    assert "--shuffle_buffer 5: the run began with 7" in caplog.text
    seen += take(resumed, 7)
    assert seen == take(loaders(source, lanes=2, shuffle_buffer=7), 11)


def test_a_state_of_before_begins_its_epoch_anew_and_says_so(source, loaders, caplog):
    old = {"kind": "stream", "version": 2, "seed": 11, "world_size": 2, "rank": 0, "position": N + 5, "places": []}
    resumed = loaders(source)
    resumed.load_state_dict([old, old | {"rank": 1}])
    assert resumed.epoch == 1
    assert caplog.text.count("epoch 2, in which it was saved, begins anew") == 1
    seen = take(resumed, N // 3)
    assert sorted(seen) == list(range(N))
    assert resumed.state_dict()["position"] == 2 * N


def test_a_window_is_shuffled_and_not_in_the_order_of_the_shard(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(30), row_group_size=30))
    seen = take(loaders(source, batch_size=1, shuffle_buffer=10, lanes=1), 30)
    windows = [seen[n : n + 10] for n in (0, 10, 20)]
    assert [sorted(window) for window in windows] == [list(range(n, n + 10)) for n in (0, 10, 20)]
    assert all(window != sorted(window) for window in windows)


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
    with pytest.raises(UserError, match=r"a.parquet: .*--resume auto"):
        next(loaders(source))


def test_windows_of_large_images_are_smaller(source, loaders, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_WINDOW_BYTES", 3 * len(png(0)) + 9)
    whole = loaders(source, shuffle_buffer=1000)
    assert whole.state_dict()["window"] == 3
    assert sorted(take(whole, N // 3)) == list(range(N))
    monkeypatch.undo()
    resumed = loaders(source, shuffle_buffer=1000)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.state_dict()["window"] == 3


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
    """Batches of 3, windows of 4, row groups of 5: the stops lie within windows, lanes, shards and epochs."""
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
        assert_equal_batches(expected[stop : stop + 4], batches(resumed, min(4, count - stop)))


@pytest.mark.parametrize("stop", [1, 11])
def test_resume_is_exact_with_workers(source, loaders, stop):
    settings = {"num_workers": 2, "world_size": 2, "rank": 1}
    whole = loaders(source, **settings)
    batches(whole, stop)
    resumed = loaders(source, **settings)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert_equal_batches(batches(whole, 12), batches(resumed, 12))
    assert whole.state_dict() == resumed.state_dict()


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
    bad = (0, 7, 8, 9, 10, 11, 19)  # more in a row than a window holds
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
    got, state = [], None
    for _ in range(12):
        loader = loaders(source)
        if state:
            loader.load_state_dict(state)
        got += next(loader).bad_images
        state = loader.state_dict()
    assert got == expected
    assert len(expected) >= 12


def test_a_stream_of_broken_images_stops_with_a_message(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(6), bad=range(6)))
    with pytest.raises(UserError, match=r"none of 6 images can be decoded.*not an image.*--raw_shape"):
        next(loaders(source))


def test_more_processes_than_images_wait_for_their_turn(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(2)))
    seen = in_order(steps(start(source, loaders, 3, batch_size=1), 4))
    assert [sorted(seen[n : n + 2]) for n in range(0, 12, 2)] == [[0, 1]] * 6


def test_a_state_of_another_seed_or_kind_is_refused(source, loaders):
    state = loaders(source).state_dict()
    with pytest.raises(UserError, match=r"the seed 11, and it is 12 now; .* use 11 again"):
        loaders(source, seed=12).load_state_dict(state)
    with pytest.raises(UserError, match=r"the kind random_access, .* use the same --streaming"):
        loaders(source).load_state_dict(state | {"kind": "random_access"})


def test_labels_beyond_num_classes_are_refused(source, loaders):
    with pytest.raises(UserError, match="num_classes 1: the data has the label 1"):
        batches(loaders(source, num_classes=1), 3)


def test_images_that_lost_their_labels_are_refused(tmp_path, loaders):
    source = open_images(parquet(tmp_path / "a.parquet", range(6)))
    parquet(tmp_path / "a.parquet", range(6), [0, 1, 0, -1, 0, 1])
    with pytest.raises(UserError, match="no label, or a negative one"):
        batches(loaders(source), 2)


def test_a_broken_image_without_a_name_has_one_in_every_epoch(tmp_path, loaders):
    rows = [{"bytes": b"damaged" if n == 7 else png(n), "path": None} for n in range(12)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", row_group_size=5)
    loader = loaders(open_images(tmp_path), batch_size=1)
    reasons = [reason for batch in batches(loader, 36) for reason in batch.bad_images]
    assert reasons == ["a.parquet, row group 1, image 2: UnidentifiedImageError: not an image"] * 3


def test_a_shard_that_became_shorter_is_named(source, loaders, monkeypatch):
    monkeypatch.setattr(Stream, "rows", lambda self, unit, start=0: iter(()))
    with pytest.raises(UserError, match="a shard ended after 0 images"):
        next(loaders(source))


def test_the_search_for_a_readable_image_ends(tmp_path, loaders, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_UNREADABLE", 3)
    source = open_images(parquet(tmp_path / "a.parquet", range(20), bad=range(20), row_group_size=4))
    with pytest.raises(UserError, match="none of 3 images can be decoded"):
        next(loaders(source))
