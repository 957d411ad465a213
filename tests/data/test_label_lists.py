"""Images with several labels: lists of classes in the label column, read alike from all formats."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import image_folder, numbers_in, png, tar
from datasets import ClassLabel, Dataset, Features, Image, List, Value

import jit_accel as jit
from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.batch import check_labels, renumbered
from jit_accel.data.batches.holdout import held_by_split, split_holdout
from jit_accel.prepare import main as prepare

COUNT = 20
NAMES = ("cat", "dog", "old", "wet")


def names_for(n: int) -> list[str]:
    """Between none and all four of the names."""
    return [name for bit, name in enumerate(NAMES) if n >> bit & 1]


def rows(numbered: bool) -> list[list]:
    return [[NAMES.index(name) for name in names_for(n)] if numbered else names_for(n) for n in range(COUNT)]


def table(numbered: bool) -> Dataset:
    kind = Value("int64") if numbered else Value("string")
    images = [{"bytes": png(n), "path": f"{n:04d}.png"} for n in range(COUNT)]
    given = {"image": images, "tags": rows(numbered), "age": [float(n) for n in range(COUNT)]}
    return Dataset.from_dict(given, features=Features({"image": Image(), "tags": List(kind), "age": Value("float64")}))


def in_folder(root, numbered: bool):
    image_folder(root, COUNT)
    files = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
    lines = [{"file_name": f, "tags": tags, "age": n} for n, (f, tags) in enumerate(zip(files, rows(numbered)))]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def in_csv(root, numbered: bool, written=json.dumps):
    image_folder(root, COUNT)
    files = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
    with open(root / "metadata.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "tags", "age"])
        lines.writerows([f, written(tags) if tags else "", n] for n, (f, tags) in enumerate(zip(files, rows(numbered))))


def in_csv_of_pandas(root, numbered: bool):
    in_csv(root, numbered, repr)


def in_parquet(root, numbered: bool):
    root.mkdir()
    whole = table(numbered).with_format("arrow")[:]
    pq.write_table(whole.slice(0, 12), root / "a.parquet", row_group_size=5)
    pq.write_table(whole.slice(12), root / "b.parquet", row_group_size=5)


def in_tars(root, numbered: bool):
    members = {}
    for n, tags in enumerate(rows(numbered)):
        members[f"{n:04d}.png"] = png(n)
        members[f"{n:04d}.json"] = json.dumps({"tags": tags, "age": n}).encode()
    tar(root / "a.tar", dict(list(members.items())[:20]))
    tar(root / "b.tar", dict(list(members.items())[20:]))


WRITERS = {
    "folder": in_folder,
    "csv": in_csv,
    "pandas": in_csv_of_pandas,
    "parquet": in_parquet,
    "tars": in_tars,
    "saved": lambda root, numbered: table(numbered).save_to_disk(root),
}
KINDS = [(name, None) for name in WRITERS] + [("parquet", False), ("tars", False)]


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize(("name", "streaming"), KINDS)
def test_all_formats_give_each_image_its_labels(name, streaming, numbered, tmp_path, hf_cache):
    WRITERS[name](tmp_path / "data", numbered)
    for columns in ((), ("age",)):
        source = open_images(tmp_path / "data", streaming=streaming, label_column="tags", vector_column=columns)
        assert (source.num_classes, source.most_labels, source.is_labelled) == (4, 4, True)
        assert numbered or source.class_names == NAMES
        how = {"img_size": 4, "batch_size": 5, "seed": 0, "num_classes": 4}
        loader, workers = build_loader(source, **how), build_loader(source, **how, num_workers=2)
        seen = []
        for _ in range(4):
            batch, same = next(loader), next(workers)
            assert torch.equal(batch.labels, same.labels)
            images = numbers_in(batch.images)
            found = [{NAMES[label] for label in labels if label >= 0} for labels in batch.labels.tolist()]
            assert found == [set(names_for(n)) for n in images]
            assert (batch.vectors is None) == (not columns)
            seen += images
        workers.close()
        assert sorted(seen) == list(range(COUNT))


def test_lists_are_read_where_they_are_asked_for_alone(tmp_path, caplog):
    given = table(True).rename_column("tags", "labels")
    given.save_to_disk(tmp_path)
    assert not open_images(tmp_path).is_labelled
    assert "which is no class" in caplog.text
    assert open_images(tmp_path, label_column="labels").most_labels == 4


def test_those_held_out_have_theirs(tmp_path):
    in_parquet(tmp_path / "data", False)
    source = open_images(tmp_path / "data", label_column="tags")
    _, held = split_holdout(source, 0.4, max_images=99, img_size=4)
    for labels, n in zip(held.labels.tolist(), numbers_in(held.images)):
        assert {NAMES[label] for label in labels if label >= 0} == set(names_for(n))
    in_folder(tmp_path / "other", False)
    lines = [json.loads(line) for line in (tmp_path / "other" / "metadata.jsonl").read_text().splitlines()]
    lines = [line | {"tags": [tag for tag in line["tags"] if tag != "cat"]} for line in lines]  # others move up
    (tmp_path / "other" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    other = open_images(tmp_path / "other", label_column="tags")
    assert other.num_classes == 3
    held = held_by_split(source, other, max_images=99, img_size=4)
    for labels, n in zip(held.labels.tolist(), numbers_in(held.images)):
        assert {NAMES[label] for label in labels if label >= 0} == set(names_for(n)) - {"cat"}


def test_one_label_written_twice_is_one(tmp_path):
    given = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "tags": [["a", "b", "a"], ["b"], [], None]}
    kind = Features({"image": Image(), "tags": List(ClassLabel(names=["a", "b"]))})
    given["tags"] = [tags and [["a", "b"].index(tag) for tag in tags] for tags in given["tags"]]
    Dataset.from_dict(given, features=kind).save_to_disk(tmp_path)
    source = open_images(tmp_path, label_column="tags")
    assert source.class_names == ("a", "b")
    batch = next(build_loader(source, img_size=4, batch_size=4, seed=0))
    by_image = dict(zip(numbers_in(batch.images), batch.labels.tolist()))
    assert by_image == {0: [0, 1, -1], 1: [1, -1, -1], 2: [-1, -1, -1], 3: [-1, -1, -1]}
    check_labels(batch.labels.numpy(), 2)
    with pytest.raises(UserError, match="the data has the label 1"):
        check_labels(batch.labels.numpy(), 1)
    turned = renumbered(batch.labels, torch.tensor([5, 6]))
    assert dict(zip(numbers_in(batch.images), turned.tolist()))[0] == [5, 6, -1]


def test_labels_may_be_numbered_anew(tmp_path):
    tags = [[3], [3, 9], [9, 20], []]
    table = pa.table({"image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(4)], "tags": tags})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_images(tmp_path, label_column="tags", renumber_labels=True)
    assert source.class_names == ("3", "9", "20")
    batch = next(build_loader(source, img_size=4, batch_size=4, seed=0))
    assert dict(zip(numbers_in(batch.images), batch.labels.tolist()))[2] == [1, 2]


def test_two_rows_of_one_image_must_agree(tmp_path):
    in_folder(tmp_path, False)
    file = tmp_path / "metadata.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[3]]))
    assert open_images(tmp_path, label_column="tags").num_images == COUNT
    file.write_text("\n".join([*lines, json.dumps(json.loads(lines[3]) | {"tags": ["cat"]})]))
    with pytest.raises(UserError, match="with two different labels"):
        open_images(tmp_path, label_column="tags")


def test_a_fingerprint_follows_from_the_lists(tmp_path):
    in_folder(tmp_path, False)
    before = open_images(tmp_path, label_column="tags").fingerprint
    text = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(text.replace('["cat", "dog"]', '["dog", "old"]'))
    assert open_images(tmp_path, label_column="tags").fingerprint != before


def test_lists_without_any_label_are_refused(tmp_path):
    given = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "tags": [[], None, [], []]}
    Dataset.from_dict(given, features=Features({"image": Image(), "tags": List(Value("string"))})).save_to_disk(
        tmp_path
    )
    with pytest.raises(UserError, match=r"no image of .* has a label there") as caught:
        open_images(tmp_path, label_column="tags")
    assert (caught.value.about, caught.value.value) == ("label_column", "tags")


def listed(root, *cells: str) -> None:
    """Images, each with a cell of a column `tags` in metadata.csv."""
    image_folder(root, len(cells), 1)
    with open(root / "metadata.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["file_name", "tags"])
        lines.writerows([f"c0/{n:04d}.png", cell] for n, cell in enumerate(cells))


@pytest.mark.parametrize("cell", ["[0.5]", "[a]", '[["a"]]', "[true]", "[" * 5000 + "]", '["a" + "b"]'])
def test_a_cell_that_is_no_list_is_told(tmp_path, cell):
    listed(tmp_path, "[0, 1]", cell)
    with pytest.raises(UserError, match=r"is no list of labels, such as .*: repair the cell"):
        open_images(tmp_path, label_column="tags")


def test_text_without_brackets_everywhere_is_one_label_each(tmp_path):
    listed(tmp_path, '["a"]', "b")
    source = open_images(tmp_path, label_column="tags")
    assert (source.class_names, source.most_labels) == (('["a"]', "b"), None)


def test_numbers_and_names_in_lists_are_names(tmp_path):
    listed(tmp_path, '[1, "a"]', "[2]", "")
    source = open_images(tmp_path, label_column="tags")
    assert (source.class_names, source.most_labels) == (("1", "2", "a"), 2)


def in_cells(root, cells, ending="csv"):
    image_folder(root, len(cells))
    files = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
    mark = "\t" if ending == "tsv" else ","
    with open(root / f"metadata.{ending}", "w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([("file_name", "tags"), *zip(files, cells)])
    return root


def labels_of(source):
    out = np.empty((source.num_images, 3, 4, 4), np.uint8)
    labels = source.images.read(np.arange(source.num_images), out)[0]["label"].tolist()
    return [sorted(label for label in row if label >= 0) for row in labels]


@pytest.mark.parametrize(
    ("cells", "separator", "names", "labels"),
    [
        (["cat;wet", " dog ", "", ";wet; cat", "dog;;dog"], ";", ("cat", "dog", "wet"), [[0, 2], [1], [], [0, 2], [1]]),
        (["cat, wet", "dog", "wet"], ",", ("cat", "dog", "wet"), [[0, 2], [1], [2]]),
        (['["a;b", "cat"]', "cat;a", "[old];a"], ";", ("[old]", "a", "a;b", "cat"), [[2, 3], [1, 3], [0, 1]]),
        (["0|3", "1", "", "[2, 1]"], "|", ("0", "1", "2", "3"), [[0, 3], [1], [], [1, 2]]),
        (["3", "1", "0"], ";", ("0", "1", "2", "3"), [[3], [1], [0]]),
        (["0;x", "1", "x"], ";", ("0", "1", "x"), [[0, 2], [1], [2]]),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_cells_are_taken_apart_where_that_is_asked_for(cells, separator, names, labels, ending, tmp_path):
    root = in_cells(tmp_path / "data", cells, ending)
    source = open_images(root, label_column="tags", label_separator=separator)
    assert (source.class_names, labels_of(source)) == (names, labels)
    assert source.most_labels == max(map(len, labels))


def test_a_cell_is_one_class_where_it_is_not(tmp_path):
    source = open_images(in_cells(tmp_path / "data", ["cat;wet", "dog"]), label_column="tags")
    assert (source.class_names, source.most_labels) == (("cat;wet", "dog"), None)


def test_lists_that_are_there_stay(tmp_path):
    in_folder(tmp_path / "data", False)
    plain, same = (open_images(tmp_path / "data", label_column="tags", label_separator=mark) for mark in (None, ";"))
    assert (plain.fingerprint, labels_of(plain)) == (same.fingerprint, labels_of(same))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"label_separator": ";"}, "name it with --label_column"),
        ({"label_separator": "", "label_column": "tags"}, "is empty: give what stands between labels"),
        ({"label_separator": ";", "label_column": "tgas"}, "did you mean 'tags'"),
    ],
)
def test_a_separator_that_says_nothing_is_refused(how, message, tmp_path):
    with pytest.raises(UserError) as caught:
        open_images(in_cells(tmp_path / "data", ["cat;wet", "dog"]), **how)
    assert message.lower() in str(caught.value).lower()


def test_a_store_takes_the_separator_that_it_was_prepared_with(tmp_path):
    given = {"label_column": "tags", "label_separator": ";"}
    root, store = in_cells(tmp_path / "data", ["cat;wet", "dog", ""]), tmp_path / "store"
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert prepare(["--data_path", str(root), "--output_dir", str(store), "--img_size", "4", *flags]) == 0
    same, plain = (jit.open_images(store, **how) for how in (given, {}))
    assert (same.fingerprint, labels_of(same)) == (plain.fingerprint, labels_of(plain))
    assert sorted(labels_of(same)) == [[], [0, 2], [1]]
    with pytest.raises(UserError, match="was prepared, its columns are known"):
        jit.open_images(store, **given | {"label_separator": "|"})


def test_tables_have_no_cells_to_take_apart(tmp_path):
    in_parquet(tmp_path / "data", False)
    with pytest.raises(UserError, match="has no metadata files, whose cells may hold several labels"):
        open_images(tmp_path / "data", label_column="tags", label_separator=";")
