"""Splits: trained on is train, whatever the layout; the rest is left out, said, and can be chosen."""

import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import SIZE, labels_by_number, numbers_in, parquet, png, refusal, tar
from helpers import rows, train_here
from http_server import FailingServer

from jit_accel.base.errors import UserError
from jit_accel.data import open_images
from jit_accel.data.batches.holdout import held_by_split
from jit_accel.data.reading.splits import choose_splits, find_splits, have_common
from jit_accel.evaluate.image_sets import open_image_set
from jit_accel.prepare import main as prepare

pytestmark = pytest.mark.usefixtures("hf_cache")


def pictures(root, *names):
    """Picture n at the n-th of these paths."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def numbers(path, **how):
    return sorted(labels_by_number(open_images(path, **how)))


FILES = {  # layouts of Parquet and tar files, of which the first line is trained on
    "the Hub's conversions": ("default/train/0000 default/train/0001", "default/test/0000 default/validation/0000"),
    "file names": ("train-00000-of-00002 train-00001-of-00002", "test-00000-of-00001 validation-00000-of-00001"),
    "short file names": ("train", "test val"),
    "words within": ("x_train", "x_test x.val"),
    "the last word": ("train-test-split_train-0", "train-test-split_test-0"),
    "capitals": ("Train/0 Train/1", "Test/0"),
    "synonyms": ("training/0", "testing/0 dev/0 valid/0 evaluation/0 eval/0"),
    "years": ("train2017/0", "val2017/0 test2017/0"),
    "deep": ("a/b/train/c/0 a/b/train/c/1", "a/b/test/c/0"),
    "in each folder": ("a/train/0 b/train/0", "a/test/0 b/test/0"),
    "a split beside the rest": ("a-0 a-1 b-0", "test-0"),
    "train beside others": ("train/0", "extra/0"),
    "folders go before files": ("train/test_0 train/1", "test/0"),
    "humps": ("imagesTrain0 imagesTrain1", "imagesTest0"),
    "short words": ("trn/0", "tst/0"),
    "no splits": ("a/0 b/1 contest/2 latest-3 trainval/4", ""),
    "a single one": ("test/0 test/1", ""),
}


@pytest.mark.parametrize("layout", FILES)
def test_files_for_training_are_told_from_others(layout):
    kept, others = (names.split() for names in FILES[layout])
    found = find_splits([*kept, *others])
    splits = {found[name][0] for name in kept}
    assert len(splits) == 1
    assert not splits & {found[name][0] for name in others}
    assert choose_splits(dict.fromkeys((split for split, _ in found.values()), 1), None, "data") == list(splits)


FOLDERS = {  # of images: the inner paths of those that are trained on, and the others
    "splits of classes": ({"train/cat/": "cat/", "train/dog/": "dog/"}, ["test/cat/", "val/dog/"]),
    "flat splits": ({"train/": ""}, ["test/"]),
    "with files beside": ({"train/cat/": "cat/", "train/dog/": "dog/"}, ["test/cat/", ""]),
    "capitals": ({"Training/cat/": "cat/", "Training/dog/": "dog/"}, ["Testing/cat/"]),
    "a folder around": ({"data/train/cat/": "cat/", "data/train/dog/": "dog/"}, ["data/test/cat/"]),
    "splits of each class": ({"cat/train/": "cat/", "dog/train/": "dog/"}, ["cat/test/", "dog/test/"]),
    "a test folder beside classes": ({"cat/": "cat/", "dog/": "dog/"}, ["test/"]),
    "a test folder of classes beside classes": ({"cat/": "cat/", "dog/": "dog/"}, ["test/cat/", "test/dog/"]),
    "a test folder within a class": ({"cat/": "cat/", "dog/": "dog/"}, ["dog/test/"]),
    "with years": ({"train2017/a/": "a/"}, ["val2017/a/"]),
    "with words": ({"train_images/a/": "a/"}, ["test_images/a/"]),
    "with humps": ({"TrainImages/a/": "a/"}, ["TestImages/a/"]),
    "words for sets": ({"train/a/": "a/", "train/b/": "b/"}, ["validation_set/a/", "Test images/a/", "testset/a/"]),
    "sets beside classes": ({"cat/": "cat/", "dog/": "dog/"}, ["TestSet/cat/", "val-data/dog/"]),
    "short words": ({"trn/a/": "a/", "trn/b/": "b/"}, ["tst/a/"]),
    "several folders of one split": ({"trainA/": "A/", "trainB/": "B/"}, ["testA/", "testB/"]),
    "years of one split": ({"train2014/": "", "train2017/": ""}, ["val2017/"]),
    "train alone with files beside": ({"train/cat/": "cat/", "train/dog/": "dog/"}, [""]),
    "as archives are unpacked": (
        {"seg_train/seg_train/a/": "a/", "seg_train/seg_train/b/": "b/"},
        ["seg_test/seg_test/a/"],
    ),
    "train alone": ({"train/cat/": "cat/", "train/dog/": "dog/"}, []),
    "a class named train beside a test folder": ({"bus/": "bus/", "train/": "train/"}, ["test/"]),
    "splits beside other folders": ({"train/a/": "a/", "train/b/": "b/"}, ["test/a/", "annotated/"]),
    "a class named train": ({"bus/": "bus/", "train/": "train/"}, []),
    "classes with such words": ({"train_station/": "train_station/", "test_tube/": "test_tube/"}, []),
    "classes with such words and digits": ({"test1/": "test1/", "test2/": "test2/"}, []),
    "a single one deep within": ({"a/train/": "a/train/"}, []),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_folders_for_training_are_told_from_others_and_from_classes(layout):
    kept, others = FOLDERS[layout]
    found = find_splits([*kept, *others], are_classes=True)
    assert {found[folder][0] for folder in kept} == {"train"}
    assert "train" not in {found[folder][0] for folder in others}
    assert {folder: found[folder][1] for folder in kept} == kept


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_of_other_splits_are_left_out_said_and_chosen(tmp_path, caplog, kind):
    for start, split in enumerate(("train", "test", "validation")):
        for shard in range(2):
            n = 4 * start + 2 * shard
            file = tmp_path / "default" / split / f"{shard:04d}.{kind}"
            if kind == "parquet":
                parquet(file, [n, n + 1])
            else:
                tar(
                    file,
                    {f"{m}.{ending}": data for m in (n, n + 1) for ending, data in (("png", png(m)), ("cls", b"0"))},
                )
    assert numbers(tmp_path) == [0, 1, 2, 3]
    assert "left out: test (2 files), validation (2 files)" in caplog.text
    for flag in ("--split", "--holdout validation", "--reference"):
        assert flag in caplog.text
    assert numbers(tmp_path / "default" / "*" / f"*.{kind}") == [0, 1, 2, 3]
    caplog.clear()
    assert numbers(tmp_path, split="test") == numbers(tmp_path / "default" / "test") == [4, 5, 6, 7]
    assert numbers(tmp_path, split="val") == [8, 9, 10, 11]
    assert numbers(tmp_path, split="train+val") == [0, 1, 2, 3, 8, 9, 10, 11]
    assert numbers(tmp_path, split="all") == list(range(12))
    assert not caplog.text
    assert "choose from test, train, validation. Did you mean 'test'?" in refusal(tmp_path, split="tset")
    prints = {open_images(tmp_path, split=split).fingerprint for split in (None, "test", "val", "all")}
    assert len(prints) == 4


def test_splits_of_class_folders(tmp_path, caplog):
    pictures(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/dog/0.png")
    source = open_images(tmp_path)
    assert (source.class_names, labels_by_number(source)) == (("cat", "dog"), {0: 0, 1: 1})
    assert "left out: test (2 images)" in caplog.text
    assert labels_by_number(open_images(tmp_path, split="test")) == {2: 0, 3: 1}
    union = open_images(tmp_path, split="all")
    assert (union.class_names, labels_by_number(union)) == (("cat", "dog"), {2: 0, 0: 0, 3: 1, 1: 1})


def test_the_kept_scan_serves_all_splits_and_sees_new_ones(tmp_path):
    pictures(tmp_path, "train/0.png", "test/0.png")
    assert numbers(tmp_path) == [0]
    assert numbers(tmp_path, split="test") == [1]
    assert numbers(tmp_path) == [0]
    pictures(tmp_path, "train/0.png", "test/0.png", "val/0.png")
    assert numbers(tmp_path, split="validation") == [2]


def test_a_test_folder_beside_class_folders_is_no_class_unless_asked_for(tmp_path, caplog):
    pictures(tmp_path, "cat/0.png", "dog/0.png", "test/0.png")
    assert open_images(tmp_path).class_names == ("cat", "dog")
    assert "test (1 images)" in caplog.text
    source = open_images(tmp_path, split="all")
    assert (source.class_names, source.num_images) == (("cat", "dog", "test"), 3)


def test_classes_that_are_named_like_splits_can_be_had(tmp_path):
    pictures(tmp_path, "train/steam.png", "test/maths.png")
    assert open_images(tmp_path, split="all").class_names == ("test", "train")


def test_only_splits_that_are_not_for_training_are_asked_about(tmp_path):
    pictures(tmp_path, "val/0.png", "test/0.png")
    assert "no split to train on, only test, validation" in refusal(tmp_path)
    assert numbers(tmp_path, split="val") == [0]


def test_all_splits_by_name_are_all_splits(tmp_path):
    pictures(tmp_path, "cat/0.png", "dog/0.png", "test/0.png")
    assert open_images(tmp_path, split="train+eval").class_names == ("cat", "dog", "test")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_folder_with_one_split_says_which(tmp_path, kind):
    for n in range(2):
        file = tmp_path / "test" / f"{n}.{kind}"
        parquet(file, [n]) if kind == "parquet" else tar(file, {f"{n}.png": png(n)})
    for path in (tmp_path, tmp_path / "test" / f"*.{kind}"):
        assert numbers(path) == [0, 1]
    assert numbers(tmp_path, split="test") == [0, 1]
    assert "choose from test" in refusal(tmp_path, split="train")
    assert "choose from train" in refusal(tmp_path / "test", split="test")


def test_spellings_of_a_split_are_one_data_set(tmp_path):
    for n, split in enumerate(("train", "dev", "eval")):
        parquet(tmp_path / f"{split}.parquet", [n])
    for some in (("dev", "val", "VALID"), ("dev+test", "eval+validation")):
        assert len({open_images(tmp_path, split=split).fingerprint for split in some}) == 1


def test_a_split_of_data_without_splits_is_refused(tmp_path):
    pictures(tmp_path, "cat/0.png", "dog/0.png")
    assert "no such split; choose from train" in refusal(tmp_path, split="test")
    assert open_images(tmp_path, split="train").fingerprint == open_images(tmp_path, split="all").fingerprint


def test_metadata_of_each_split_speaks_for_it(tmp_path, caplog):
    pictures(tmp_path, "train/0.png", "train/1.png", "test/0.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\n0.png,owl\n1.png,ant\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\n0.png,bee\n")
    source = open_images(tmp_path)
    assert (source.class_names, labels_by_number(source)) == (("ant", "owl"), {0: 1, 1: 0})
    assert "missing" not in caplog.text
    assert "not listed" not in caplog.text


def test_one_metadata_file_lists_both(tmp_path, caplog):
    pictures(tmp_path, "train/0.png", "train/1.png", "test/0.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/0.png,owl\ntrain/1.png,ant\ntest/0.png,bee\n")
    source = open_images(tmp_path)
    assert (source.class_names, labels_by_number(source)) == (("ant", "owl"), {0: 1, 1: 0})
    assert "missing" not in caplog.text
    assert "not listed" not in caplog.text
    assert open_images(tmp_path, split="test").class_names == ("bee",)
    assert open_images(tmp_path, split="all").num_images == 3


def test_a_column_says_of_what_split_an_image_is(tmp_path, caplog):
    pictures(tmp_path, *[f"{n}.png" for n in range(6)])
    words = ("train", "Train", "val", "test", "testing", "")
    rows = "".join(f"{n}.png,{'ab'[n % 2]},{word}\n" for n, word in enumerate(words))
    (tmp_path / "metadata.csv").write_text("file_name,label,split\n" + rows)
    source = open_images(tmp_path)
    assert (source.class_names, labels_by_number(source)) == (("a", "b"), {0: 0, 1: 1})
    assert "left out: validation (1 images), test (2 images), others (1 images)" in caplog.text
    assert "not listed" not in caplog.text
    assert numbers(tmp_path, split="dev") == [2]
    assert numbers(tmp_path, split="train+test") == [0, 1, 3, 4]
    assert numbers(tmp_path, split="all") == list(range(6))
    assert "choose from" in refusal(tmp_path, split="tset")
    for name in ("Split", "SET", "data_set"):
        (tmp_path / "metadata.csv").write_text(f"file_name,label,{name}\n" + rows)
        assert numbers(tmp_path) == [0, 1]
    (tmp_path / "metadata.csv").write_text("file_name,split\n0.png,left\n1.png,right\n")
    assert numbers(tmp_path) == [0, 1]
    assert "choose from train" in refusal(tmp_path, split="test")


@pytest.mark.parametrize("kind", ["stream", "table", "saved", "dict", "url"])
def test_a_column_of_a_table_says_of_what_split_a_row_is(tmp_path, caplog, kind):
    """With row groups of 2 images, of which one has none to train on."""
    splits = ["test", "Test", "train", "val", "train", "train", None, "train"]
    labels = ["x", "y", "a", "a", "b", "a", "z", "b"]
    table = datasets.Dataset.from_dict({"image": [png(n) for n in range(8)], "label": labels, "split": splits})
    place = tmp_path / ("a.parquet" if kind in ("stream", "table", "url") else "saved")
    how = {"streaming": False} if kind == "table" else {}
    if kind == "dict":
        datasets.DatasetDict({"train": table}).save_to_disk(place)
    elif kind == "saved":
        table.save_to_disk(place)
    else:
        table.to_parquet(place, batch_size=2)
    if kind == "url":
        place = f"{FailingServer(tmp_path).url}/a.parquet"
    source = open_images(place, **how)
    assert (source.num_images, source.class_names) == (4, ("a", "b"))
    assert labels_by_number(source) == {2: 0, 4: 1, 5: 0, 7: 1}
    assert "the split train is taken, and other splits are left out: test (2 images), " in caplog.text
    assert numbers(place, split="test", **how) == [0, 1]
    assert numbers(place, split="train+validation", **how) == [2, 3, 4, 5, 7]
    assert numbers(place, split="all", **how) == [*range(8)]
    fingerprints = {open_images(place, split=split, **how).fingerprint for split in (None, "test", "val", "all")}
    assert len(fingerprints) == 4


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_without_words_for_splits_says_nothing(tmp_path, caplog, kind):
    for name, splits in {"one": ["train"] * 4, "other": ["a", "b", "a", "b"]}.items():
        table = datasets.Dataset.from_dict({"image": [png(n) for n in range(4)], "split": splits})
        plain = table.remove_columns("split")
        places = [tmp_path / f"{name}{end}" for end in ((".parquet", "_.parquet") if kind == "parquet" else ("", "_"))]
        for place, some in zip(places, (table, plain)):
            some.to_parquet(place) if kind == "parquet" else some.save_to_disk(place)
        assert [numbers(place) for place in places] == [[0, 1, 2, 3]] * 2
    assert "split" not in caplog.text


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=["large", "dictionary"]
)
def test_a_column_of_splits_may_be_text_of_any_kind(tmp_path, kind, streaming):
    """As other programs than HF datasets write it."""
    column = pa.array(["train", "test", "train", "val"]).cast(kind)
    images = pa.array([{"bytes": png(n), "path": None} for n in range(4)])
    pq.write_table(pa.table({"image": images, "label": [*"abca"], "split": column}), tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet", streaming=streaming)
    assert source.class_names == ("a", "c")
    assert labels_by_number(source) == {0: 0, 2: 1}


@pytest.mark.parametrize("kind", ["parquet", "saved", "metadata"])
def test_a_column_with_as_many_values_as_images_says_of_no_split(tmp_path, kind):
    count = 120
    texts = ["test", "train", *(f"photo {n}" for n in range(count - 2))]
    table = datasets.Dataset.from_dict({"image": [png(n) for n in range(count)], "set": texts})
    place = tmp_path / kind
    if kind == "metadata":
        pictures(place, *(f"{n}.png" for n in range(count)))
        (place / "metadata.csv").write_text("file_name,set\n" + "".join(f"{n}.png,{t}\n" for n, t in enumerate(texts)))
    elif kind == "parquet":
        table.to_parquet(place / "a.parquet")
    else:
        table.save_to_disk(place)
    assert open_images(place).num_images == count


def test_a_holdout_of_another_split_by_a_column(tmp_path):
    splits = ["train", "val", "train", "val", "train", "train"]
    table = datasets.Dataset.from_dict({"image": [png(n) for n in range(6)], "label": [*"abbaab"], "split": splits})
    table.to_parquet(tmp_path / "a.parquet", batch_size=2)
    train, other = (open_images(tmp_path / "a.parquet", split=split) for split in (None, "validation"))
    held = held_by_split(train, other, max_images=9, img_size=SIZE)
    assert sorted(held.labels.tolist()) == [0, 1]
    assert len(held.images) == 2


def test_what_is_listed_of_other_splits_is_not_missing(tmp_path, caplog):
    pictures(tmp_path, "train/a.png", f"test/{unicodedata.normalize('NFD', 'é')}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/a.png,a\ntest/é.png,b\ntest/gone.png,b\n")
    assert numbers(tmp_path) == [0]
    assert "missing" not in caplog.text


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("around", ["", "./x/"])
def test_splits_within_a_tar(tmp_path, streaming, around, caplog):
    parts = {"train": (0, 1, 2), "val": (3, 4), "test": (5, 6)}
    members = [(f"{around}{part}/{'ab'[n % 2]}/{n}", n) for part, some in parts.items() for n in some]
    folders = tar(tmp_path / "a" / "0.tar", {f"{stem}.png": png(n) for stem, n in members})
    labels = {f"{stem}.{key}": data for stem, n in members for key, data in (("png", png(n)), ("cls", b"%d" % n))}
    tar(tmp_path / "b" / "0.tar", labels)
    tar(tmp_path / "b" / "1.tar", {f"{around}train/7.png": png(7), f"{around}train/7.cls": b"0"})
    source = open_images(folders, streaming=streaming)
    assert (source.class_names, labels_by_number(source)) == (("a", "b"), {0: 0, 1: 1, 2: 0})
    assert "left out: validation (2 images), test (2 images)" in caplog.text
    assert labels_by_number(open_images(folders, split="test", streaming=streaming)) == {5: 1, 6: 0}
    assert labels_by_number(open_images(tmp_path / "b", streaming=streaming)) == {0: 0, 1: 1, 2: 2, 7: 0}
    assert numbers(tmp_path / "b", split="all", streaming=streaming) == list(range(8))
    assert "choose from" in refusal(folders, split="tset")
    assert len({open_images(folders, split=split).fingerprint for split in (None, "val", "test", "all")}) == 4


def test_urls_of_splits(tmp_path, caplog):
    for n, split in enumerate(("train", "test")):
        parquet(tmp_path / split / "0.parquet", [n])
    server = FailingServer(tmp_path)
    assert numbers(server.url + "/{train,test}/0.parquet") == [0]
    assert "left out: test (1 files)" in caplog.text
    assert numbers(server.url + "/{train,test}/0.parquet", split="all") == [0, 1]
    server.go_away()


def test_a_saved_dict_has_splits(tmp_path, caplog):
    saved = datasets.Dataset(pq.read_table(parquet(tmp_path / "a.parquet", range(6))))
    parts = {"train": saved.select([0, 1]), "test": saved.select([2]), "extra": saved.select([3, 4])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    assert numbers(tmp_path / "dict") == [0, 1]
    assert "left out: test (1 images), extra (2 images)" in caplog.text
    assert numbers(tmp_path / "dict", split="extra") == [3, 4]
    assert numbers(tmp_path / "dict", split="test+extra") == [2, 3, 4]
    assert numbers(tmp_path / "dict", split="all") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("streaming", [None, False])
def test_splits_of_the_hub(tmp_path, monkeypatch, streaming):
    files = {"train": str(parquet(tmp_path / "a.parquet", [0, 1])), "dev": str(parquet(tmp_path / "b.parquet", [2]))}

    def instead(real):
        return lambda path, **how: real("parquet", data_files=files, **how)

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, instead(getattr(datasets, name)))
    assert numbers("someone/pictures", streaming=streaming) == [0, 1]
    for split in ("dev", "validation"):
        assert numbers("someone/pictures", streaming=streaming, split=split) == [2]
    assert numbers("someone/pictures", streaming=streaming, split="all") == [0, 1, 2]
    assert "choose from" in refusal("someone/pictures", streaming=streaming, split="test")


def test_embedded_data_has_a_test_split():
    split, other = open_images("builtin:fashion_mnist", split="test"), open_images("builtin:fashion_mnist_test")
    assert split.fingerprint == other.fingerprint == open_images("builtin:fashion_mnist", split="Testing").fingerprint


def test_a_loss_is_measured_on_another_split(tmp_path):
    names = [f"{part}/{name}/{n}.png" for part in ("train", "val") for n in range(3) for name in ("ant", "bee", "cow")]
    pictures(tmp_path, *[name for name in names if "val/ant" not in name])  # bee is 1 in train, 0 in val
    train, other = open_images(tmp_path), open_images(tmp_path, split="val")
    held = held_by_split(train, other, max_images=100, img_size=SIZE)
    labels = dict(zip(numbers_in(held.images), held.labels.tolist()))
    assert labels == {9: 1, 10: 2, 11: 1, 12: 2, 13: 1, 14: 2}
    parts = [held_by_split(train, other, max_images=5, img_size=SIZE, rank=r, world_size=2) for r in range(2)]
    assert sorted(np.concatenate([part.keys for part in parts])) == sorted(held.keys)[:5]
    with pytest.raises(UserError, match="of the class ant, which no image to train on has"):
        held_by_split(other, train, max_images=5, img_size=SIZE)
    pictures(tmp_path, *[f"test/{n}.png" for n in range(3)])
    with pytest.raises(UserError, match="has no labels"):
        held_by_split(train, open_images(tmp_path, split="test"), max_images=5, img_size=SIZE)


def test_a_training_measures_val_loss_on_a_split_and_goes_on_beside_its_own_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pictures(tmp_path, *[f"{part}/{n}.png" for part in ("train", "val") for n in range(8)]))
    flags = ("--data_path", ".", "--output_dir", "runs/x", "--holdout", "validation")
    assert train_here(*flags, "--max_steps", "2") == 0
    assert train_here(*flags, "--max_steps", "3", "--resume", "auto") == 0
    assert "val/loss on 8" in capsys.readouterr().out
    assert sum("val/loss" in row for row in rows(tmp_path / "runs" / "x")) == 2
    assert open_images(".").num_images == 8


def test_a_split_that_is_not_there_is_no_holdout(tmp_path, capsys):
    pictures(tmp_path, *[f"cat/{n}.png" for n in range(8)])
    assert train_here("--data_path", str(tmp_path), "--output_dir", str(tmp_path / "o"), "--holdout", "val") == 2
    assert "--holdout val: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "marks", ["run.json config.yaml", "model_index.json", "samples.json", "index.json preview.png"]
)
def test_what_we_wrote_inside_the_data_is_no_data(tmp_path, caplog, marks):
    pictures(tmp_path, "cat/0.png", "dog/0.png")
    before = open_images(tmp_path)
    pictures(tmp_path / "runs" / "x", "samples/step_1.png", "a.png")
    for mark in marks.split():
        (tmp_path / "runs" / "x" / mark).write_text("{}")
    after = open_images(tmp_path)
    assert (after.fingerprint, after.class_names) == (before.fingerprint, before.class_names)
    assert "runs/x" in caplog.text
    assert "is not read" not in caplog.text
    assert open_images(tmp_path / "runs" / "x").num_images > 0  # where it is named
    for mark in marks.split():
        (tmp_path / "runs" / "x" / mark).unlink()
    assert open_images(tmp_path).class_names == ("cat", "dog", "runs")


def test_what_is_trained_on_is_no_holdout():
    assert have_common(None, "train")
    assert have_common("all", "val")
    assert have_common("train+validation", "dev")
    assert not have_common("train+validation", "test")
    assert not have_common(None, "val")


def test_prepare_and_evaluate_take_a_split(tmp_path):
    pictures(tmp_path / "data", "train/0.png", "train/1.png", "test/0.png")
    assert open_image_set(str(tmp_path / "data"), "reference", SIZE, "test").num_images == 1
    flags = ("--data_path", str(tmp_path / "data"), "--img_size", str(SIZE), "--num_workers", "1", "--split", "test")
    assert prepare([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert open_images(tmp_path / "out").num_images == 1
    assert "no such split" in refusal(tmp_path / "out", split="test")
