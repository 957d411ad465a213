"""Everything `--data_path` may be is opened as what it is, or refused with a message that repairs."""

import json
import os
import shutil
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import as_hub, image_folder, labels_by_number, parquet, png, refusal, tar
from datasets import ClassLabel, Value

from jit_accel.data import open_images

pytestmark = pytest.mark.usefixtures("hf_cache")


# Folders


def test_class_folders_give_their_names_as_classes(tmp_path):
    for number, name in enumerate(["zebra/a.PNG", "ant/deep/er/b.png", "ant/c.jpeg"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(number))
    source = open_images(tmp_path)
    assert source.class_names == ("ant", "zebra")
    assert (source.num_images, source.max_label, source.streaming, source.format) == (3, 1, False, "folder")
    assert labels_by_number(source) == {0: 1, 1: 0, 2: 0}


def test_a_flat_folder_is_one_class_of_its_name(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0.png").write_bytes(png(0))
    source = open_images(str(tmp_path / "cats"))
    assert (source.class_names, source.num_images) == (("cats",), 1)


def test_folders_named_like_splits_are_classes_beside_others(tmp_path):
    for name in ("train", "bus"):  # a picture of a train
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(0))
    assert open_images(tmp_path).class_names == ("bus", "train")


def test_hidden_files_and_other_files_and_empty_folders_are_ignored(tmp_path):
    image_folder(tmp_path, 2)
    for name in (".hidden/x.png", "c0/.x.png", "__MACOSX/x.png", "c0/notes.txt", "void/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(9))
    source = open_images(tmp_path)
    assert (source.class_names, source.num_images) == (("c0", "c1"), 2)


def test_links_are_followed_but_not_in_circles(tmp_path):
    image_folder(tmp_path / "elsewhere", 2, classes=1)
    image_folder(tmp_path / "data", 2)
    (tmp_path / "data" / "c2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c0" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c0" / "self").symlink_to(tmp_path / "data" / "c0" / "self")
    source = open_images(tmp_path / "data")
    assert (source.class_names, source.num_images) == (("c0", "c1", "c2"), 4)


def test_images_beside_class_folders_are_skipped_and_counted(tmp_path, caplog):
    image_folder(tmp_path, 2)
    (tmp_path / "stray.png").write_bytes(png(9))
    assert open_images(tmp_path).num_images == 2
    assert "1 images beside the class folders" in caplog.text


def test_a_file_name_that_is_not_utf8_is_skipped_and_named(tmp_path, caplog):
    image_folder(tmp_path, 2)
    with open(os.fsencode(tmp_path) + b"/c0/\xff.png", "wb") as file:
        file.write(png(9))
    assert open_images(tmp_path).num_images == 2
    assert "not UTF-8" in caplog.text


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    image_folder(tmp_path / "a", 4)
    original = open_images(tmp_path / "a").fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "else" / "where")
    assert open_images(tmp_path / "else" / "where").fingerprint == original
    (tmp_path / "a" / "c1" / "new.png").write_bytes(png(9))
    assert open_images(tmp_path / "a").fingerprint != original


def test_a_folder_whose_mtime_was_set_back_is_walked_again(tmp_path):
    image_folder(tmp_path, 4)
    for folder in (tmp_path, tmp_path / "c0", tmp_path / "c1"):
        os.utime(folder, (1.6e9, 1.6e9))
    assert open_images(tmp_path).num_images == 4
    time.sleep(0.02)  # a tick of the clock
    (tmp_path / "c0" / "new.png").write_bytes(png(9))
    os.utime(tmp_path / "c0", (1.6e9, 1.6e9))
    assert open_images(tmp_path).num_images == 5


# Tables


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("path", ["one.parquet", "shards", "shards/*.parquet", "deep"])
def test_parquet_files_are_read(tmp_path, path, streaming):
    parquet(tmp_path / "one.parquet", range(8))
    for folder in ("shards", "deep/data"):
        for shard in range(2):
            parquet(tmp_path / folder / f"train-{shard}.parquet", range(shard * 4, shard * 4 + 4))
    parquet(tmp_path / "deep/data/test-0.parquet", [99])
    source = open_images(tmp_path / path, streaming=streaming)
    assert (source.num_images, source.class_names, source.format) == (8, ("even", "odd"), "parquet")
    assert source.streaming == (streaming is None)
    assert labels_by_number(source) == {n: n % 2 for n in range(8)}


@pytest.mark.parametrize("streaming", [None, False])
def test_text_labels_are_numbered_in_order(tmp_path, streaming):
    parquet(tmp_path / "a.parquet", range(3), ["owl", "ant", "owl"], feature=Value("string"))
    parquet(tmp_path / "b.parquet", range(3, 5), ["bee", "ant"], feature=Value("string"))
    source = open_images(tmp_path, streaming=streaming)
    assert source.class_names == ("ant", "bee", "owl")
    assert labels_by_number(source) == {0: 2, 1: 0, 2: 2, 3: 1, 4: 0}


def test_number_labels_name_themselves(tmp_path):
    parquet(tmp_path / "a.parquet", range(2), [0, 3], feature=Value("int32"))
    source = open_images(tmp_path)
    assert (source.class_names, source.max_label, source.num_classes) == (("0", "1", "2", "3"), 3, 4)


def test_columns_of_other_names_and_bare_bytes_are_found_or_chosen(tmp_path):
    table = pa.table({"img": [png(0), png(1)], "fine_label": [5, 6], "coarse_label": [1, 2], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert labels_by_number(open_images(tmp_path)) == {0: 5, 1: 6}
    chosen = open_images(tmp_path, image_column="img", label_column="coarse_label")
    assert labels_by_number(chosen) == {0: 1, 1: 2}


@pytest.mark.parametrize("streaming", [None, False])
def test_data_without_labels_is_one_class(tmp_path, streaming):
    pq.write_table(pa.table({"image": [png(0), png(1)]}), tmp_path / "a.parquet")
    source = open_images(tmp_path, streaming=streaming)
    assert (len(source.class_names), source.max_label) == (1, 0)
    assert labels_by_number(source) == {0: 0, 1: 0}


def test_parquet_keeps_its_fingerprint_when_moved(tmp_path):
    file = parquet(tmp_path / "a.parquet", range(4))
    (tmp_path / "b").mkdir()
    shutil.copy(file, tmp_path / "b")
    other = parquet(tmp_path / "c" / "a.parquet", range(5))
    original, moved, different = (open_images(f).fingerprint for f in (file, tmp_path / "b" / "a.parquet", other))
    assert original == moved != different


def test_a_saved_data_set_is_read(tmp_path):
    parquet(tmp_path / "a.parquet", range(6))
    saved = datasets.Dataset(pq.read_table(tmp_path / "a.parquet"))
    saved.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "dict")
    for name in ("plain", "dict"):
        source = open_images(tmp_path / name)
        assert (source.format, source.streaming, source.num_images) == ("saved", False, 6)
        assert source.class_names == ("even", "odd")
        assert labels_by_number(source) == {n: n % 2 for n in range(6)}


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    as_hub(monkeypatch, "parquet", parquet(tmp_path / "a.parquet", range(8)))
    source = open_images("someone/pictures")
    assert (source.format, source.streaming, source.num_images) == ("hub", True, 8)
    assert (source.class_names, source.max_label) == (("even", "odd"), 1)
    assert source.images.sizes.tolist() == [5, 3]
    assert labels_by_number(source) == {n: n % 2 for n in range(8)}
    downloaded = open_images("someone/pictures", streaming=False)
    assert (downloaded.format, downloaded.streaming, downloaded.num_images) == ("hub", False, 8)


def test_tars_of_the_hub_are_streamed(tmp_path, monkeypatch):
    as_hub(monkeypatch, "webdataset", tar(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(3)}))
    source = open_images("someone/pictures")
    assert (source.format, source.streaming, source.num_images) == ("hub", True, 3)


def test_other_files_of_the_hub_are_downloaded_for_random_access(tmp_path, monkeypatch):
    as_hub(monkeypatch, "imagefolder", *sorted(image_folder(tmp_path, 4).rglob("*.png")))
    source = open_images("someone/pictures")
    assert (source.format, source.streaming, source.num_images) == ("hub", False, 4)
    assert "streaming true: someone/pictures" in refusal("someone/pictures", streaming=True)


def test_text_labels_of_the_hub_are_listed(tmp_path, monkeypatch):
    as_hub(monkeypatch, "parquet", parquet(tmp_path / "a.parquet", range(2), ["b", "a"], feature=Value("string")))
    assert open_images("someone/pictures").class_names == ("a", "b")


# WebDataset


@pytest.mark.parametrize("streaming", [None, False])
def test_tars_with_class_files_are_read(tmp_path, streaming):
    for shard in range(2):
        numbers = range(shard * 3, shard * 3 + 3)
        members = {f"{n:04d}.{key}": data for n in numbers for key, data in (("png", png(n)), ("cls", b"%d" % (n % 2)))}
        tar(tmp_path / f"{shard}.tar", members)
    source = open_images(tmp_path, streaming=streaming)
    assert (source.format, source.num_images, source.class_names) == ("webdataset", 6, ("0", "1"))
    assert source.streaming == (streaming is None)
    assert labels_by_number(source) == {n: n % 2 for n in range(6)}


def test_tars_with_json_labels_are_read(tmp_path):
    names = ["owl", "ant", "owl"]
    members = {}
    for n, name in enumerate(names):
        members[f"x/{n}.jpg"] = png(n)
        members[f"x/{n}.json"] = json.dumps({"label": name, "kind": n}).encode()
    file = tar(tmp_path / "a.tar", members)
    assert open_images(file).class_names == ("ant", "owl")
    assert labels_by_number(open_images(file)) == {0: 1, 1: 0, 2: 1}
    assert labels_by_number(open_images(file, label_column="kind")) == {0: 0, 1: 1, 2: 2}


def test_tars_without_labels_are_one_class(tmp_path):
    source = open_images(tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1)}))
    assert (source.max_label, source.num_images) == (0, 2)


# Refusals: (arguments, what the message must contain)


def test_a_missing_path_is_refused_with_the_nearest_name(tmp_path):
    image_folder(tmp_path / "images", 2)
    message = refusal(tmp_path / "imagse")
    assert f"data_path {tmp_path / 'imagse'}" in message
    assert "Did you mean 'images'?" in message
    assert "nor the folder above it" in refusal(tmp_path / "no" / "where")


def test_a_mistyped_relative_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    image_folder(tmp_path / "data" / "train", 2)
    monkeypatch.chdir(tmp_path)
    message = refusal("data/trian")
    assert "Did you mean 'train'?" in message
    assert "--data_format hub" in message


def test_an_unreachable_hub_is_told_from_a_missing_path(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nwith more lines")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    message = refusal("someone/pictures")
    assert "no such file or folder here" in message
    assert "(ConnectionError: Couldn't reach the Hub)" in message


def test_empty_and_imageless_folders_are_refused(tmp_path):
    (tmp_path / "void").mkdir()
    assert "the folder is empty" in refusal(tmp_path / "void")
    (tmp_path / "void" / "a.txt").touch()
    (tmp_path / "void" / "b.txt").touch()
    message = refusal(tmp_path / "void")
    assert "2 x .txt" in message
    assert ".webp" in message


def test_an_unknown_format_is_answered_with_the_choices(tmp_path):
    message = refusal(tmp_path, data_format="parket")
    assert "data_format parket" in message
    assert "Did you mean 'parquet'?" in message


def test_an_unknown_file_is_refused(tmp_path):
    (tmp_path / "a.zip").touch()
    assert "ending in .zip" in refusal(tmp_path / "a.zip")


def test_an_unknown_builtin_is_answered_with_the_choices():
    message = refusal("builtin:fashion")
    assert "choose from builtin:fashion_mnist" in message


@pytest.mark.parametrize("flag", ["image_column", "label_column"])
def test_a_wrong_column_is_answered_with_the_nearest(tmp_path, flag):
    parquet(tmp_path / "a.parquet", range(2))
    message = refusal(tmp_path, **{flag: "lable"})
    assert f"{flag} lable" in message
    assert "image, label" in message
    assert "Did you mean 'label'?" in message


def test_a_table_without_an_image_column_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1], "label": [0]}), tmp_path / "a.parquet")
    message = refusal(tmp_path)
    assert "(x, label)" in message
    assert "image_column" in message
    assert "image_column x: it holds values like 1" in refusal(tmp_path, image_column="x")


@pytest.mark.parametrize("streaming", [None, False])
def test_a_table_of_paths_is_refused(tmp_path, streaming):
    feature = datasets.Features({"image": datasets.Image()})
    table = pa.table({"image": [{"bytes": None, "path": "/gone/0.png"}]}).cast(feature.arrow_schema)
    pq.write_table(table, tmp_path / "a.parquet")
    message = refusal(tmp_path, streaming=streaming)
    assert "only paths" in message
    assert "/gone/0.png" in message


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([0, -1], Value("int64"), "label -1"),
        ([0, None], Value("int64"), "no label"),
        ([0, 5_000_000], Value("int64"), "looks like an id"),
        ([-1, 0], ClassLabel(names=["a"]), "label -1"),
        ([0.5, 0.1], Value("float64"), "its type is"),
    ],
)
def test_impossible_labels_are_refused(tmp_path, labels, feature, expected):
    parquet(tmp_path / "a.parquet", range(2), labels, feature=feature)
    message = refusal(tmp_path, label_column="label")
    assert "label_column label" in message
    assert expected in message


def test_files_that_are_not_what_they_seem_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    assert "not a readable Parquet file" in refusal(tmp_path / "a.parquet")
    assert "not a readable tar file" in refusal(tmp_path / "a.tar")


def test_tables_of_different_columns_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", range(2))
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / "b.parquet")
    assert "b.parquet: its columns (image) differ" in refusal(tmp_path)


def test_an_empty_table_is_refused(tmp_path):
    parquet(tmp_path / "a.parquet", [])
    assert "no rows" in refusal(tmp_path)


def test_a_pattern_without_files_is_refused(tmp_path):
    assert "matches no file" in refusal(tmp_path / "*.parquet")


def test_tars_of_text_classes_or_without_images_are_refused(tmp_path):
    classes = tar(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"owl"})
    assert "'owl'" in refusal(classes)
    texts = tar(tmp_path / "b.tar", {"0.txt": b"hello"})
    assert ".txt" in refusal(texts)
    assert "label_column kind" in refusal(classes, label_column="kind")


@pytest.mark.parametrize("flags", [{"streaming": True}, {"image_column": "x"}, {"label_column": "x"}])
def test_flags_that_make_no_sense_for_a_folder_are_refused(tmp_path, flags):
    image_folder(tmp_path, 2)
    assert f"{next(iter(flags))}" in refusal(tmp_path, **flags)
