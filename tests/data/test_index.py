"""The index of a folder is what a walk finds, without the walk, and never after anything has changed."""

import inspect
import os
import shutil
import sys
import time

import pyarrow as pa
import pytest
from data_samples import image_folder, parquet, png, tar
from datasets import Value

from jit_accel.data import open_images
from jit_accel.data.formats import scan, tables, tars
from jit_accel.data.formats.folder import hash_strings, is_known_image_folder
from jit_accel.data.formats.scan import walk_folder
from jit_accel.data.reading.cache import cache_folder
from jit_accel.data.reading.shards import LocalShard, remembered


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache") / "jit_accel"
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(folder))
    return folder


def age(root, seconds=10):
    """Make everything under `root` older, as if it had been copied there a while ago."""
    then = time.time() - seconds
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            os.utime(path, (then, then), follow_symlinks=False)


@pytest.fixture
def images(tmp_path):
    """A settled folder with two class folders."""
    age(image_folder(tmp_path / "images", 6))
    return tmp_path / "images"


@pytest.fixture
def walks(monkeypatch):
    """The folders that were walked."""
    walked = []
    monkeypatch.setattr(scan, "walk_folder", lambda root: walked.append(root) or walk_folder(root))
    return walked


def everything(source):
    table = source.images.dataset.to_dict()
    return source.num_images, source.class_names, source.fingerprint, source.is_labelled, table


# The walk


def test_images_come_in_the_order_of_their_whole_paths(tmp_path):
    names = ["a.png", "a/b.png", "a/b/c.png", "a/b.c/d.png", "a-b/c.png", "a0.png", "é/猫.png", "Z.png", "a/B.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    assert walk_folder(tmp_path).images.to_pylist() == sorted(names)


def test_paths_are_the_same_in_whatever_chunks_they_come(images, monkeypatch):
    whole = everything(open_images(images))
    monkeypatch.setattr(scan, "_PATHS_PER_CHUNK", 2)
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(images / ".cache"))
    assert open_images(images).images.dataset.data.column(0).num_chunks > 1
    assert everything(open_images(images)) == whole


def test_a_folder_deeper_than_pythons_stack_is_walked(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(png(0))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        images = walk_folder(tmp_path).images
    finally:
        sys.setrecursionlimit(limit)
    assert images.to_pylist() == ["d/" * 200 + "a.png"]


# The index


def test_a_known_folder_is_opened_as_the_walk_found_it_without_a_walk(images, walks):
    (images / "notes.txt").touch()
    (images / "dead.png").symlink_to("nowhere")
    age(images)
    first = everything(open_images(images))
    walked = walk_folder(images)
    assert len(walks) == 1
    assert everything(open_images(images)) == first
    assert len(walks) == 1
    known = scan.known_scan(str(images))
    assert known.images.equals(walked.images)
    assert vars(known) | {"images": None} == vars(walked) | {"images": None}


def test_the_index_belongs_to_the_place_and_not_to_its_name(images, walks, tmp_path, monkeypatch):
    open_images(images)
    (tmp_path / "link").symlink_to(images)
    monkeypatch.chdir(images)
    assert open_images(tmp_path / "link").num_images == open_images(".").num_images == 6
    assert len(walks) == 1
    shutil.copytree(images, tmp_path / "copy")
    (tmp_path / "copy" / "c0" / "new.png").write_bytes(png(9))
    assert open_images(tmp_path / "copy").num_images == 7


def add(images):
    (images / "c0" / "new.png").write_bytes(png(9))


def remove(images):
    (images / "c1" / "0005.png").unlink()


def rename(images):
    (images / "c1" / "0005.png").rename(images / "c1" / "0004b.png")


def add_folder(images):
    image_folder(images / "c2" / "deep", 1)


def remove_folder(images):
    shutil.rmtree(images / "c1")


def add_in_a_linked_folder(images):
    (images.parent / "elsewhere" / "new.png").write_bytes(png(9))


def turn_a_link(images):
    (images / "c2").unlink()
    (images / "c2").symlink_to(images / "c0")


def mend_a_link(images):
    (images.parent / "missing.png").write_bytes(png(9))


CHANGES = [add, remove, rename, add_folder, remove_folder, add_in_a_linked_folder, turn_a_link, mend_a_link]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(images, change):
    image_folder(images.parent / "elsewhere", 0).mkdir()
    (images.parent / "elsewhere" / "a.png").write_bytes(png(1))
    (images / "c2").symlink_to(images.parent / "elsewhere")
    (images / "c0" / "dead.png").symlink_to(images.parent / "missing.png")
    age(images)
    age(images.parent / "elsewhere")
    before = everything(open_images(images))
    assert scan.known_scan(str(images)) is not None
    if change is add_folder:
        (images / "c2").unlink()
    change(images)
    walked = walk_folder(images).images
    assert scan.known_scan(str(images)) is None
    assert scan.scan_folder(str(images)).images.equals(walked)
    assert everything(open_images(images)) != before


def test_changes_of_other_things_are_not_mistaken_for_changes(images, walks):
    open_images(images)
    (images / "c0" / "0000.png").write_bytes(png(99))  # another picture under the old name
    assert open_images(images).num_images == 6
    assert len(walks) == 1


@pytest.mark.parametrize("seconds", [0, -3600])
def test_a_folder_that_is_being_changed_is_not_trusted(tmp_path, walks, seconds):
    """Within the same tick of the clock, a second change would leave the mtime as it is."""
    age(image_folder(tmp_path, 2), seconds)
    for _ in range(2):
        assert open_images(tmp_path).num_images == 2
    assert len(walks) == 2


def test_a_file_system_without_mtimes_is_not_trusted(images, walks):
    os.utime(images / "c0", (0, 0))
    for _ in range(2):
        open_images(images)
    assert len(walks) == 2


def damage(file, kind):
    data = file.read_bytes()
    middle = data.rindex(b"0005.png")
    damaged = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "text": b"no Arrow file " * 99,
        "another path": data[:middle] + b"0007.png" + data[middle + 8 :],
        "not UTF-8": data[:middle] + b"\xff" + data[middle + 1 :],
    }
    file.write_bytes(damaged[kind])


@pytest.mark.parametrize("kind", ["empty", "half", "text", "another path", "not UTF-8"])
def test_a_damaged_index_is_made_anew(images, cache, walks, kind):
    first = everything(open_images(images))
    (file,) = cache.iterdir()
    assert scan.known_scan(str(images)) is not None
    damage(file, kind)
    assert everything(open_images(images)) == first
    assert everything(open_images(images)) == first
    assert len(walks) == 2


def test_no_flipped_bit_of_an_index_goes_unnoticed(images, cache):
    open_images(images)
    (file,) = cache.iterdir()
    data, walked = file.read_bytes(), walk_folder(images)
    assert scan.known_scan(str(images)).images.equals(walked.images)
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert scan.known_scan(str(images)) is None


def test_a_place_that_cannot_be_written_to_does_no_harm(images, walks, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert open_images(images).num_images == 6
    assert len(walks) == 2


def test_nothing_half_written_stays(images, cache, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert open_images(images).num_images == 6
    assert list(cache.iterdir()) == []


def test_the_caches_place_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder().name == "jit_accel"
    monkeypatch.delenv("JIT_ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jit_accel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "jit_accel"


def test_a_known_folder_is_recognised_by_its_index_unless_it_holds_other_formats(images):
    assert not is_known_image_folder(str(images))
    open_images(images)
    assert is_known_image_folder(str(images))
    parquet(images / "a.parquet", range(2))
    age(images)
    assert open_images(images, data_format="folder").num_images == 6
    assert not is_known_image_folder(str(images))
    assert open_images(images).format == "parquet"


def test_hashes_do_not_depend_on_the_chunks():
    names = [f"{n}.png" for n in range(10)]
    whole = pa.chunked_array([names])
    parts = pa.chunked_array([names[:3], [], names[3:]])
    sliced = pa.chunked_array([["x", *names]]).slice(1)
    assert hash_strings(whole) == hash_strings(parts) == hash_strings(sliced)
    assert hash_strings(whole) != hash_strings(pa.chunked_array([names[:-1]]))
    assert hash_strings(whole) != hash_strings(whole, ["folder"])
    two, one = pa.chunked_array([["a", "b"]]), pa.chunked_array([["ab"]])
    assert hash_strings(two) != hash_strings(one)


# Files of many images


def make_tars(root):
    for shard, labels in enumerate([(0, 3), (1, 1)]):
        members = [(f"{n}.png", png(n), f"{n}.cls", b"%d" % label) for n, label in enumerate(labels)]
        tar(root / f"{shard}.tar", {name: data for a, b, c, d in members for name, data in ((a, b), (c, d))})
    age(root)


def make_tables(root):
    for shard, labels in enumerate([("owl", "ant"), ("bee", "bee")]):
        parquet(root / f"{shard}.parquet", range(2), labels, feature=Value("string"))
    age(root)


@pytest.mark.parametrize(
    ("make", "module", "look"), [(make_tars, tars, "_scan_one"), (make_tables, tables, "_read_columns")]
)
def test_of_files_only_new_and_changed_ones_are_looked_into(tmp_path, monkeypatch, make, module, look):
    looked, real = [], getattr(module, look)
    monkeypatch.setattr(module, look, lambda shard, *args: looked.append(shard.name) or real(shard, *args))
    make(tmp_path)
    first = open_images(tmp_path)
    assert len(looked) == 2
    again = open_images(tmp_path)
    assert len(looked) == 2
    assert (again.class_names, again.max_label, again.num_images) == (
        first.class_names,
        first.max_label,
        first.num_images,
    )
    new, old = sorted(tmp_path.iterdir())
    shutil.copy(new, tmp_path / f"2{new.suffix}")
    os.utime(old, (1, 1))
    source = open_images(tmp_path)
    assert looked[2:] == [old.name, f"2{new.suffix}"]
    assert source.num_images == 6
    open_images(tmp_path)
    assert looked[4:] == [f"2{new.suffix}"]  # so new that it may still change


def size_of(shard):
    return shard.size


def test_what_was_remembered_of_a_file_is_kept_by_what_was_looked_for(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    age(tmp_path)
    assert remembered("size", [LocalShard(str(file))], size_of) == [3]
    assert remembered("size", [LocalShard(str(file))], lambda shard: 99) == [3]
    assert remembered("name", [LocalShard(str(file))], lambda shard: shard.name) == ["a.bin"]


def test_damaged_memories_of_files_are_made_anew(tmp_path, cache):
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    age(tmp_path)
    for damaged in (b"", b"[]", b"{}", b'["1", 3]', b'["1", {"a.bin": 3}]', b"\xff"):
        remembered("size", [LocalShard(str(file))], size_of)
        (memory,) = cache.iterdir()
        memory.write_bytes(damaged)
        assert remembered("size", [LocalShard(str(file))], size_of) == [3]
