"""Names of classes: numbers in their order, one form of Unicode, and what is dropped is said with its reason."""

import io
import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import image_folder, labels_by_number, parquet, png, refusal, tar
from datasets import Value

from jit_accel.data import open_images
from jit_accel.data.formats.source import in_class_order

pytestmark = pytest.mark.usefixtures("hf_cache")
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))


def folders(root, *names):
    """One image a folder: that of the n-th has number n."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.png").write_bytes(png(number))
    return root


def csv_folder(root, content, count=4, name="metadata.csv"):
    root.mkdir(exist_ok=True)
    for number in range(count):
        (root / f"{number}.png").write_bytes(png(number))
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_folders_that_are_numbers_are_sorted_as_numbers(tmp_path, caplog):
    names = [str(n) for n in range(12)]
    source = open_images(folders(tmp_path / "a", *names))
    assert source.class_names == tuple(names)
    assert labels_by_number(source) == {n: n for n in range(12)}
    assert open_images(folders(tmp_path / "b", "009", "010", "011", "1000")).class_names == (
        "009",
        "010",
        "011",
        "1000",
    )
    caplog.clear()
    assert open_images(folders(tmp_path / "c", *names, "x")).class_names == tuple(sorted([*names, "x"]))
    assert not caplog.records
    assert open_images(folders(tmp_path / "d", "1", "2", "10")).class_names == ("1", "2", "10")
    assert "class 0 is '1'" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_labels_of_text_that_are_numbers_are_sorted_as_numbers(tmp_path, kind):
    labels = ["10", "9", "2", "0"]
    if kind == "jsonl":
        rows = "\n".join(json.dumps({"file_name": f"{n}.png", "label": label}) for n, label in enumerate(labels))
        source = open_images(csv_folder(tmp_path / "a", rows, name="metadata.jsonl"))
    elif kind == "parquet":
        source = open_images(parquet(tmp_path / "a.parquet", range(4), labels, feature=Value("string")))
    else:
        members = {}
        for n, label in enumerate(labels):
            members |= {f"{n}.png": png(n), f"{n}.json": json.dumps({"label": label}).encode()}
        source = open_images(tar(tmp_path / "a.tar", members))
    assert source.class_names == ("0", "2", "9", "10")
    assert labels_by_number(source) == {0: 3, 1: 2, 2: 1, 3: 0}


@pytest.mark.parametrize("names", ["٠ ١ ٢ ١٠", "０ １ ２ １０", "7 11 " + "1" * 30])
def test_digits_of_all_scripts_and_lengths_are_sorted_as_numbers(tmp_path, names):
    assert open_images(folders(tmp_path, *names.split())).class_names == tuple(names.split())


def test_a_run_keeps_the_order_of_its_classes(tmp_path, caplog):
    new = open_images(folders(tmp_path / "a", *(str(n) for n in range(12))))
    old = in_class_order(new, sorted(new.class_names))
    assert old.class_names == tuple(sorted(new.class_names))
    assert [old.class_names[label] for _, label in sorted(labels_by_number(old).items())] == list(new.class_names)
    assert "order in which the run began" in caplog.text
    assert old.fingerprint == new.fingerprint
    for names in (new.class_names, [*new.class_names, "12"], ["a"] * 12, []):
        assert in_class_order(new, names) is new
    text = open_images(parquet(tmp_path / "a.parquet", range(4), ["10", "9", "2", "0"], feature=Value("string")))
    assert labels_by_number(in_class_order(text, ["0", "10", "2", "9"])) == {0: 1, 1: 3, 2: 2, 3: 0}


def test_names_are_one_in_all_forms_of_unicode(tmp_path):
    source = open_images(folders(tmp_path / NFD, NFD, "tea", NFC))
    assert source.class_names == (NFC, "tea")
    assert labels_by_number(source) == {0: 0, 1: 1, 2: 0}
    assert open_images(tmp_path / NFC).fingerprint == source.fingerprint
    labels = [NFD, "tea", NFC, "tea"]
    source = open_images(parquet(tmp_path / "a.parquet", range(4), labels, feature=Value("string")))
    assert (source.class_names, labels_by_number(source)) == ((NFC, "tea"), {0: 0, 1: 1, 2: 0, 3: 1})


def test_columns_and_members_are_found_in_all_forms_of_unicode(tmp_path):
    folder = csv_folder(tmp_path / "a", f"file_name,{NFD}\n0.png,x\n1.png,y\n2.png,x\n3.png,y\n")
    assert labels_by_number(open_images(folder, label_column=NFC)) == {0: 0, 1: 1, 2: 0, 3: 1}
    members = {f"{NFD}.png": png(0), f"{NFC}.cls": b"1", "tea.png": png(1), "tea.cls": b"0"}
    assert labels_by_number(open_images(tar(tmp_path / "a.tar", members))) == {0: 1, 1: 0}


def test_metadata_finds_images_in_all_forms_of_unicode(tmp_path, caplog):
    for number, name in enumerate((f"{NFD}.png", f"{NFC}2.png", "tea.png")):
        (tmp_path / name).write_bytes(png(number))
    rows = f"file_name,label\n{NFC}.png,a\n{NFD}2.png,b\ntea.png,b\n"
    (tmp_path / "metadata.csv").write_text(rows, encoding="utf-8")
    assert labels_by_number(open_images(tmp_path)) == {0: 0, 1: 1, 2: 1}
    assert not caplog.records


# Labels that are dropped, and those that look as if they could be used


@pytest.mark.parametrize("type", [pa.float32(), pa.float64(), pa.decimal128(22, 2)])
@pytest.mark.parametrize("streaming", [None, False])
def test_whole_floats_are_labels(tmp_path, type, streaming):
    rows = [{"bytes": png(n), "path": f"{n}.png"} for n in range(4)]
    pq.write_table(pa.table({"image": rows, "label": pa.array([0, 2, 1, 2]).cast(type)}), tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet", streaming=streaming)
    assert (source.num_classes, labels_by_number(source)) == (3, {0: 0, 1: 2, 2: 1, 3: 2})


def test_whole_floats_in_metadata_are_labels_and_others_are_scores(tmp_path, caplog):
    text = "file_name,label\n0.png,0.0\n1.png,1.0\n2.png,0.0\n3.png,{}\n"
    source = open_images(csv_folder(tmp_path, text.format("1.0")))
    assert labels_by_number(source) == {0: 0, 1: 1, 2: 0, 3: 1}
    source = open_images(csv_folder(tmp_path, text.format("0.5")))
    assert (source.is_labelled, source.num_images) == (False, 4)
    assert "'label' is Value('float64') with fractions, which is no class" in caplog.text
    assert "not all are whole numbers" in refusal(tmp_path, label_column="label")
    assert "no label" in refusal(csv_folder(tmp_path, text.format("")))


def test_dates_are_no_classes_and_only_that_is_said(tmp_path, caplog):
    rows = "file_name,label\n0.png,2020-01-01\n1.png,2021-01-01\n"
    assert not open_images(csv_folder(tmp_path, rows)).is_labelled
    (record,) = [record.getMessage() for record in caplog.records if "unlabelled" in record.getMessage()]
    assert "Value('date32')" in record


@pytest.mark.parametrize("text", ["file_name,label\n0.png,café\n", "file_name,größe,label\n0.png,1,2\n"])
def test_text_that_is_not_utf8_is_refused_for_that(tmp_path, text):
    message = refusal(csv_folder(tmp_path, text.encode("latin-1")))
    assert "metadata.csv" in message
    assert "UTF-8" in message
    assert "it is in UTF-16" in refusal(csv_folder(tmp_path, text.encode("utf-16")))


@pytest.mark.parametrize(("name", "mark"), [("metadata.csv", mark) for mark in ";\t|"] + [("metadata.tsv", ",")])
def test_tables_of_other_separators_are_refused_for_that(tmp_path, name, mark):
    rows = "\r\n".join(mark.join(row) for row in (("file_name", "label"), ("0.png", "1,0"), ("1.png", "0,0")))
    message = refusal(csv_folder(tmp_path, b"\xef\xbb\xbf" + rows.encode(), name=name))
    assert f"separated by {mark!r}" in message
    assert name in message


def test_numbers_and_text_in_json_are_text(tmp_path):
    labels = [1, "x", 10, "1"]
    rows = "\n".join(json.dumps({"file_name": f"{n}.png", "label": label}) for n, label in enumerate(labels))
    source = open_images(csv_folder(tmp_path, rows, name="metadata.jsonl"))
    assert (source.class_names, labels_by_number(source)) == (("1", "10", "x"), {0: 0, 1: 2, 2: 1, 3: 0})


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV", "metadata.tsv", "METADATA.jsonl", "metadata.parquet"])
def test_metadata_of_every_kind_is_read(tmp_path, name):
    labels = {"file_name": [f"{n}.png" for n in range(4)], "label": ["b", "a", "b", "a"]}
    separator = "\t" if name.endswith("tsv") else ","
    rows = [dict(zip(labels, row)) for row in zip(*labels.values())]
    content = "\n".join(separator.join(row) for row in (labels, *zip(*labels.values())))
    if name.endswith("jsonl"):
        content = "\n".join(map(json.dumps, rows))
    if name.endswith("parquet"):
        pq.write_table(pa.table(labels), file := io.BytesIO())
        content = file.getvalue()
    source = open_images(csv_folder(tmp_path, content, name=name))
    assert (source.format, labels_by_number(source)) == ("folder", {0: 1, 1: 0, 2: 1, 3: 0})


@pytest.mark.parametrize(
    "name",
    [
        "labels.csv",
        "labels.parquet",
        "train.tsv",
        "annotations.json",
        "classes.txt",
        "list.xlsx",
        "instances_train.json",
        "0.xml",
        "metadata.csv.gz",
    ],
)
def test_other_files_of_labels_are_said_to_be_passed_over(tmp_path, caplog, name):
    csv_folder(tmp_path, "file,label\n0.png,a\n", name=name)
    assert not open_images(tmp_path).is_labelled
    assert f"{name} is not read" in caplog.text
    caplog.clear()
    open_images(csv_folder(tmp_path, "file_name,label\n0.png,a\n1.png,b\n"))
    assert "is not read" not in caplog.text


def test_labels_that_begin_at_1_or_leave_gaps_are_warned_of_and_renumbered(tmp_path, caplog):
    ours = [
        parquet(tmp_path / "a.parquet", range(4), [1, 2, 5, 1], feature=Value("int64")),
        csv_folder(tmp_path / "a", "file_name,label\n0.png,1\n1.png,2\n2.png,5\n3.png,1\n"),
        tar(
            tmp_path / "a.tar",
            {f"{n}.{e}": d for n in range(4) for e, d in (("png", png(n)), ("cls", b"1251"[n : n + 1]))},
        ),
    ]
    for path in ours:
        for streaming in (None, False) if path.suffix else (None,):
            caplog.clear()
            assert labels_by_number(open_images(path, streaming=streaming)) == {0: 1, 1: 2, 2: 5, 3: 1}
            assert "no image is of 3 of the 6 classes (0, 3, 4)" in caplog.text
            assert "--renumber_labels" in caplog.text
            source = open_images(path, renumber_labels=True, streaming=streaming)
            assert labels_by_number(source) == {0: 0, 1: 1, 2: 2, 3: 0}
            assert source.class_names == ("1", "2", "5")
    named = parquet(tmp_path / "b.parquet", [1, 3])
    caplog.clear()
    assert open_images(named).class_names == ("even", "odd")
    assert "no image is of 1 of the 2 classes (even)" in caplog.text
    assert open_images(named, renumber_labels=True).class_names == ("odd",)
    assert "leave the flag out" in refusal(image_folder(tmp_path / "c", 4), renumber_labels=True)


# Tar files of folders, and names with dots


def opened(tmp_path, members, **how):
    source = open_images(tar(tmp_path / "a.tar", members), **how)
    return source.class_names, labels_by_number(source)


@pytest.mark.parametrize("around", ["", "./", "pictures/", "./a/b/"])
@pytest.mark.parametrize("streaming", [None, False])
def test_folders_in_tars_are_classes_as_on_disk(tmp_path, around, streaming, caplog):
    members = {f"{around}dog/0.png": png(0), f"{around}cat/1.x.jpg": png(1), f"{around}cat/more/2.png": png(2)}
    assert opened(tmp_path, members, streaming=streaming) == (("cat", "dog"), {0: 1, 1: 0, 2: 0})
    assert "classes are the folders in the tar files: cat, dog" in caplog.text
    tar(tmp_path / "b.tar", {f"{around}eel/3.png": png(3)})
    source = open_images(tmp_path, streaming=streaming)
    assert (source.class_names, labels_by_number(source)) == (("cat", "dog", "eel"), {0: 1, 1: 0, 2: 0, 3: 2})


def test_what_is_not_read_beside_unlabelled_pictures_is_said(tmp_path, caplog):
    rows = {f"{n}.{key}": data for n in range(3) for key, data in (("jpg", png(n)), ("json", b'{"kind": "a", "w": 4}'))}
    assert not open_images(tar(tmp_path / "a.tar", rows)).is_labelled
    assert ".json (.json has kind, w) is not read" in caplog.text
    caplog.clear()
    assert open_images(tar(tmp_path / "b.tar", rows), label_column="kind").class_names == ("a",)
    assert "not read" not in caplog.text
    open_images(tar(tmp_path / "c.tar", {"0.jpg": png(0), "0.txt": b"a cat"}))
    assert ".txt is not read" in caplog.text


def test_one_folder_or_images_beside_folders_are_no_classes(tmp_path, caplog):
    assert opened(tmp_path, {"a/0.png": png(0), "a/b/1.png": png(1)}) == (("image",), {0: 0, 1: 0})
    assert not caplog.records
    assert opened(tmp_path, {"a/0.png": png(0), "b/1.png": png(1), "2.png": png(2)})[1] == {0: 0, 1: 0, 2: 0}
    assert "beside the class folders" in caplog.text
    labelled = {"a/0.png": png(0), "a/0.cls": b"1", "b/1.png": png(1), "b/1.cls": b"0.0"}
    assert opened(tmp_path, labelled)[1] == {0: 1, 1: 0}


SHOTS = [f"Screenshot 2024-01-02 at 10.15.3{n}.png" for n in range(4)]
DOTTED = {
    "screenshots": SHOTS,
    "letters": ["000.png", "001.png", "IMG.a.png", "IMG.b.png", "IMG.c.png"],
    "copies": ["a.jpg", "a.1.jpg", "a.2.jpg", "b.jpg", "b.1.jpg"],
    "versions": ["v1.0.png", "v1.1.png", "v2.0.png", "v2.1.JPG"],
    "folders": ["x/a.b.c.png", "x/a.b.d.png", "x.y/a.b.png", "x.y/c.png"],
}


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("name", DOTTED)
def test_pictures_with_dots_in_their_names_are_samples(tmp_path, name, streaming, caplog):
    source = open_images(tar(tmp_path / "a.tar", {n: png(i) for i, n in enumerate(DOTTED[name])}), streaming=streaming)
    assert sorted(labels_by_number(source)) == list(range(len(DOTTED[name])))
    assert "several pictures" not in caplog.text


def test_labels_go_with_pictures_that_have_dots_in_their_names(tmp_path):
    members = {}
    for n, shot in enumerate(SHOTS):
        members |= {shot.replace(".png", ".cls"): str(n % 2).encode(), shot: png(n)}
    assert opened(tmp_path, members)[1] == {0: 0, 1: 1, 2: 0, 3: 1}
    members = {
        f"a.{n}.{ending}": data for n in range(4) for ending, data in (("png", png(n)), ("json", b'{"label": 1.0}'))
    }
    assert opened(tmp_path, members)[1] == dict.fromkeys(range(4), 1)


def test_pictures_beside_a_photo_are_no_samples_and_are_said_to_be_passed_over(tmp_path, caplog):
    members = {f"{n}.{key}": png(n + plus) for n in range(3) for key, plus in (("jpg", 0), ("seg.png", 100))}
    assert sorted(opened(tmp_path, members)[1]) == [0, 1, 2]
    assert ".jpg is read and .seg.png is not" in caplog.text
    assert sorted(opened(tmp_path, members, image_column="seg.png")[1]) == [100, 101, 102]
    caplog.clear()
    assert sorted(opened(tmp_path, {"0.png": png(0), "1.png": png(1), "1.jpg": png(2)})[1]) == [0, 1]
    assert ".png is read and .jpg is not" in caplog.text


def test_pictures_of_one_name_are_samples_and_are_said_to_be(tmp_path, caplog):
    pairs = {f"{n}.{key}": png(n + plus) for n in range(3) for key, plus in (("rgb.png", 0), ("depth.png", 100))}
    assert sorted(opened(tmp_path, pairs)[1]) == [0, 1, 2, 100, 101, 102]
    assert "pictures of one name, .depth.png and .rgb.png, are samples of their own" in caplog.text
    assert sorted(opened(tmp_path, pairs, image_column="rgb.png")[1]) == [0, 1, 2]
    labelled = pairs | {f"{n}.cls": b"%d" % n for n in range(3)}
    members = {name: labelled[name] for name in sorted(labelled)}
    assert "name the ending of the images" in refusal(tar(tmp_path / "b.tar", members))


@pytest.mark.parametrize("label", ["cls", "json", "meta.json"])
def test_a_label_is_of_the_only_picture_beside_it(tmp_path, label):
    members = {}
    for n in range(2):
        members |= {f"{n}.{label}": b"%d" % n if label == "cls" else b'{"label": %d}' % n, f"{n}.rgb.png": png(n)}
    assert opened(tmp_path, members)[1] == {0: 0, 1: 1 if label != "meta.json" else 0}
