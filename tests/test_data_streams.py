"""Streams: every image once an epoch, whatever the shards; resumed exactly in the middle of anything."""

import json

import datasets
import pytest
import torch
from data_samples import SIZE, numbers_in, parquet, png, take, tar

from jit_accel.data import build_loader, open_source
from jit_accel.errors import UserError

UNEVEN = (1, 17, 5, 8, 2)  # rows of the files; a row group has at most 5
N = sum(UNEVEN)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("shards"), 0
    for shard, rows in enumerate(UNEVEN):
        parquet(folder / f"{shard}.parquet", range(start, start + rows))
        start += rows
    return open_source(folder)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("tars"), 0
    for shard, rows in enumerate(UNEVEN):
        members = {}
        for n in range(start, start + rows):
            members |= {f"{n:04d}.png": png(n), f"{n:04d}.cls": b"%d" % (n % 2)}
        tar(folder / f"{shard}.tar", members)
        start += rows
    return open_source(folder)


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


def until_epochs(loader, epochs):
    """The numbers in the batches until `epochs` epochs have ended."""
    seen = []
    while loader.epoch < epochs:
        seen += take(loader, 1)
    return seen


def two_epochs_each_once(per_rank, epoch_sizes):
    """Cut what each rank saw into its epochs and return the sorted union of each."""
    firsts, seconds = [], []
    for seen, (first, second) in zip(per_rank, epoch_sizes):
        firsts += seen[:first]
        seconds += seen[first : first + second]
    return sorted(firsts), sorted(seconds)


def epoch_sizes(source, loaders, **settings):
    """How many images of its first two epochs a rank has, counted one by one."""
    loader, sizes = loaders(source, batch_size=1, **settings), [0, 0]
    while loader.epoch < 2:
        epoch = loader.epoch
        next(loader)
        sizes[epoch] += 1
    return sizes


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (12, 0)])
def test_every_image_comes_once_an_epoch(request, loaders, kind, world_size, num_workers):
    source = request.getfixturevalue(kind)
    ranks = [loaders(source, rank=r, world_size=world_size, num_workers=num_workers) for r in range(world_size)]
    seen = [until_epochs(loader, 2) for loader in ranks]
    settings = {"world_size": world_size, "num_workers": num_workers}
    sizes = [epoch_sizes(source, loaders, rank=rank, **settings) for rank in range(world_size)]
    assert two_epochs_each_once(seen, sizes) == (list(range(N)), list(range(N)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_process_gives_the_first_epoch_before_the_second(source, loaders, num_workers):
    seen = take(loaders(source, num_workers=num_workers, batch_size=1), 3 * N)
    epochs = [seen[start : start + N] for start in (0, N, 2 * N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_block_is_shuffled_and_not_in_the_order_of_the_shard(tmp_path, loaders):
    source = open_source(parquet(tmp_path / "a.parquet", range(30), row_group_size=30))
    seen = take(loaders(source, batch_size=1, shuffle_buffer=10), 30)
    blocks = [seen[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(block) for block in blocks] == [list(range(start, start + 10)) for start in (0, 10, 20)]
    assert all(block != sorted(block) for block in blocks)
    orders = {tuple(n % 10 for n in block) for block in blocks}
    assert len(orders) == 3


def batches(loader, count):
    return [next(loader) for _ in range(count)]


def assert_equal_batches(expected, got):
    for a, b in zip(expected, got, strict=True):
        assert numbers_in(a.images) == numbers_in(b.images)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.positions.tolist() == b.positions.tolist()
        assert a.bad_images == b.bad_images


@pytest.mark.parametrize("kind", ["source", "tars"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1), (12, 5)])
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


def test_another_batch_size_resumes_without_loss(source, loaders):
    first = loaders(source, batch_size=5)
    seen = take(first, 2)
    second = loaders(source, batch_size=1)
    second.load_state_dict(first.state_dict())
    seen += take(second, N - 10)
    assert sorted(seen) == list(range(N))


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
    source = open_source(tar(tmp_path / "a.tar", members))
    loader = loaders(source, batch_size=200, shuffle_buffer=64)
    mirrored = [next(loader).images[:, 0, 0, 0] == 255 for _ in range(2)]
    assert all(60 < m.sum() < 140 for m in mirrored)
    assert not torch.equal(*mirrored)
    assert not (next(loaders(source, batch_size=200, horizontal_flip=False)).images[..., 0] == 255).any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_skipped_and_named_once_an_epoch(tmp_path, loaders, num_workers):
    bad = (0, 7, 8, 9, 10, 11, 19)  # more in a row than a block holds
    source = open_source(parquet(tmp_path / "a.parquet", range(20), bad=bad))
    loader = loaders(source, num_workers=num_workers, batch_size=1)
    epoch = batches(loader, 20 - len(bad))
    assert sorted(n for batch in epoch for n in numbers_in(batch.images)) == sorted(set(range(20)) - set(bad))
    # bad ones behind the epoch's last good one are met with the next batch
    reasons = [reason for batch in [*epoch, next(loader)] for reason in batch.bad_images][: len(bad)]
    assert sorted(reasons) == sorted(f"{n}.png: UnidentifiedImageError: not an image" for n in bad)


def test_broken_images_are_not_named_again_after_a_resume(tmp_path, loaders):
    source = open_source(parquet(tmp_path / "a.parquet", range(20), bad=range(0, 20, 3)))
    expected = [reason for batch in batches(loaders(source), 12) for reason in batch.bad_images]
    got, state, stopped_inside = [], None, 0
    for _ in range(12):
        loader = loaders(source)
        if state:
            loader.load_state_dict(state)
        got += next(loader).bad_images
        state = loader.state_dict()
        stopped_inside += state["sub_streams"][0]["taken"] > 0
    assert got == expected
    assert len(expected) >= 14
    assert stopped_inside


def test_a_stream_of_broken_images_stops_with_a_message(tmp_path, loaders):
    source = open_source(parquet(tmp_path / "a.parquet", range(6), bad=range(6)))
    with pytest.raises(UserError, match=r"no readable image in a whole epoch.*not an image"):
        next(loaders(source))


def test_more_processes_than_images_stop_with_a_message(tmp_path, loaders):
    source = open_source(parquet(tmp_path / "a.parquet", range(2)))
    with pytest.raises(UserError, match="process 2 found no readable image"):
        next(loaders(source, world_size=3, rank=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 2}, "the number of processes was 1 .* is 2 now; .*--streaming false"),
        ({"num_workers": 1}, "--num_workers was 0 .* is 1 now"),
        ({"shuffle_buffer": 5}, "--shuffle_buffer was 4"),
        ({"seed": 12}, "--seed was 11"),
    ],
)
def test_a_state_of_other_circumstances_is_refused(source, loaders, changes, message):
    state = loaders(source).state_dict()
    with pytest.raises(UserError, match=message):
        loaders(source, **changes).load_state_dict(state)


def test_labels_beyond_num_classes_are_refused(source, loaders):
    with pytest.raises(UserError, match="--num_classes 1: the data has the label 1"):
        batches(loaders(source, num_classes=1), 3)


def test_unlabelled_images_in_a_stream_nobody_scanned_are_refused(tmp_path, loaders, monkeypatch):
    file, real = parquet(tmp_path / "a.parquet", range(6), [0, 1, 0, -1, 0, 1]), datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **how: real("parquet", data_files=str(file), **how))
    source = open_source("someone/pictures")
    with pytest.raises(UserError, match="no label, or a negative one"):
        batches(loaders(source), 2)


def test_the_state_is_small(source, loaders):
    loader = loaders(source, batch_size=5)
    batches(loader, 3)
    assert len(json.dumps(loader.state_dict())) < 2000
