"""Stores of arrays, of numbers and of several labels: what is read of them is what their source has."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import png, tar
from PIL import Image

import jit_accel as jit
from jit_accel.data.formats.prepared import FACTS_VERSION, STORE_VERSION, read_index
from jit_accel.prepare import main

SIDE, COUNT = 8, 12
DRAWS = np.random.default_rng(0)
CT = ("-1024", "3071")
TAGS = ("cat", "dog", "wet")


def prepare(source, store, *flags):
    sizes = ("--img_size", str(SIDE), "--shard_images", "5", "--num_workers", "2")
    assert main(["--data_path", str(source), "--output_dir", str(store), *sizes, *map(str, flags)]) == 0
    return read_index(store)


def folder_of(root, arrays):
    """Write each array as the only image of a class, by which it is found again."""
    for number, array in enumerate(arrays):
        (root / f"{number:02d}").mkdir(parents=True)
        np.save(root / f"{number:02d}" / "x.npy", array)
    return root


def table_of(root, arrays):
    root.mkdir()
    given = {"image": [array.tolist() for array in arrays], "label": list(range(len(arrays)))}
    pq.write_table(pa.table(given), root / "a.parquet", row_group_size=5)
    return root


def by_label(source, side=SIDE):
    """Return the pixels that a training sees of each image, and of its condition, in the order of the labels."""
    how = {"img_size": side, "batch_size": source.num_images, "horizontal_flip": False}
    batch = next(jit.batches(source, **how))
    parts = [batch.images] if batch.condition is None else [batch.images, batch.condition]
    return [part.numpy()[np.argsort(batch.labels.numpy())] for part in parts]


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        np.testing.assert_array_equal(one, other)


FLOATS = [DRAWS.uniform(-2000, 3500, (SIDE, SIDE, 5)).astype(np.float32) for _ in range(COUNT)]
WHOLE = [DRAWS.integers(-1024, 3072, (SIDE, SIDE), np.int16) for _ in range(COUNT)]
BITS_16 = [DRAWS.integers(0, 65536, (SIDE, SIDE), np.uint16) for _ in range(COUNT)]
GREY = [DRAWS.integers(0, 256, (SIDE, SIDE), np.uint8) for _ in range(COUNT)]
MANY = [DRAWS.integers(0, 256, (SIDE, SIDE, 4), np.uint8) for _ in range(COUNT)]


@pytest.mark.parametrize(
    ("write", "arrays", "channels", "value_range", "formats"),
    [
        (table_of, FLOATS, 5, CT, {"default": "float32", "raw": "float32"}),
        (folder_of, FLOATS, 5, CT, {"default": "float32", "raw": "float32"}),
        (folder_of, WHOLE, 1, CT, {"default": "float32", "int16": "int16", "raw": "float32"}),
        (folder_of, BITS_16, 1, (), {"default": "float32", "uint16": "uint16", "png": "float32", "raw": "float32"}),
        (folder_of, GREY, 1, (), {"default": "uint8", "raw": "uint8", "png": "uint8", "webp": "uint8"}),
        (folder_of, MANY, 4, (), {"default": "uint8", "raw": "uint8"}),
    ],
)
def test_a_training_from_a_store_sees_what_one_from_the_source_does(
    write, arrays, channels, value_range, formats, tmp_path, hf_cache
):
    path = write(tmp_path / "data", arrays)
    flags = ["--in_channels", channels, *(["--value_range", *value_range] if value_range else [])]
    how = {"in_channels": channels, "value_range": tuple(map(float, value_range)) or None}
    wanted = by_label(jit.open_images(path, **how))
    for format, dtype in formats.items():
        more = [] if format == "default" else ["--format", format] + ["--quality", 100] * (format == "webp")
        index = prepare(path, tmp_path / format, *flags, *more)
        assert (index["version"], index["pixels"]["channels"]) == (FACTS_VERSION, channels)
        assert index["pixels"]["dtype"] == dtype
        for given in (how, {"in_channels": channels}):
            same(by_label(jit.open_images(tmp_path / format, **given)), wanted)
        same(
            by_label(jit.open_images(tmp_path / format, in_channels=channels), 4),
            by_label(jit.open_images(tmp_path / "default", in_channels=channels), 4),
        )
        assert main(["--verify", str(tmp_path / format)]) == 0


def test_what_is_scaled_is_float32(tmp_path):
    path = folder_of(tmp_path / "data", [DRAWS.normal(0, 1, (13, 19, 2)).astype(np.float32) for _ in range(3)])
    flags = ("--in_channels", 2, "--value_range", -3, 3)
    prepare(path, tmp_path / "store", *flags)
    wanted = by_label(jit.open_images(path, in_channels=2, value_range=(-3, 3)))
    same(by_label(jit.open_images(tmp_path / "store", in_channels=2)), wanted)
    other = by_label(jit.open_images(path, in_channels=2, value_range=(-2, 1)))
    same(by_label(jit.open_images(tmp_path / "store", in_channels=2, value_range=(-2, 1))), other)


@pytest.mark.parametrize("format", ["float32", "raw"])
def test_conditions_of_other_channels_go_with_arrays(format, tmp_path):
    path = folder_of(tmp_path / "data", FLOATS)
    shown = folder_of(tmp_path / "shown", [DRAWS.integers(0, 65536, (SIDE, SIDE), np.uint16) for _ in FLOATS])
    flags = ("--in_channels", 5, "--value_range", *CT, "--condition_path", shown, "--format", format)
    index = prepare(path, tmp_path / "store", *flags)
    assert index["pixels"]["condition_channels"] == 1
    how = {"in_channels": 5, "value_range": (-1024.0, 3071.0)}
    wanted = by_label(jit.open_images(path, condition_path=shown, **how))
    same(by_label(jit.open_images(tmp_path / "store", **how)), wanted)
    again = ("--in_channels", 5, "--format", "raw" if format == "float32" else "float32")
    prepare(tmp_path / "store", tmp_path / "again", *again)
    same(by_label(jit.open_images(tmp_path / "again", **how)), wanted)


@pytest.mark.parametrize(
    ("arrays", "flags", "rule"),
    [
        (FLOATS, ("--in_channels", 5), "--value_range"),
        (FLOATS, ("--in_channels", 5, "--value_range", *CT, "--format", "png"), "16 bits of 1 channel alone"),
        (FLOATS, ("--in_channels", 5, "--value_range", *CT, "--format", "uint16"), "from 0 to 65535"),
        (FLOATS, ("--in_channels", 5, "--value_range", *CT, "--format", "jpeg"), "numbers of 8 bits"),
        (FLOATS, ("--in_channels", 5, "--value_range", 3, 2), "the smaller one first"),
        (GREY, ("--in_channels", 1, "--format", "float32"), "have 8 bits: use uint8"),
        (MANY, ("--in_channels", 4, "--format", "png"), "holds 1 or 3 channels, and there are 4"),
    ],
)
def test_a_format_that_cannot_hold_the_numbers_is_refused(arrays, flags, rule, tmp_path, capsys):
    path = folder_of(tmp_path / "data", arrays)
    given = ("--data_path", path, "--output_dir", tmp_path / "out", "--img_size", SIDE, *flags)
    assert main(list(map(str, given))) == 2
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_store_is_not_read_as_other_channels_or_another_range(tmp_path):
    prepare(folder_of(tmp_path / "data", GREY), tmp_path / "store", "--in_channels", 1)
    with pytest.raises(jit.UserError, match="prepared with 1: give --in_channels 1"):
        jit.open_images(tmp_path / "store")
    with pytest.raises(jit.UserError, match="prepared with the range 0 255: leave it out"):
        jit.open_images(tmp_path / "store", in_channels=1, value_range=(0, 1))


def facts_table(root, odd=None):
    """Pictures with two columns of numbers and one of lists of labels; `odd` replaces the age of the third."""
    root.mkdir()
    age = [n / 3 if n != 2 or odd is None else odd for n in range(COUNT)]
    given = {
        "image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(COUNT)],
        "tags": [[tag for bit, tag in enumerate(TAGS) if n >> bit & 1] for n in range(COUNT)],
        "key": age,  # a name that stores have for a column of their own
        "pose": [[n, 1e9 + n] for n in range(COUNT)],
    }
    pq.write_table(pa.table(given), root / "a.parquet", row_group_size=5)
    return root


def facts_folder(root, odd=None):
    source = pq.read_table(facts_table(root / "table", odd) / "a.parquet").to_pylist()
    (root / "table" / "a.parquet").unlink()
    (root / "table").rmdir()
    lines = []
    for row in source:
        image = row.pop("image")
        (root / image["path"]).write_bytes(image["bytes"])
        lines.append(json.dumps(row | {"file_name": image["path"]}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def facts_tar(root, odd=None):
    source, members = pq.read_table(facts_table(root, odd) / "a.parquet").to_pylist(), {}
    (root / "a.parquet").unlink()
    for row in source:
        image = row.pop("image")
        members |= {image["path"]: image["bytes"], image["path"].replace("png", "json"): json.dumps(row).encode()}
    tar(root / "a.tar", members)
    return root


def facts_of(source):
    """Return (age, pose, labels) of each image, as a training sees them, by its age."""
    how = {"img_size": 4, "batch_size": source.num_images, "horizontal_flip": False}
    batch = next(jit.batches(source, **how))
    rows = zip(batch.vectors.tolist(), batch.labels.tolist(), batch.images.tolist())
    return sorted((vector, sorted(labels), image) for vector, labels, image in rows)


@pytest.mark.parametrize("write", [facts_folder, facts_table, facts_tar])
def test_numbers_and_several_labels_are_kept(write, tmp_path, hf_cache):
    path = write(tmp_path / "data") if write is not facts_folder else facts_folder(_made(tmp_path / "data"))
    source = jit.open_images(path, vector_column=("key", "pose"), label_column="tags")
    wanted = facts_of(source)
    for format in ("uint8", "raw", "png"):
        flags = ("--vector_column", "key", "pose", "--label_column", "tags", "--format", format, "--img_size", 4)
        index = prepare(path, tmp_path / format, *flags)
        assert index["class_counts"] == {"cat": 6, "dog": 6, "wet": 4}
        for streaming in (None,) if format == "uint8" else (None, False):
            for given in ({}, {"vector_column": ("key", "pose"), "label_column": "tags"}):
                found = jit.open_images(tmp_path / format, streaming=streaming, **given)
                assert (found.class_names, found.most_labels, found.vectors) == (TAGS, 3, source.vectors)
                assert facts_of(found) == wanted
    few = jit.open_images(tmp_path / "uint8", vector_column=("pose",))
    assert few.vectors == jit.open_images(path, vector_column=("pose",)).vectors
    prepare(tmp_path / "uint8", tmp_path / "again", "--format", "raw", "--img_size", 4)
    assert facts_of(jit.open_images(tmp_path / "again")) == wanted


def _made(folder):
    folder.mkdir()
    return folder


def test_an_image_without_its_numbers_is_left_out_and_named(tmp_path):
    index = prepare(facts_table(tmp_path / "data", np.nan), tmp_path / "store", "--vector_column", "key", "pose")
    assert (index["num_images"], index["num_skipped"]) == (COUNT - 1, 1)
    assert "its key is 'nan' and not a finite number" in index["skipped"][0]["reason"]
    source = jit.open_images(tmp_path / "data", vector_column=("key", "pose"))
    assert jit.open_images(tmp_path / "store").vectors == source.vectors


def test_numbers_that_a_store_does_not_have_are_refused(tmp_path):
    path = facts_table(tmp_path / "data")
    prepare(path, tmp_path / "some", "--vector_column", "pose")
    with pytest.raises(jit.UserError, match=r"vector_column key: no column of .*; choose from pose"):
        jit.open_images(tmp_path / "some", vector_column=("key",))
    assert prepare(path, tmp_path / "none")["version"] == STORE_VERSION
    with pytest.raises(jit.UserError, match="prepared without --vector_column"):
        jit.open_images(tmp_path / "none", vector_column=("key",))


def test_the_sheet_shows_channels_beside_each_other(tmp_path):
    prepare(folder_of(tmp_path / "data", FLOATS), tmp_path / "store", "--in_channels", 5, "--value_range", *CT)
    with Image.open(tmp_path / "store" / "preview.png") as sheet:
        assert sheet.width > 8 * 5 * SIDE
        assert np.ptp(np.asarray(sheet), axis=2).max() == 0
    assert (tmp_path / "store" / "shard-00000.npy").stat().st_size == 128 + 5 * 5 * SIDE**2 * 4


def test_16_bits_of_grey_are_png_that_others_read(tmp_path):
    prepare(folder_of(tmp_path / "data", BITS_16), tmp_path / "store", "--in_channels", 1, "--format", "png")
    rows = pq.read_table(tmp_path / "store" / "shard-00000.parquet").to_pylist()
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert image.mode.startswith("I")
            np.testing.assert_array_equal(np.asarray(image), BITS_16[row["label"]])
