"""Opening the data: what only some processes meet is told by all, and all train on one and the same split."""

import errno
import os
import shutil
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import SIZE, image_folder, parquet, png, tar
from helpers import Group, rows, train_here
from http_server import FailingServer

from jit_accel.data import open_images
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.reading import content
from jit_accel.data.reading import images as reading
from jit_accel.data.reading.content import UNREADABLE, content_key, key_of

N = 12
HOLDOUT = ("--holdout", "0.3")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache") / "jit_accel"
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(folder))
    return folder


def settled(root):
    """Make all files look as if they had been there for a while."""
    for file in root.rglob("*"):
        os.utime(file, (1e9, 1e9))
    return root


def split(source, share=0.3):
    return split_holdout(source, share, max_images=N, img_size=SIZE)


# What one process meets


def on_process(rank):
    return os.environ.get("RANK") == rank


def hide_data():
    """Process 1 finds nothing at the path."""
    from jit_accel.train import feed as startup

    opened = startup.open_images
    if on_process("1"):
        startup.open_images = lambda path, **how: opened(f"{path}_elsewhere", **how)


def fail_unexpectedly():
    from jit_accel.train import feed as startup

    def fail(*args, **how):
        raise RuntimeError("a bug")

    if on_process("1"):
        startup.split_holdout = fail


def lose_a_file():
    """Process 1, on another machine, cannot read the files that are held out, and would train on them."""
    from jit_accel.data.reading import content

    os.environ["JIT_ACCEL_CACHE"] += os.environ["RANK"]
    if on_process("1"):
        content.patient_file_key = lambda path: UNREADABLE
        socket.gethostname = lambda: "elsewhere"


def read_no_keys():
    """Process 1 has to find them in the cache."""
    from jit_accel.data.reading import content

    def fail(path):
        raise RuntimeError(f"{path} was read")

    if on_process("1"):
        content.patient_file_key = fail


def two_processes(tmp_path, setup, *flags):
    group = Group(
        ("--output_dir", str(tmp_path / "run"), *flags),
        tmp_path / "log.txt",
        num_processes=2,
        environment={"TEST_SETUP": f"test_opening:{setup}", "JIT_ACCEL_CACHE": os.environ["JIT_ACCEL_CACHE"]},
    )
    return group.wait(60), group.output()


@pytest.mark.multiprocess
def test_a_path_that_one_process_lacks_is_an_error_of_all(tmp_path, images):
    codes, output = two_processes(tmp_path, "hide_data", "--data_path", str(images))
    assert codes == [2, 2]
    assert output.count("error") == output.count("error: process 1: --data_path ") == 1, output
    assert "_elsewhere: no such file or folder" in output


@pytest.mark.multiprocess
def test_an_error_of_the_program_ends_all_processes_and_shows_where(tmp_path, images):
    codes, output = two_processes(tmp_path, "fail_unexpectedly", "--data_path", str(images), *HOLDOUT)
    assert codes == [2, 1]
    assert "error: process 1: RuntimeError: a bug" in output
    assert "Traceback" in output


@pytest.mark.multiprocess
def test_processes_that_split_the_data_differently_are_refused(tmp_path, images):
    codes, output = two_processes(tmp_path, "lose_a_file", "--data_path", str(images), *HOLDOUT)
    assert codes == [2, 2]
    assert output.count("error: --holdout 0.3: the processes") == 1, output
    assert "process 0 trains on" in output


@pytest.mark.multiprocess
def test_one_process_reads_the_keys_for_all_on_its_machine(tmp_path, images):
    data = settled(shutil.copytree(images, tmp_path / "data"))
    codes, output = two_processes(tmp_path, "read_no_keys", "--data_path", str(data), "--dry_run", *HOLDOUT)
    assert codes == [0, 0], output


# The keys


def failing_open(monkeypatch, number, times):
    """Let opening a file fail for the first `times`; returns the list of attempts."""
    attempts = []

    def open_sometimes(*args):
        attempts.append(args)
        if len(attempts) <= times:
            raise OSError(number, os.strerror(number))
        return open(*args)

    monkeypatch.setattr(content, "open", open_sometimes, raising=False)
    monkeypatch.setattr(content, "_PAUSES_S", (0, 0, 0), raising=False)
    return attempts


def test_a_failure_that_passes_changes_no_key(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(png(0))
    failing_open(monkeypatch, errno.EIO, times=3)
    assert key_of(str(tmp_path / "0.png")) == content_key(png(0))


@pytest.mark.parametrize(("number", "count"), [(errno.ENOENT, 1), (errno.EACCES, 1), (errno.EIO, 4)])
def test_what_stays_unreadable_has_the_largest_key(tmp_path, monkeypatch, number, count):
    (tmp_path / "0.png").write_bytes(png(0))
    attempts = failing_open(monkeypatch, number, times=9)
    assert key_of(str(tmp_path / "0.png")) == UNREADABLE
    assert len(attempts) == count


def test_a_checkpoint_of_another_split_is_refused(tmp_path, images, capsys):
    """Files that change their content, not their names and sizes: only the split tells."""
    data = shutil.copytree(images, tmp_path / "data")
    flags = ("--data_path", str(data), "--output_dir", str(tmp_path / "run"), *HOLDOUT)
    assert train_here(*flags, "--max_steps", "1", "--warmup_steps", "0") == 0
    assert train_here(*flags, "--resume", "auto", "--max_steps", "2", "--warmup_steps", "0") == 0
    for file in data.rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"\0")  # Pillow ignores what follows the image
    assert train_here(*flags, "--resume", "auto") == 2
    assert "belongs to another run: --data_path is" in capsys.readouterr().err


def test_the_fingerprint_tells_what_is_held_out(tmp_path):
    source = open_images(image_folder(tmp_path, N))
    fingerprints = {split(source, share)[0].fingerprint for share in (0.3, 0.3, 0.6)}
    assert len(fingerprints | {source.fingerprint}) == 3


# The keys are kept


@pytest.fixture
def keyed(monkeypatch):
    """What a key was computed of."""
    seen = []
    for module, name in ((content, "patient_file_key"), (reading, "key_of")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda value, of=original: (seen.append(value), of(value))[1])
    return seen


def folder(root):
    return image_folder(root, N)


def parquets(root):
    for shard in range(2):
        parquet(root / f"{shard}.parquet", range(shard * N // 2, (shard + 1) * N // 2), row_group_size=4)
    return root


def tars(root):
    for shard in range(2):
        tar(root / f"{shard}.tar", {f"{n}.png": png(n) for n in range(shard * N // 2, (shard + 1) * N // 2)})
    return root


@pytest.mark.parametrize("make", [folder, parquets, tars])
def test_keys_are_read_once(tmp_path, keyed, make):
    data = settled(make(tmp_path / "data"))
    first, held_out = split(open_images(data))
    assert len(keyed) == N
    keyed.clear()
    again, held_again = split(open_images(data))
    assert keyed == []
    assert (again.fingerprint, again.num_images) == (first.fingerprint, first.num_images)
    assert held_again.keys.tolist() == held_out.keys.tolist()


def test_only_new_and_changed_files_are_read_again(tmp_path, keyed):
    data = settled(folder(tmp_path / "data"))
    before = open_images(data).images.keys()
    keyed.clear()
    (data / "c0" / "0001.png").write_bytes(png(100) + b"longer")
    (data / "c1" / "new.png").write_bytes(png(101))
    for _ in range(2):  # files that were changed just now may be changed again with the same mtime
        keys = open_images(data).images.keys()
        assert sorted(os.path.basename(path) for path in keyed) == ["0001.png", "new.png"]
        assert keys.tolist() == [
            before[0], content_key(png(100) + b"longer"), *before[2:], content_key(png(101)),
        ]  # fmt: skip
        keyed.clear()


def test_a_damaged_cache_is_not_believed(tmp_path, cache):
    data = settled(folder(tmp_path / "data"))
    keys = open_images(data).images.keys()
    (file,) = cache.glob("values-*")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert np.array_equal(open_images(data).images.keys(), keys)


def test_what_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    data = settled(folder(tmp_path / "data"))
    monkeypatch.setattr(content, "patient_file_key", lambda path: UNREADABLE)
    assert set(open_images(data).images.keys().tolist()) == {UNREADABLE}
    monkeypatch.undo()
    assert open_images(data).images.keys().tolist() == [content_key(png(n)) for n in range(N)]


def test_keys_of_files_that_a_table_names_follow_the_files(tmp_path):
    pictures = [str(file) for file in sorted(folder(tmp_path / "pictures").rglob("*.png"))]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "table.parquet")
    settled(tmp_path)
    kept = []
    for _ in range(2):
        kept.append(split(open_images(tmp_path / "table.parquet"))[0].images.sizes.sum())
        for picture in pictures:
            shutil.copy(pictures[0], picture + "_")
            os.replace(picture + "_", picture)
    assert 0 < kept[0] < N
    assert kept[1] == N


def test_remote_files_are_read_once_after_a_warning(tmp_path, keyed, caplog):
    server = FailingServer(parquets(tmp_path))
    address = f"{server.url}/{{0,1}}.parquet"
    first, _ = split(open_images(address))
    assert "reading all of" in caplog.text
    assert len(keyed) == N
    keyed.clear()
    caplog.clear()
    again, _ = split(open_images(address))
    assert keyed == []
    assert caplog.text == ""
    assert again.fingerprint == first.fingerprint
    assert again.images.sizes.tolist() == first.images.sizes.tolist()


def test_keys_of_two_columns_are_kept_apart(tmp_path):
    table = pa.table({name: [png(n + first) for n in range(N)] for name, first in (("image", 0), ("other", N))})
    pq.write_table(table, tmp_path / "0.parquet")
    address = f"{FailingServer(settled(tmp_path)).url}/0.parquet"
    for path in (address, tmp_path / "0.parquet"):
        kept = [split(open_images(path, image_column=name), 0.5)[0].fingerprint for name in ("image", "other")]
        assert kept[0] != kept[1]


@pytest.mark.parametrize("make", [folder, parquets])
def test_reading_many_keys_is_announced(tmp_path, caplog, monkeypatch, make):
    data = settled(make(tmp_path / "data"))
    monkeypatch.setattr(content, "MANY_KEYS", N - 1)
    split(open_images(data))
    assert caplog.text.count(f"reading the content keys of {N} images for --holdout") == 1
    split(open_images(data))
    assert caplog.text.count("reading the content keys") == 1


# No image to measure with


def test_without_a_readable_held_out_image_there_is_no_validation(tmp_path, capsys):
    data = image_folder(tmp_path / "data", 40)
    for file in data.rglob("*.png"):
        if content_key(file.read_bytes()) < 0.3 * 2**64:
            cut = file.read_bytes()[:30]
            file.write_bytes(next(cut + bytes([n]) for n in range(99) if content_key(cut + bytes([n])) < 0.3 * 2**64))
    flags = ("--data_path", str(data), "--output_dir", str(tmp_path / "run"), "--max_steps", "1")
    assert train_here(*flags, "--warmup_steps", "0", *HOLDOUT) == 0
    assert "no image of the holdout can be read" in capsys.readouterr().err
    assert all("val/loss" not in row for row in rows(tmp_path / "run"))
