"""The holdout: chosen by content alone, never trained on, and its loss the same for any number of processes."""

import math
import shutil

import numpy as np
import pytest
from data_samples import SIZE, image_folder, numbers_in, parquet, png, take, tar
from helpers import rows, train_group, train_here

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.reading.content import content_key, file_key
from jit_accel.train import feed

N = 200


def split(source, share=0.2, **changes):
    return split_holdout(source, share, **{"max_images": N, "img_size": SIZE} | changes)


def held_numbers(held_out):
    return sorted(numbers_in(held_out.images))


def expected(share=0.2, numbers=range(N)):
    return [n for n in numbers if content_key(png(n)) < share * 2**64]


def tars_of(folder):
    for shard in range(4):
        numbers = range(shard * N // 4, (shard + 1) * N // 4)
        tar(folder / f"{shard}.tar", {f"{n:04d}.png": png(n) for n in numbers})
    return folder


def parquets_of(folder):
    for shard in range(2):
        parquet(folder / f"{shard}.parquet", range(shard * N // 2, (shard + 1) * N // 2), row_group_size=30)
    return folder


@pytest.fixture(scope="module", params=["folder", "parquet", "tar", "table"])
def source(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    if request.param == "folder":
        return open_images(image_folder(root, N))
    if request.param == "tar":
        return open_images(tars_of(root))
    if request.param == "table":
        source = open_images(parquets_of(root), streaming=False)
        return source
    return open_images(parquets_of(root))


def test_a_file_and_its_bytes_have_one_key(tmp_path):
    for size in (0, 1, 4095, 4096, 4097, 8192, 100_000):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "x").write_bytes(data)
        assert file_key(tmp_path / "x") == content_key(data) == content_key(memoryview(data))
    keys = [content_key(png(n)) for n in range(N)]
    assert len(set(keys)) == N
    assert 0.4 < np.mean(np.array(keys, np.float64) / 2**64) < 0.6


def test_the_content_decides_in_every_format(source):
    _, held_out = split(source)
    assert held_numbers(held_out) == expected()
    assert 0.1 * N < len(held_out.keys) < 0.3 * N


def test_what_is_held_out_is_never_trained_on_and_the_rest_comes_once_an_epoch(source):
    training, held_out = split(source)
    rest = sorted(set(range(N)) - set(held_numbers(held_out)))
    assert training.num_images == len(rest)
    for world_size in (1, 3):
        ranks = [
            build_loader(training, img_size=SIZE, batch_size=1, seed=3, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        seen = [n for _ in range(2 * len(rest) // world_size + 1) for loader in ranks for n in take(loader, 1)]
        assert sorted(seen[: len(rest)]) == sorted(seen[len(rest) : 2 * len(rest)]) == rest


def test_labels_stay_with_their_images(source):
    _, held_out = split(source)
    if source.format == "folder":
        assert held_out.labels.tolist() == [n * 2 // N for n in numbers_in(held_out.images)]
    elif source.format == "parquet":
        assert held_out.labels.tolist() == [n % 2 for n in numbers_in(held_out.images)]


def test_processes_share_the_images_with_the_smallest_keys(source):
    most = len(expected()) // 2
    parts = [split(source, max_images=most, rank=rank, world_size=3)[1] for rank in range(3)]
    smallest = sorted(expected(), key=lambda n: content_key(png(n)))[:most]
    assert sorted(n for part in parts for n in numbers_in(part.images)) == sorted(smallest)
    for part in parts:
        assert part.keys.tolist() == [content_key(png(n)) >> 1 for n in numbers_in(part.images)]


def test_adding_renaming_and_moving_files_changes_nothing_for_the_others(tmp_path):
    root = image_folder(tmp_path / "one", N)
    before = held_numbers(split(open_images(root))[1])
    moved = tmp_path / "two"
    shutil.copytree(root, moved)
    for n, path in enumerate(sorted(moved.glob("*/*.png"))):
        path.rename(path.with_name(f"{N - n:03d}_renamed.png"))
    for n in range(N, N + 100):
        (moved / "c0" / f"new{n}.png").write_bytes(png(n))
    after = held_numbers(split(open_images(moved), max_images=1000)[1])
    assert [n for n in after if n < N] == before
    assert after == expected(numbers=range(N + 100))


def test_broken_images_are_left_out_of_the_holdout(tmp_path):
    bad = expected()[:3]
    root = image_folder(tmp_path, N)
    for n in bad:
        path = next(root.glob(f"*/{n:04d}.png"))
        path.write_bytes(path.read_bytes()[:40])
    _, held_out = split(open_images(root), share=0.5)
    assert not set(bad) & set(held_numbers(held_out))


def test_a_share_that_leaves_nothing_is_refused_and_one_that_takes_nothing_is_reported(tmp_path, caplog):
    for n in expected(0.5, range(40))[:3]:
        parquet(tmp_path / f"{n}.parquet", [n])
    source = open_images(tmp_path)
    with pytest.raises(UserError, match=r"holdout 0.5: holds out all 3 images .* smaller share"):
        split(source, share=0.5)
    assert split(source, share=1e-9) == (source, None)
    assert "holds out none of the 3 images" in caplog.text


HOLDOUT = ("--holdout", "0.3", "--val_every_steps", "2")
ON_PROCESSES = ("--holdout", "0.3", "--val_every_steps", "3")
FEW_DRAWS = 32  # two or three of each image that is held out


@pytest.fixture
def one_draw(monkeypatch):
    monkeypatch.setattr(feed, "MIN_DRAWS", 1)


def val_losses(folder):
    return {row["step"]: row["val/loss"] for row in rows(folder) if "val/loss" in row}


def test_the_loss_of_the_holdout_is_logged_and_falls(tmp_path, images, capsys, one_draw):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "run"), *HOLDOUT) == 0
    losses = val_losses(tmp_path / "run")
    assert list(losses) == [2, 4, 6]
    assert losses[6] < losses[2]
    assert "val/loss on" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_it_costs_the_training_nothing(tmp_path, images, one_draw):
    """Validation changes neither the weights nor the randomness: the rows are those of a run without."""
    for name, every in (("with", "1"), ("without", "0")):
        flags = ("--data_path", str(images), "--output_dir", str(tmp_path / name), "--holdout", "0.3")
        assert train_here(*flags, "--val_every_steps", every) == 0
    strip = [
        [{k: v for k, v in row.items() if k != "val/loss"} for row in rows(tmp_path / n)] for n in ("with", "without")
    ]
    assert [row["train/loss"] for row in strip[0]] == [row["train/loss"] for row in strip[1]]
    assert list(val_losses(tmp_path / "without")) == [6]


def test_batch_size_and_the_log_interval_do_not_change_it(tmp_path, images, one_draw):
    found = []
    for batch, accumulation, log in (("2", "2", "1"), ("4", "1", "5")):
        output = tmp_path / batch
        flags = ("--data_path", str(images), "--output_dir", str(output), "--batch_size", batch)
        assert (
            train_here(*flags, "--gradient_accumulation_steps", accumulation, "--log_every_steps", log, *HOLDOUT) == 0
        )
        found.append(val_losses(output))
    assert found[0].keys() == found[1].keys()
    assert all(math.isclose(found[0][step], found[1][step], rel_tol=1e-4) for step in found[0])


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "MIN_DRAWS", FEW_DRAWS)
        assert train_here("--data_path", str(images), "--output_dir", str(folder), *ON_PROCESSES) == 0
    return val_losses(folder)


def draw_few() -> None:
    feed.MIN_DRAWS = FEW_DRAWS


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharding", [{}, {"TEST_FSDP2_PRECISION": "no"}], ids=["replicated", "sharded"])
def test_two_processes_measure_the_same_loss_as_one(tmp_path, images, losses_of_one_process, sharding):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path / "two"), "--batch_size", "2", *ON_PROCESSES)
    train_group(tmp_path, *flags, num_processes=2, environment={"TEST_SETUP": "test_holdout:draw_few", **sharding})
    one, other = losses_of_one_process, val_losses(tmp_path / "two")
    assert list(one) == list(other) == [3, 6]
    assert all(math.isclose(one[step], other[step], rel_tol=1e-4) for step in one)


def test_another_holdout_is_another_run(tmp_path, images, capsys):
    flags = ("--data_path", str(images), "--output_dir", str(tmp_path / "run"))
    assert train_here(*flags, "--max_steps", "1", "--warmup_steps", "0", "--holdout", "0.3") == 0
    assert train_here(*flags, "--holdout", "0.2", "--resume", "auto") == 2
    assert "--holdout is 0.2, the checkpoint has 0.3" in capsys.readouterr().err
