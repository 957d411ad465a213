"""Of what is found out about the images, one process of a machine holds what all of them use."""

import itertools
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from accelerate import Accelerator
from data_samples import SIZE, image_folder, numbers_in, parquet
from helpers import Group

from jit_accel.base.processes import on_all
from jit_accel.base.shared_tables import shared_arrays
from jit_accel.data import open_images
from jit_accel.data.batches import holdout
from jit_accel.data.batches.holdout import HeldOut, held_by_split, split_holdout
from jit_accel.data.formats import folder, prepared, scan
from jit_accel.data.formats.source import Source
from jit_accel.prepare import main as prepare

N = 60


def listed(root: Path) -> Path:
    """A folder whose labels stand in a file."""
    lines = [f"{path.relative_to(root)},{number % 3}" for number, path in enumerate(sorted(root.glob("*/*.png")))]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    image_folder(root / "folder", N)
    listed(image_folder(root / "listed", N))
    image_folder(root / "splits" / "train", N)
    image_folder(root / "splits" / "test", 7)
    (root / "parquet").mkdir()
    parquet(root / "parquet" / "0.parquet", range(N), row_group_size=13)
    how = ["--data_path", str(root / "listed"), "--output_dir", str(root / "store"), "--img_size", str(SIZE)]
    assert prepare([*how]) == 0
    return root


def opened(path: Path, rank: int = 0, world_size: int = 1) -> tuple[Source, HeldOut]:
    source, part = open_images(path), {"rank": rank, "world_size": world_size, "max_images": 8, "img_size": SIZE}
    if path.name == "splits":
        return source, held_by_split(source, open_images(path, split="test"), **part)
    return split_holdout(source, 0.3, **part)


def content(source: Source) -> dict:
    """All that is trained on, in its order."""
    found = {"fingerprint": source.fingerprint, "names": list(source.class_names), "count": source.num_images}
    if source.streaming:
        return found | {"sizes": source.images.sizes.tolist()}
    out = np.empty((source.num_images, 3, SIZE, SIZE), np.uint8)
    labels, bad = source.images.read(np.arange(source.num_images), out)
    return found | {"labels": labels.tolist(), "bad": bad, "images": numbers_in(out)}


def refuse(*_):
    raise AssertionError("this is the first process's work")


def _open_all(flags: list[str]) -> int:
    root, out = map(Path, flags)
    tempfile.tempdir = str(out)
    accelerator = Accelerator()
    rank, count = accelerator.process_index, accelerator.num_processes
    if rank:
        scan.scan_folder = folder.scan_folder = folder.hash_strings = folder.known_scan = refuse
        holdout._keys_by_unit = prepared.PixelStore._read_parts = refuse
    found = {}
    for path in sorted(root.iterdir()):
        before = pa.total_allocated_bytes()
        source, held = on_all(accelerator, lambda path=path: opened(path, rank, count), in_turn=True)
        assert path.name == "parquet" or pa.total_allocated_bytes() - before < 4096
        found[path.name] = content(source), held.keys.tolist(), held.labels.tolist()
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    return 0


@pytest.mark.multiprocess
def test_the_first_process_looks_and_all_find_what_one_alone_finds(data, tmp_path):
    """The others map it, and no file of it has a name afterwards."""
    group = Group([str(data), str(tmp_path)], tmp_path / "log", 3, {"TEST_MAIN": "test_shared:_open_all"})
    assert group.wait() == [0] * 3, group.output()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", *(f"rank{n}.json" for n in range(3))]
    of_each = [json.loads((tmp_path / f"rank{n}.json").read_text()) for n in range(3)]
    for path in sorted(data.iterdir()):
        source, held = opened(path)
        everything, keys, labels = zip(*(found[path.name] for found in of_each))
        assert all(one == json.loads(json.dumps(content(source))) for one in everything), path
        assert len(held.keys) > 3
        found = sorted(zip(itertools.chain(*keys), itertools.chain(*labels)))
        assert found == sorted(zip(held.keys.tolist(), held.labels.tolist()))


def _share_where_there_is_no_room(flags: list[str]) -> int:
    tempfile.tempdir = flags[0]
    if os.environ["RANK"] == "0" and "cut" in flags:
        pa.ipc.new_file = lambda *_: refuse_room()
    made = []
    found = on_all(
        Accelerator(), lambda: shared_arrays("x", lambda: made.append(1) or {"x": np.arange(5)}), in_turn=True
    )
    assert found["x"].tolist() == [0, 1, 2, 3, 4]
    assert made == [1]
    return 0


def refuse_room():
    raise OSError(28, "No space left on device")


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", [["/nowhere"], ["{}", "cut"]], ids=["no folder", "no room"])
def test_where_nothing_can_be_shared_each_process_looks(tmp_path, how):
    flags = [flag.format(tmp_path) for flag in how]
    environment = {"TEST_MAIN": "test_shared:_share_where_there_is_no_room"}
    group = Group(flags, tmp_path / "log", 2, environment)
    assert group.wait() == [0] * 2, group.output()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
