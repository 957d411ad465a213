"""Local tar files: as many images as samples, whatever some samples lack, and never a part of a file."""

import json

import numpy as np
import pytest
from data_samples import numbers_in, png, refusal, tar

from jit_accel.data import build_loader, open_images


@pytest.fixture(autouse=True)
def caches(hf_cache, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))


def samples(numbers, ending="png"):
    """The members of samples that are labelled by the parity of their numbers."""
    return {f"{n:04d}.{key}": data for n in numbers for key, data in ((ending, png(n)), ("cls", str(n % 2).encode()))}


def epoch(source):
    """(numbers and labels of the readable images, reasons of the bad ones) over one epoch."""
    loader = build_loader(source, img_size=4, batch_size=1, seed=0, horizontal_flip=False)
    seen, bad = [], []
    for _ in range(source.num_images):
        batch = next(loader)
        bad += batch.bad_images
        if not batch.bad_images:
            seen.append((numbers_in(batch.images)[0], batch.labels.item()))
    return sorted(seen), bad


def without(members, *names):
    return {name: data for name, data in members.items() if name not in names}


ODD_TARS = {
    "no picture": without(samples(range(12)), "0008.png"),
    "no picture at first": without(samples(range(12)), "0000.png", "0003.png"),
    "another ending": samples(range(8)) | samples([8], "jpg") | samples(range(9, 12)),
    "another case": samples(range(4)) | samples(range(4, 6), "PNG"),
    "other files": samples(range(3))
    | {"README.md": b"", "no_ending": b"", ".0.png": b"", "__x.png": b"", "a/.b/0": b""},
    "a stem twice": samples([0]) | {"0001.png": png(1), "0001.cls": b"1"} | {"x/0001.png": png(2), "x/0001.cls": b"0"},
    "stems of dots": {"a.0.png": png(0), "b.1.png": png(1), "b.0.png": png(2), "dir.x/c.0.png": png(3)},
    "an unknown ending": samples(range(3)) | {"0002.whatever": b"1", "0002.": b"2"},
}


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("name", ODD_TARS)
def test_there_are_as_many_images_as_rows(tmp_path, name, streaming):
    tar(tmp_path / "a.tar", ODD_TARS[name])
    tar(tmp_path / "b.tar", samples(range(20, 23)) if "0000.cls" in ODD_TARS[name] else {"9.0.png": png(9)})
    column = "0.png" if name == "stems of dots" else None
    source = open_images(tmp_path, image_column=column, streaming=streaming)
    if streaming is None:
        rows = [list(source.images.rows(unit)) for unit in range(2)]
        assert source.images.sizes.tolist() == [len(some) for some in rows]
        rows = [row for some in rows for row in some]
    else:
        rows = list(source.images.dataset)
    assert source.num_images == len(rows)
    seen, bad = epoch(source)
    image = source.images.columns.image
    assert len(bad) == sum(row[image] is None for row in rows)
    assert len(seen) == len(rows) - len(bad)


def test_a_sample_without_its_picture_is_one_bad_image_and_the_others_come(tmp_path, caplog):
    source = open_images(tar(tmp_path / "a.tar", ODD_TARS["no picture"]))
    assert source.images.sizes.tolist() == [12]
    seen, bad = epoch(source)
    assert seen == [(n, n % 2) for n in range(12) if n != 8]
    assert len(bad) == 1
    assert bad[0].endswith(": empty")
    assert "1 of 12 samples have no image" in caplog.text
    assert "0008" in caplog.text


@pytest.mark.parametrize("name", ["another ending", "another case"])
def test_images_of_several_endings_all_come(tmp_path, name, caplog):
    source = open_images(tar(tmp_path / "a.tar", ODD_TARS[name]))
    assert epoch(source) == ([(n, n % 2) for n in range(source.num_images)], [])
    assert not caplog.text


def test_a_mask_does_not_stand_for_its_photo(tmp_path):
    members = {f"{n}.{key}": png(n + plus) for n in range(4) for key, plus in (("jpg", 0), ("seg.png", 100))}
    source = open_images(tar(tmp_path / "a.tar", without(members, "2.jpg")))
    seen, bad = epoch(source)
    assert ([n for n, _ in seen], len(bad)) == ([0, 1, 3], 1)
    members = {f"{n}.{key}": png(n + plus) for n in range(4) for key, plus in (("jpg", 0), ("png", 100))}
    source = open_images(tar(tmp_path / "b.tar", without(members, "2.jpg")), image_column="jpg")
    seen, bad = epoch(source)
    assert ([n for n, _ in seen], len(bad)) == ([0, 1, 3], 1)


def test_members_that_nobody_reads_may_be_broken(tmp_path):
    members = samples(range(4)) | {"0003.json": b"{", "0003.txt": b"\xff", "0003.npy": b"?"}
    source = open_images(tar(tmp_path / "a.tar", members))
    assert epoch(source) == ([(n, n % 2) for n in range(4)], [])


def test_labels_in_json_that_are_no_whole_numbers_are_names(tmp_path):
    members = {}
    for n, label in enumerate([1.0, 2.0, "x", 1.0]):
        members |= {f"{n}.png": png(n), f"{n}.json": json.dumps({"label": label}).encode()}
    source = open_images(tar(tmp_path / "a.tar", members))
    assert source.class_names == ("1.0", "2.0", "x")
    assert epoch(source) == ([(0, 0), (1, 1), (2, 2), (3, 0)], [])


@pytest.mark.parametrize("ending", ["JPG", "PNG", "Jpeg", "jpg"])
@pytest.mark.parametrize("named", [False, True])
def test_endings_may_be_of_any_case(tmp_path, ending, named):
    members = {name.replace(".cls", ".CLS"): data for name, data in samples(range(6), ending).items()}
    flags = {"image_column": ending.lower(), "label_column": "cls"} if named else {}
    source = open_images(tar(tmp_path / "a.tar", members), **flags)
    assert (source.images.columns.image, source.images.columns.label) == (ending, "CLS")
    assert epoch(source) == ([(n, n % 2) for n in range(6)], [])


def test_json_files_may_differ_but_for_the_label(tmp_path):
    members = {}
    for n, more in enumerate([{"a": 1}, {"b": [2]}, {"a": {"c": None}}, {}]):
        members |= {f"{n}.png": png(n), f"{n}.JSON": json.dumps({"label": "ab"[n % 2], **more}).encode()}
    assert epoch(open_images(tar(tmp_path / "a.tar", members)))[0] == [(n, n % 2) for n in range(4)]


def test_pictures_without_labels_are_refused_but_not_labels_without_pictures(tmp_path):
    assert "no label" in refusal(tar(tmp_path / "a.tar", without(samples(range(9)), "0007.cls")))
    assert open_images(tar(tmp_path / "b.tar", without(samples(range(9)), "0007.cls", "0007.png"))).num_images == 8


@pytest.mark.parametrize("second", ["0001.png", "0001.__key__"])
def test_two_members_of_one_name_are_refused(tmp_path, second):
    members = list(samples(range(3)).items())
    members.insert(3, (second, png(1)))

    class Twice(dict):
        def items(self):
            return members

    message = refusal(tar(tmp_path / "a.tar", Twice()))
    assert str(tmp_path / "a.tar") in message
    assert second in message


def blocks_after(members):
    """The bytes up to the end of each member of a tar file."""
    return np.cumsum([512 + -(-len(data) // 512) * 512 for data in members.values()])


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("more", [0, 100, 511])
def test_a_tar_file_cut_between_members_is_refused(tmp_path, more, streaming):
    members = samples(range(30))
    whole, cut = tar(tmp_path / "a.tar", members), tmp_path / "b.tar"
    end = blocks_after(members)[31]
    cut.write_bytes(whole.read_bytes()[: end + more])
    message = refusal(str(tmp_path / "*.tar"), streaming=streaming)
    assert f"data_path {cut}" in message
    assert "cut short" in message
    assert "restore" in message


def test_a_damaged_header_does_not_end_a_tar_file(tmp_path):
    members = samples(range(30))
    file = tar(tmp_path / "a.tar", members)
    data, place = bytearray(file.read_bytes()), blocks_after(members)[31]
    data[place : place + 512] = b"\7" * 512
    file.write_bytes(data)
    assert "damaged" in refusal(file)


def test_one_closing_block_is_enough(tmp_path):
    members = samples(range(3))
    file = tar(tmp_path / "a.tar", members)
    file.write_bytes(file.read_bytes()[: blocks_after(members)[-1] + 512])
    assert open_images(file).num_images == 3


def test_json_labels_that_are_partly_numbers_are_text(tmp_path):
    members = {}
    for n, label in enumerate(["b", 7, "a", 7]):
        members |= {f"{n}.png": png(n), f"{n}.json": json.dumps({"label": label}).encode()}
    source = open_images(tar(tmp_path / "a.tar", members))
    assert source.class_names == ("7", "a", "b")
    assert epoch(source)[0] == [(0, 2), (1, 0), (2, 1), (3, 0)]


def test_members_that_are_no_images_are_refused_as_such(tmp_path):
    assert "image_column cls: the members .cls" in refusal(tar(tmp_path / "a.tar", samples([0])), image_column="cls")
