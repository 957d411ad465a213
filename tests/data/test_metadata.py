"""metadata.csv and metadata.jsonl label the images of a folder, as HF's imagefolder reads them."""

import json

import datasets
import numpy as np
import pytest
import yaml
from data_samples import image_folder, labels_by_number, numbers_in, png, refusal
from helpers import train_here

from jit_accel.data import open_images
from jit_accel.train.results import describe_data


@pytest.fixture
def photos(tmp_path):
    """Images 0 to 5, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(6):
        (folder / ("more" if number == 5 else "") / f"{number}.png").write_bytes(png(number))
    return folder


def write_csv(folder, *lines):
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_jsonl(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


@pytest.mark.parametrize("write", ["csv", "jsonl"])
def test_text_labels_are_classes_in_the_order_of_their_names(photos, write):
    names = ["owl", "ant", "owl", "bee, or wasp", "ant", "owl"]
    files = [*(f"{n}.png" for n in range(5)), "more/5.png"]
    if write == "csv":
        write_csv(photos, "file_name,label", *(f'{file},"{name}"' for file, name in zip(files, names)))
    else:
        write_jsonl(photos, *({"file_name": file, "label": name} for file, name in zip(files, names)))
    source = open_images(photos)
    assert (source.class_names, source.max_label, source.is_labelled) == (("ant", "bee, or wasp", "owl"), 2, True)
    assert (source.num_images, source.format, source.streaming) == (6, "folder", False)
    assert labels_by_number(source) == {0: 2, 1: 0, 2: 2, 3: 1, 4: 0, 5: 2}


def test_labels_are_those_that_hf_reads(photos, tmp_path):
    write_csv(photos, "file_name,text,label", *(f"{n}.png,hello,{n * n}" for n in range(5)), "more/5.png,x,7")
    source = open_images(photos)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(tmp_path / "hf"))
    theirs = {numbers_in([picture_planes(row["image"])])[0]: row["label"] for row in theirs}
    assert labels_by_number(source) == theirs


def picture_planes(image):
    return np.asarray(image).transpose(2, 0, 1)


def test_whole_numbers_stay_what_they_are(photos):
    write_csv(photos, "label,file_name", *(f"{n + 3},{n}.png" for n in range(5)), "0,more/5.png")
    source = open_images(photos)
    assert source.class_names == tuple(map(str, range(8)))
    assert labels_by_number(source) == {0: 3, 1: 4, 2: 5, 3: 6, 4: 7, 5: 0}


@pytest.mark.parametrize("column", ["label", "class", "category", "target"])
def test_the_column_of_labels_is_recognised_or_chosen(photos, column):
    write_csv(photos, f"file_name,id,{column}", *(f"{n}.png,{5 - n},{n % 2}" for n in range(5)), "more/5.png,9,1")
    assert labels_by_number(open_images(photos)) == {n: n % 2 for n in range(6)}
    assert labels_by_number(open_images(photos, label_column="id")) == {0: 5, 1: 4, 2: 3, 3: 2, 4: 1, 5: 9}


def test_metadata_wins_over_the_names_of_folders(tmp_path):
    image_folder(tmp_path, 4)
    write_csv(tmp_path, "file_name,label", "c0/0000.png,b", "c0/0001.png,a", "c1/0002.png,a", "c1/0003.png,b")
    source = open_images(tmp_path)
    assert source.class_names == ("a", "b")
    assert labels_by_number(source) == {0: 1, 1: 0, 2: 0, 3: 1}


def test_metadata_in_subfolders_speaks_for_them(tmp_path):
    image_folder(tmp_path, 4)
    write_csv(tmp_path / "c0", "file_name,label", "0000.png,5", "./0001.png,6")
    write_jsonl(tmp_path / "c1", *({"label": n, "file_name": f"{n:04d}.png"} for n in (2, 3)))
    assert labels_by_number(open_images(tmp_path)) == {0: 5, 1: 6, 2: 2, 3: 3}


def test_numbers_in_one_file_and_text_in_another_are_text(tmp_path):
    image_folder(tmp_path, 2)
    write_csv(tmp_path / "c0", "file_name,label", "0000.png,5")
    write_csv(tmp_path / "c1", "file_name,label", "0001.png,five")
    assert open_images(tmp_path).class_names == ("5", "five")


def test_without_labels_the_images_are_unlabelled_whatever_their_folders(tmp_path, caplog):
    image_folder(tmp_path, 4)
    write_jsonl(tmp_path, *({"file_name": f"c{n // 2}/{n:04d}.png", "text": "a photo"} for n in range(4)))
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text().replace('"text"', '"caption"'))
    source = open_images(tmp_path)
    assert (source.is_labelled, source.class_names, source.max_label) == (False, (tmp_path.name,), 0)
    assert labels_by_number(source) == dict.fromkeys(range(4), 0)
    assert "no column of labels (caption)" in caplog.text
    assert open_images(tmp_path, label_column="caption").class_names == ("a photo",)


def test_listed_files_that_are_missing_are_skipped_counted_and_named(photos, caplog):
    lines = [*(f"{n}.png,{n % 2}" for n in range(4)), *(f"gone{n}.png,x7" for n in range(5))]
    write_csv(photos, "file_name,label", *lines)
    source = open_images(photos)
    assert labels_by_number(source) == {0: 0, 1: 1, 2: 0, 3: 1}
    assert "5 images listed in metadata.csv are missing: gone0.png, gone1.png, gone2.png" in caplog.text
    assert "2 images not listed in metadata.csv are left out" in caplog.text


def test_an_image_that_is_listed_twice_counts_once(photos):
    write_csv(photos, "file_name,label", "1.png,b", "0.png,a", "1.png,b")
    assert labels_by_number(open_images(photos)) == {0: 0, 1: 1}
    write_csv(photos, "file_name,label", "1.png,b", "0.png,a", "1.png,a")
    message = refusal(photos)
    assert "lists 1.png with two different labels (1 such images)" in message


def test_changed_labels_are_read_anew_and_change_the_fingerprint(photos):
    write_csv(photos, "file_name,label", "0.png,0", "1.png,1")
    first = open_images(photos)
    write_csv(photos, "file_name,label", "0.png,1", "1.png,0")
    second = open_images(photos)
    assert labels_by_number(second) == {0: 1, 1: 0}
    assert first.fingerprint != second.fingerprint
    assert second.fingerprint == open_images(photos).fingerprint


def test_odd_but_readable_files_are_read(photos):
    text = "\ufefffile_name;x,label\r\n".replace(";x", "") + '".\\more\\5.png","a ""b""\nc"\r\n0.png,NA\r\n'
    (photos / "metadata.csv").write_bytes(text.encode())
    source = open_images(photos)
    assert source.class_names == ("NA", 'a "b"\nc')
    assert labels_by_number(source) == {0: 0, 5: 1}
    (photos / "metadata.csv").unlink()
    rows = '{"file_name": "0.png", "label": 1, "x": 1}\n\n{"file_name": "1.png", "label": 0, "x": "mixed", "y": [1]}'
    (photos / "metadata.jsonl").write_text("\ufeff" + rows, encoding="utf-8")
    assert labels_by_number(open_images(photos)) == {0: 1, 1: 0}


@pytest.mark.parametrize(
    "spell",
    [
        "more//{}",
        "./more/../more/{}",
        "more/./{}",
        "../photos/more/{}",
        "x/..//more/{}",
        ".//more/{}",
        "more\\..\\more\\{}",
    ],
)
def test_paths_are_what_they_lead_to(photos, spell, caplog):
    write_csv(photos, "file_name,label", "0.png,0", f"{spell.format('5.png')},1")
    if spell.startswith("../"):  # out of the folder
        assert open_images(photos).num_images == 1
        assert "1 images listed in metadata.csv are missing" in caplog.text
    else:
        assert labels_by_number(open_images(photos)) == {0: 0, 5: 1}


def test_metadata_in_a_subfolder_may_speak_of_others(photos):
    write_csv(photos / "more", "file_name,label", "../0.png,0", "5.png,1", "../more/../1.png,2")
    assert labels_by_number(open_images(photos)) == {0: 0, 1: 2, 5: 1}


def test_a_repeated_column_does_no_harm_unless_it_is_needed(photos):
    rows = [f"{n}.png,7,8,{n % 2}" for n in range(5)]
    write_csv(photos, "file_name,x,x,label", *rows)
    assert labels_by_number(open_images(photos)) == {n: n % 2 for n in range(5)}
    assert "two columns named 'x'" in refusal(photos, label_column="x")
    write_csv(photos, "file_name,label,label,id", *rows)
    assert "two columns named 'label'" in refusal(photos)
    assert labels_by_number(open_images(photos, label_column="id")) == {n: n % 2 for n in range(5)}


BROKEN = {
    "two columns of names": ("csv", "file_name,file_name,label\n0.png,1.png,1\n", "two columns named 'file_name'"),
    "brackets": ("jsonl", "[" * 200_000, "line 1 is not JSON"),
    "an empty file": ("csv", "", "cannot be read"),
    "no file_name": ("csv", "name,label\n0.png,1\n", "no column 'file_name'"),
    "another separator": ("csv", "file_name;label\n0.png;1\n", "only file_name;label"),
    "a row too long": ("csv", "file_name,label\n0.png,1\n1.png,2,3\n", "metadata.csv: cannot be read"),
    "not UTF-8": ("csv", b"file_name,label\n\xff\xfe.png,1\n", "cannot be read"),
    "only a head": ("csv", "file_name,label\n", "it lists no files"),
    "no JSON": ("jsonl", '{"file_name": "0.png"}\n{nonsense\n', "line 2 is not JSON"),
    "no object": ("jsonl", '["0.png", 3]\n', "line 1 is not like"),
    "a number for a name": ("jsonl", '{"file_name": 3}\n', "line 1 is not like"),
    "no name at all": ("jsonl", '{"label": 3}\n', "no column 'file_name'"),
    "an image without label": ("csv", "file_name,label\n0.png,cat\n1.png,\n", "no label"),
    "a negative label": ("csv", "file_name,label\n0.png,0\n1.png,-1\n", "label -1"),
    "paths from elsewhere": ("csv", "file_name,label\n/data/0.png,1\nimages/0.png,1\n", "none of the 2 files"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_a_file_is_said(photos, kind):
    ending, content, message = BROKEN[kind]
    content = content if isinstance(content, bytes) else content.encode()
    (photos / f"metadata.{ending}").write_bytes(content)
    said = refusal(photos)
    assert message in said
    assert f"metadata.{ending}" in said


def test_a_wrong_column_is_answered_with_the_nearest(photos):
    write_csv(photos, "file_name,species,weight", "0.png,cat,0.5", "1.png,dog,0.7")
    assert "Did you mean 'species'?" in refusal(photos, label_column="specie")
    assert "its type is Value('float64')" in refusal(photos, label_column="weight")
    assert "label_column file_name" in refusal(photos, label_column="file_name")
    (photos / "metadata.csv").unlink()
    assert "without metadata.csv" in refusal(photos, label_column="species")


# Data without labels


def test_what_nothing_tells_apart_is_unlabelled_and_said_to_be(tmp_path):
    image_folder(tmp_path / "many", 4)
    image_folder(tmp_path / "one", 2, classes=1)
    flat = tmp_path / "one" / "c0"
    assert open_images(tmp_path / "many").is_labelled
    assert describe_data(open_images(tmp_path / "many")).endswith("(4 images, 2 classes)")
    for folder in (tmp_path / "one", flat):
        source = open_images(folder)
        assert (source.is_labelled, source.class_names, source.num_classes) == (False, ("c0",), 1)
        assert labels_by_number(source) == {0: 0, 1: 0}
        assert describe_data(source) == f"{folder} (2 images, unlabelled)"


def test_images_beside_a_single_folder_are_kept(tmp_path):
    image_folder(tmp_path, 2, classes=1)
    (tmp_path / "7.png").write_bytes(png(7))
    source = open_images(tmp_path)
    assert (source.is_labelled, source.class_names) == (False, (tmp_path.name,))
    assert labels_by_number(source) == {0: 0, 1: 0, 7: 0}


def test_a_run_on_unlabelled_images_says_so_and_does_not_guide(tmp_path, capsys):
    image_folder(tmp_path / "flat", 8, classes=1)
    out = tmp_path / "run"
    assert train_here("--data_path", str(tmp_path / "flat" / "c0"), "--output_dir", str(out), "--max_steps", "2") == 0
    assert "(8 images, unlabelled), 28 px" in capsys.readouterr().out.splitlines()[0]
    assert yaml.safe_load((out / "config.yaml").read_text())["guidance_scale"] == 1.0
