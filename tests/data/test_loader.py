"""Random access: every image once an epoch, the same for any number of processes, resumed exactly."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.utils.data._utils.worker as torch_worker
from data_samples import SIZE, image_folder, numbers_in, png, take
from helpers import SPAWNER

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches import loader as loader_module
from jit_accel.data.batches import order
from jit_accel.data.batches import workers as workers_module
from jit_accel.data.batches.batch import ready
from jit_accel.data.batches.order import FEISTEL, KINDS, SORTED, flips
from jit_accel.data.reading.images import TableImages

N = 22


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_images(image_folder(tmp_path_factory.mktemp("images"), N))


@pytest.fixture
def loaders():
    """Build loaders that are closed after the test."""
    opened = []

    def build(source, **changes):
        settings = {"img_size": SIZE, "batch_size": 3, "seed": 11} | changes
        opened.append(build_loader(source, **settings))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def states_roundtrip(loader):
    return json.loads(json.dumps(loader.state_dict()))


def test_a_batch_is_what_it_promises(source, loaders):
    batch = next(loaders(source))
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, SIZE, SIZE), torch.uint8)
    assert (batch.labels.shape, batch.labels.dtype) == ((3,), torch.int64)
    assert (batch.positions.tolist(), batch.positions.dtype, batch.bad_images) == ([0, 1, 2], np.int64, [])
    assert batch.labels.tolist() == [number * 2 // N for number in numbers_in(batch.images)]
    moved = ready(batch, "meta")
    assert (moved.images.device.type, moved.labels.device.type) == ("meta", "meta")
    assert moved.positions is batch.positions


@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size"), [(1, 0, 3), (1, 2, 5), (2, 0, 4), (3, 0, 1), (2, 1, 3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_image_comes_once_an_epoch(source, loaders, world_size, num_workers, batch_size, kind):
    settings = {"world_size": world_size, "num_workers": num_workers, "batch_size": batch_size, "order_kind": kind}
    ranks = [loaders(source, rank=rank, **settings) for rank in range(world_size)]
    seen = [n for _ in range(3 * N // (world_size * batch_size) + 1) for loader in ranks for n in take(loader, 1)]
    epochs = [seen[start : start + N] for start in range(0, 3 * N - N + 1, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_equal_for_any_processes_and_accumulation(source, loaders, kind):
    def steps(world_size, accumulation):
        how = {"world_size": world_size, "order_kind": kind}
        ranks = [loaders(source, rank=rank, **how) for rank in range(world_size)]
        return [[n for _ in range(accumulation) for one in ranks for n in take(one, 1)] for _ in range(6)]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("consumed", [0, 1, 9])
def test_a_resumed_loader_continues_bit_for_bit(source, loaders, num_workers, consumed):
    whole = loaders(source, num_workers=num_workers)
    for _ in range(consumed):
        next(whole)
    state = states_roundtrip(whole)
    resumed = loaders(source, num_workers=num_workers)
    resumed.load_state_dict(state)
    for _ in range(9):
        expected, got = next(whole), next(resumed)
        assert torch.equal(expected.images, got.images)
        assert torch.equal(expected.labels, got.labels)
        assert (expected.positions == got.positions).all()
    assert whole.state_dict() == resumed.state_dict()


def test_workers_change_nothing(source, loaders):
    assert take(loaders(source), 20) == take(loaders(source, num_workers=2), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_continues_without_loss(source, loaders, kind, monkeypatch):
    uninterrupted = take(loaders(source, batch_size=1, order_kind=kind), 40)
    monkeypatch.setattr(order, "default_kind", lambda n: kind)
    seen, state = [], None
    for world_size, batch_size, batches in [(1, 2, 3), (2, 3, 2), (3, 1, 4), (1, 5, 2)]:
        ranks = [loaders(source, rank=r, world_size=world_size, batch_size=batch_size) for r in range(world_size)]
        for loader in ranks:
            if state:
                loader.load_state_dict(state)
        seen += [n for _ in range(batches) for loader in ranks for n in take(loader, 1)]
        assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)
        state = states_roundtrip(ranks[-1])
    assert seen == uninterrupted


def test_a_state_of_another_seed_or_kind_is_refused(source, loaders):
    loader = loaders(source)
    with pytest.raises(UserError, match=r"the seed 12, and it is 11 now"):
        loader.load_state_dict(loader.state_dict() | {"seed": 12})
    with pytest.raises(UserError, match="the kind stream, and it is random_access now"):
        loader.load_state_dict({"kind": "stream"})


def test_many_images_are_not_sorted_and_few_are(source, loaders, monkeypatch):
    assert loaders(source).state_dict()["order"] == SORTED
    monkeypatch.setattr(order, "MOST_SORTED", N - 1)
    many = loaders(source)
    assert many.state_dict()["order"] == FEISTEL
    monkeypatch.setattr(order, "epoch_permutation", None)  # it is not even asked
    assert sorted(take(many, 8)[:N]) == list(range(N))
    monkeypatch.undo()
    assert (order.default_kind(2**20), order.default_kind(2**20 + 1)) == (SORTED, FEISTEL)


@pytest.mark.parametrize("now", [0, N])
@pytest.mark.parametrize("kind", [SORTED, FEISTEL, None])
def test_a_run_keeps_the_order_in_which_it_began(source, loaders, monkeypatch, kind, now):
    """Whatever a new run would take now; states of earlier versions name none, and were of sorted images."""
    whole = loaders(source, order_kind=kind or SORTED)
    for _ in range(3):
        next(whole)
    state = states_roundtrip(whole)
    if kind is None:
        assert state.pop("order") == SORTED
    monkeypatch.setattr(order, "MOST_SORTED", now)
    resumed = loaders(source, batch_size=1)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["order"] == (kind or SORTED)
    found = take(resumed, 36)
    assert found == take(whole, 12)
    if kind is None:
        orders = np.concatenate([order.epoch_permutation(11, epoch, N) for epoch in range(3)])
        assert found == orders[9:45].tolist()


def test_the_order_of_a_later_version_is_refused(source, loaders):
    state = loaders(source).state_dict() | {"order": "of tomorrow"}
    with pytest.raises(UserError, match=r"an order \(of tomorrow\) that this version does not know") as raised:
        loaders(source).load_state_dict(state)
    assert raised.value.about == "resume"


def test_the_epoch_is_that_of_the_next_image(source, loaders):
    loader = loaders(source, batch_size=N // 2)
    epochs = [(next(loader), loader.epoch)[1] for _ in range(4)]
    assert epochs == [0, 1, 1, 2]


def half_black_folder(root, count):
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:, SIZE // 2 :] = 255
    from PIL import Image

    root.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


def test_images_are_mirrored_by_their_position(tmp_path, loaders):
    source = open_images(half_black_folder(tmp_path, 5))
    images = torch.cat([ready(next(loader), "cpu").images for loader in [loaders(source)] for _ in range(8)])
    assert ((images[:, 0, 0, 0] == 1).numpy() == flips(11, np.arange(24))).all()
    upright = ready(next(loaders(source, horizontal_flip=False, batch_size=24)), "cpu").images
    assert (upright[..., 0] == -1).all()


def test_a_broken_image_is_replaced_and_named(tmp_path, loaders):
    image_folder(tmp_path, N)
    for number in (3, 20):
        next(tmp_path.glob(f"c*/{number:04d}.png")).write_bytes(png(number)[:40])
    source = open_images(tmp_path)
    runs = []
    for num_workers in (0, 2):
        batches = [next(loader) for loader in [loaders(source, num_workers=num_workers)] for _ in range(8)]
        runs.append([(numbers_in(b.images), b.labels.tolist(), b.bad_images) for b in batches])
    assert runs[0] == runs[1]
    numbers = [n for batch, _, _ in runs[0] for n in batch][:N]
    assert set(numbers) == set(range(N)) - {3, 20}
    assert all(label == n * 2 // N for batch, labels, _ in runs[0] for n, label in zip(batch, labels))
    named = [reason for *_, reasons in runs[0] for reason in reasons]
    assert {next(n for n in (3, 20) if f"/{n:04d}.png: " in reason) for reason in named[:2]} == {3, 20}


def test_few_images_are_decoded_once_and_many_each_time(tmp_path, loaders, monkeypatch):
    image_folder(tmp_path, N)
    next(tmp_path.glob("c*/0003.png")).write_bytes(b"broken")
    source, asked, read = open_images(tmp_path), [], TableImages.read

    def counting(images, indices, out):
        asked.extend(indices.tolist())
        return read(images, indices, out)

    monkeypatch.setattr(TableImages, "read", counting)
    taken = []
    for most in (loader_module.MOST_KEPT_BYTES, 0):
        monkeypatch.setattr(loader_module, "MOST_KEPT_BYTES", most)
        asked.clear()
        loader = loaders(source)
        taken.append([next(loader) for _ in range(20)])
        counts = Counter(asked)
        assert (max(counts[number] for number in range(N) if number != 3) == 1) == bool(most)
        assert counts[3] > 1  # what is broken is named each time
    for kept, decoded in zip(*taken):
        assert torch.equal(kept.images, decoded.images)
        assert torch.equal(kept.labels, decoded.labels)
        assert kept.bad_images == decoded.bad_images


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_broken_images_stops_with_a_message(tmp_path, loaders, num_workers):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    loader = loaders(open_images(tmp_path), num_workers=num_workers)
    with pytest.raises(UserError, match=r"substitutes .*not an image.*--raw_shape") as caught:
        next(loader)
    assert "Traceback" not in str(caught.value)


def test_labels_beyond_num_classes_are_refused(source, loaders):
    assert next(loaders(source, num_classes=2, batch_size=N)).labels.max() == 1
    with pytest.raises(UserError, match=r"num_classes 1: the data has the label 1.*--num_classes 2"):
        next(loaders(source, num_classes=1, batch_size=N))


def test_starting_the_workers_leaves_torchs_random_state_alone(source, loaders):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(loaders(source, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def children():
    pids = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False).stdout.split()
    return {int(pid) for pid in pids} - {os.getpid()}


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_survive_the_signals_of_their_group_and_leave_on_close(source, loaders):
    loader = loaders(source, num_workers=2)
    expected = take(loaders(source), 12)
    before = children()
    seen = take(loader, 2)
    workers = children() - before
    workers = {pid for pid in workers if alive(pid)}
    assert len(workers) == 2
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in workers:
            os.kill(pid, name)
    seen += take(loader, 10)
    assert seen == expected
    loader.close()
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


class HandedOver:
    """An item whose connection breaks while it is handed over, with its worker killed, or without."""

    def __init__(self, is_killed: bool):
        self.is_killed = is_killed

    def __reduce__(self):
        return _break_off, (os.getpid() if self.is_killed else None,)


def _break_off(pid):
    if pid:
        os.kill(pid, signal.SIGKILL)
    raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize(
    ("is_killed", "raised", "said"), [(True, RuntimeError, "DataLoader worker"), (False, ConnectionResetError, "reset")]
)
def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_named(is_killed, raised, said):
    with pytest.raises(raised, match=said):
        list(workers_module.from_workers([HandedOver(is_killed)], num_workers=1))


def hold_workers(folder: str, delay_s: float, has_batch) -> None:
    """In a process: have two workers, the second of which takes longer to start, until it is killed."""
    torch_worker.MP_STATUS_CHECK_INTERVAL = 0.3  # torch's watchdog looks for its parent every 5 s
    init_worker = workers_module._init_worker
    workers_module._init_worker = lambda parent, number: (time.sleep(delay_s * number), init_worker(parent, number))
    loader = build_loader(open_images(folder), img_size=4, batch_size=2, seed=0, num_workers=2)
    next(loader)
    has_batch.set()
    time.sleep(240)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("delay_s", [0, 0.7])  # with a delay one worker is still starting
def test_workers_leave_when_their_parent_is_killed(tmp_path, delay_s):
    image_folder(tmp_path, 4)
    has_batch = SPAWNER.Event()
    parent = SPAWNER.Process(target=hold_workers, args=(str(tmp_path), delay_s, has_batch))
    parent.start()
    assert has_batch.wait(120)
    found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in found.stdout.split()]
    parent.kill()
    parent.join()
    assert len(pids) == 2
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_no_warnings_come_from_a_loader(source, loaders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(loaders(source))
