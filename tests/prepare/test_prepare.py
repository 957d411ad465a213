"""What `python -m jit_accel.prepare` writes, and that training reads it."""

import csv
import io
import json
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import tar
from helpers import train_here
from PIL import Image
from prepare_samples import (
    BAD,
    BY_KEY,
    CLASSES,
    FORMATS,
    GOOD,
    ORIGINALS,
    SIZE,
    Prepared,
    contents,
    label_of,
    make_sources,
    picture,
    prepare,
)

from jit_accel.base.errors import UserError
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.batches.loader import build_loader
from jit_accel.data.formats.prepared import PixelStore, read_index
from jit_accel.data.formats.sources import open_images
from jit_accel.data.reading.content import content_key, file_key
from jit_accel.data.reading.decode import center_crop, decode_image
from jit_accel.prepare import main, output, preview, run
from jit_accel.prepare.output import verify
from jit_accel.prepare.settings import PrepareConfig


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


def rows_of(store: Path) -> list[tuple[int, int, np.ndarray]]:
    """(key, label, pixels) of all images of a store, in their order."""
    images = open_images(store, streaming=None if "uint8" in store.name else False).images
    pixels = np.empty((len(images), 3, SIZE, SIZE), np.uint8)
    labels, bad = images.read(np.arange(len(images)), pixels)
    assert bad == {}
    keys = images.keys() if isinstance(images, PixelStore) else np.array(images.dataset["key"][:], np.uint64)
    return list(zip(keys.tolist(), labels.tolist(), pixels))


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory) -> Prepared:
    return Prepared(sources, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def stores(prepared) -> dict[str, Path]:
    """The folder in every format."""
    return {format: prepared("folder", format) for format in FORMATS}


pytestmark = pytest.mark.usefixtures("hf_cache")


# --- what is stored


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
def test_every_image_is_stored_once_with_its_class_and_key(prepared, kind, format):
    store = prepared(kind, format)
    index, rows = read_index(store), rows_of(store)
    assert sorted(BY_KEY[key] for key, *_ in rows) == GOOD
    assert all(label == label_of(BY_KEY[key]) for key, label, _ in rows)
    assert (index["num_images"], index["num_skipped"], index["encoding"]) == (len(GOOD), len(BAD), format)
    names = CLASSES if kind != "tars" else ("0", "1", "2")
    assert tuple(index["class_names"]) == open_images(store).class_names == names
    assert list(index["class_counts"].values()) == [19, 20, 19]
    for key, _, pixels in rows:
        exact = decode_image(ORIGINALS[BY_KEY[key]], SIZE)
        if format in ("jpeg", "webp"):  # WebP halves the resolution of colour, of which there is much here
            assert np.abs(pixels.astype(int) - exact).mean() < (6 if format == "jpeg" else 15)
        else:
            assert (pixels == exact).all()


@pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
def test_bad_images_are_left_out_and_named_with_the_reason(sources, prepared, kind):
    skipped = read_index(prepared(kind, "uint8"))["skipped"]
    assert [Path(image["name"]).name for image in skipped] == ["007.jpg", "040.jpg"]
    assert skipped[1]["reason"].endswith("not an image")
    if kind == "folder":
        assert [image["name"] for image in skipped] == ["ant/007.jpg", "cäsar/040.jpg"]
    assert str(sources[kind]) not in json.dumps(skipped)


def test_names_and_keys_are_kept_also_by_preparing_twice(stores, tmp_path):
    for format in ("uint8", "raw", "png"):
        prepare(stores[format], tmp_path / format, "--format", "uint8", "--seed", "3", "--img_size", "8")
        images = open_images(tmp_path / format).images
        for key, name in zip(images.keys().tolist(), images.names()):
            assert name == f"{CLASSES[label_of(BY_KEY[key])]}/{BY_KEY[key]:03d}.jpg"


def test_content_keys_of_files_and_of_bytes_agree(tmp_path):
    for size in (0, 1, 4095, 4096, 4097, 10_000):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "file").write_bytes(data)
        assert file_key(tmp_path / "file") == content_key(data) < 2**64
    assert len({content_key(bytes(n)) for n in range(3)}) == 3


def test_the_order_is_shuffled_over_everything_and_follows_from_the_seed(sources, prepared, tmp_path):
    prepare(sources["folder"], tmp_path / "uint8")
    stores = prepared("folder", "uint8"), tmp_path / "uint8", prepared("folder", "uint8", "--seed", "1")
    first, again, other = ([BY_KEY[key] for key, *_ in rows_of(store)] for store in stores)
    assert first == again != other
    assert sorted(first) == sorted(other)
    # A third of the neighbours would be of one class by chance; in the folder nearly all are.
    same = np.mean([label_of(a) == label_of(b) for a, b in pairwise(first)])
    assert same < 0.6
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.4


@pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
@pytest.mark.parametrize("format", ["uint8", "jpeg"])
def test_the_files_do_not_depend_on_the_number_of_workers(sources, prepared, tmp_path, kind, format):
    prepare(sources[kind], tmp_path, "--format", format, "--num_workers", "1")
    assert contents(tmp_path) == contents(prepared(kind, format))


def test_shards_are_many_and_of_a_size_where_there_are_images_enough():
    for format, count, expected in (("uint8", 10, 1), ("jpeg", 640, 5), ("jpeg", 10_000, 16), ("raw", 100_000, 74)):
        config = PrepareConfig(img_size=256, format=format)
        assert -(-count // config.images_a_shard(count)) == pytest.approx(expected, abs=1)


def test_row_groups_are_small_and_known_to_streams(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "ROW_GROUP_IMAGES", 5)
    index = prepare(sources["folder"], tmp_path / "out", "--format", "raw", "--shard_images", "30")
    assert [shard["row_groups"][:-1] for shard in index["shards"]] == [[5] * 5] * 2
    monkeypatch.setattr(output, "ROW_GROUP_BYTES", 2 * 3 * SIZE**2 + 1)
    index = prepare(sources["folder"], tmp_path / "out2", "--format", "raw", "--shard_images", "30")
    assert max(rows for shard in index["shards"] for rows in shard["row_groups"]) == 2
    images = open_images(tmp_path / "out2").images
    assert images.num_units == len(images.sizes) == sum(len(shard["row_groups"]) for shard in index["shards"])
    assert images.sizes.sum() == len(GOOD)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_hf_datasets_reads_a_store_as_images_with_classes(stores, format, tmp_path):
    dataset = datasets.load_dataset(str(stores[format]), split="train", cache_dir=str(tmp_path))
    assert dataset.features["label"].names == list(CLASSES)
    assert len(dataset) == len(GOOD)
    assert (dataset[0]["image"].size, dataset[0]["image"].mode) == ((SIZE, SIZE), "RGB")


def test_pictures_to_look_at(stores, sources, tmp_path, monkeypatch):
    with Image.open(stores["uint8"] / "preview.png") as sheet, Image.open(stores["png"] / "preview.png") as same:
        assert sheet.size[0] > 8 * SIZE
        assert sheet.tobytes() == same.tobytes()
    monkeypatch.setattr(run, "draw_classes", preview.draw_classes)
    prepare(sources["folder"], tmp_path)
    with Image.open(tmp_path / "classes.png") as chart:
        chart.verify()


def test_images_without_classes(tmp_path):
    rows = [{"bytes": picture(n), "path": None} for n in range(6)]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"image": pa.array(rows, schema.field("image").type)}).cast(schema), tmp_path / "a.parquet")
    for format in ("uint8", "png"):
        index = prepare(tmp_path / "a.parquet", tmp_path / format, "--format", format)
        assert (index["is_labelled"], index["class_counts"]) == (False, {"image": 6})
        source = open_images(tmp_path / format)
        assert (source.is_labelled, source.num_classes) == (False, 1)
        loader = build_loader(source, img_size=SIZE, batch_size=4, seed=0)
        assert next(loader).labels.tolist() == [0] * 4


def test_webp_of_quality_100_is_lossless(sources, tmp_path):
    prepare(sources["folder"], tmp_path / "out", "--format", "webp", "--quality", "100")
    for key, _, pixels in rows_of(tmp_path / "out"):
        assert (pixels == decode_image(ORIGINALS[BY_KEY[key]], SIZE)).all()


def test_the_fast_crop_is_close_and_decodes_large_jpegs_smaller():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    smooth.resize((800, 600), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    for size in (64, 256, 512, 640):
        exact, fast = (decode_image(buffer.getvalue(), size, fast=fast).astype(int) for fast in (False, True))
        assert 0 < np.abs(exact - fast).mean() < 2


# --- reading


def test_any_indices_are_read_as_the_array_has_them(stores):
    images = open_images(stores["uint8"]).images
    everything = np.concatenate([np.load(stores["uint8"] / file) for file, *_ in images.shards])
    assert len(images.shards) > 3
    assert not open_images(stores["uint8"]).is_encoded
    for indices in ([0], [8, 9, 10], [57, 0, 57, 23], [3, 3, 1], list(range(58))):
        out = np.empty((len(indices), 3, SIZE, SIZE), np.uint8)
        labels, bad = images.read(np.array(indices), out)
        assert (out == everything[indices]).all()
        assert bad == {}
        assert labels.tolist() == [label_of(BY_KEY[images.keys()[i].item()]) for i in indices]
    copy = pickle.loads(pickle.dumps(images))
    assert copy == images
    assert copy.read(np.array([5]), out[:1])[0] == images.labels()[5]


def test_reading_never_changes_the_files_and_holds_none_open(stores):
    images = open_images(stores["uint8"]).images
    images.read(np.arange(len(images)), np.empty((len(images), 3, SIZE, SIZE), np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        images._pixels(0)[0] = 0
    with os.scandir("/proc/self/fd") as descriptors:
        assert not [entry.name for entry in descriptors if os.readlink(entry.path).endswith(".npy")]


def test_smaller_images_are_adms_crop_of_the_stored_ones_and_larger_ones_are_refused(stores):
    for format in ("uint8", "raw", "png"):
        source = open_images(stores[format])
        assert source.img_size == SIZE
        batch = next(build_loader(source, img_size=5, batch_size=4, seed=0, horizontal_flip=False))
        exact = {
            np.asarray(center_crop(Image.fromarray(pixels.transpose(1, 2, 0)), 5)).tobytes()
            for *_, pixels in rows_of(stores["uint8"])
        }
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in batch.images} <= exact
        with pytest.raises(UserError, match=r"img_size 17: the images of .* were prepared with 16 px"):
            build_loader(source, img_size=17, batch_size=4, seed=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_complete_also_after_a_resume(stores, format, num_workers):
    source = open_images(stores[format])
    how = {"img_size": SIZE, "seed": 1, "horizontal_flip": False, "num_workers": num_workers}

    def take(loader, count):
        return [image.numpy().tobytes() for _ in range(count) for image in next(loader).images]

    first, resumed = (build_loader(source, batch_size=2, **how) for _ in range(2))
    seen = take(first, 10)
    resumed.load_state_dict([first.state_dict()])
    rest = take(resumed, 19)
    assert rest[:6] == take(first, 3)
    assert len({*seen, *rest}) == len(GOOD) == len(seen + rest)
    for loader in (first, resumed):
        loader.close()


@pytest.mark.parametrize("format", ["uint8", "jpeg"])
def test_the_holdout_is_the_same_before_and_after_preparation(sources, stores, format):
    how = {"max_images": 20, "img_size": SIZE}
    _, before = split_holdout(open_images(sources["folder"]), 0.3, **how)
    rest, after = split_holdout(open_images(stores[format]), 0.3, **how)
    assert len(before.keys) > 5
    # a damaged file has a key as well, and takes a place before it is found to be damaged
    assert set(before.keys.tolist()) <= set(after.keys.tolist())
    assert rest.num_images + sum(key < 0.3 * 2**64 for key in BY_KEY) == len(GOOD)
    loader = build_loader(rest, img_size=SIZE, batch_size=2, seed=0, horizontal_flip=False)
    held = {image.numpy().tobytes() for image in after.images}
    for _ in range(rest.num_images // 2):
        assert held.isdisjoint(image.numpy().tobytes() for image in next(loader).images)


@pytest.mark.parametrize("format", ["uint8", "jpeg"])
def test_training_runs_on_a_store(sources, tmp_path, format):
    store = tmp_path / "store"
    prepare(sources["folder"], store, "--img_size", "28", "--format", format)
    assert train_here("--data_path", str(store), "--output_dir", str(tmp_path / "run"), "--max_steps", "2") == 0


def test_the_fingerprint_is_that_of_the_contents(prepared, sources, tmp_path):
    prepare(sources["folder"], tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    stores = prepared("folder", "uint8"), tmp_path / "b", prepared("folder", "uint8", "--seed", "1")
    prints = [open_images(store).fingerprint for store in stores]
    assert prints[0] == prints[1] != prints[2]


def changed_index(stores, tmp_path, format, change) -> Path:
    """A copy of a store with another index."""
    store = tmp_path / "copy"
    shutil.copytree(stores[format], store)
    index = json.loads((store / "index.json").read_text())
    change(index)
    (store / "index.json").write_text(json.dumps(index))
    return store


def set_in(*path):
    """A change of an index: `path` is where and, at its end, what; None removes it."""
    *parents, name, value = path

    def change(index):
        for parent in parents:
            index = index[parent]
        if value is None:
            del index[name]
        else:
            index[name] = value

    return change


DAMAGES = {
    "shards is missing": ("png", set_in("shards", None)),
    "shards is no list": ("png", set_in("shards", {"file": "a"})),
    "shards is empty": ("png", set_in("shards", [])),
    "shards is no list of": ("png", set_in("shards", 0, "shard-00000.parquet")),
    "file is missing": ("png", set_in("shards", 0, "file", None)),
    "bytes is no": ("png", set_in("shards", 0, "bytes", "12")),
    "sha256 is missing": ("uint8", set_in("shards", 0, "table", "sha256", None)),
    "table is missing": ("uint8", set_in("shards", 0, "table", None)),
    "table is no object": ("uint8", set_in("shards", 0, "table", [])),
    "row_groups is missing": ("png", set_in("shards", 0, "row_groups", None)),
    "row_groups is no list of": ("png", set_in("shards", 0, "row_groups", [True])),
    "images is no natural number": ("png", set_in("shards", 0, "images", -1)),
    "img_size is no": ("uint8", set_in("img_size", 16.0)),
    "num_bytes is no": ("uint8", set_in("num_bytes", True)),
    "is_labelled is missing": ("uint8", set_in("is_labelled", None)),
    "class_names is no list of": ("uint8", set_in("class_names", [1, 2, 3])),
    "settings is missing": ("raw", set_in("settings", None)),
    "encoding is missing": ("raw", set_in("encoding", None)),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_an_index_that_lacks_something_is_refused(stores, tmp_path, problem):
    store = changed_index(stores, tmp_path, *DAMAGES[problem])
    for read in (open_images, lambda folder: verify(str(folder))):
        with pytest.raises(UserError) as caught:
            read(store)
        message = str(caught.value)
        assert str(store) in message
        assert "index.json is damaged" in message
        assert problem in message
        assert "again" in message


@pytest.mark.parametrize("place", [("shards", 1, "file"), ("shards", 1, "table", "file")])
@pytest.mark.parametrize("name", ["../{}", "{folder}/{}", "./{}", "", ".", "..", "a\\{}", "C:{}", "{}\0"])
def test_an_index_names_only_files_in_its_folder(stores, tmp_path, place, name):
    file = "shard-00001.parquet"
    shutil.copy(stores["uint8"] / file, tmp_path / file)
    name = name.format(file, folder=stores["uint8"])
    store = changed_index(stores, tmp_path, "uint8", set_in(*place, name))
    with pytest.raises(UserError) as caught:
        open_images(store)
    assert f"data_path {store}" in str(caught.value)
    assert "no name of a file in this folder" in str(caught.value)


# --- what is left out


def test_a_file_lists_what_is_no_image_links_to_nothing_and_is_there_twice(tmp_path, capsys):
    photos = tmp_path / "photos"
    content = {"a/1.png": picture(1), "a/more/copy.png": picture(1), "a/2.png": picture(2), "b/3.png": picture(3)}
    for name, data in (content | {"b/bad.png": b"none", "b/notes.txt": b"", "stray.png": picture(4)}).items():
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(data)
    (photos / "b" / "dead.jpg").symlink_to(tmp_path / "gone.jpg")
    expected = {
        "file": "problem",
        "a/more/copy.png": "a copy of a/1.png",
        "b/bad.png": "not an image",
        "b/dead.jpg": "a link to nothing",
        "b/notes.txt": "no image, by its ending",
        "stray.png": "no class",
    }
    for format in ("uint8", "jpeg"):
        assert prepare(photos, tmp_path / format, "--format", format)["num_images"] == 4
        said = f"5 files are no images, left out, or copies of others: see {tmp_path / format}"
        assert said in capsys.readouterr().out
        with open(tmp_path / format / "problems.csv", encoding="utf-8", newline="") as file:
            problems = dict(csv.reader(file))
        assert list(problems) == list(expected)
        assert all(reason in problems[name] for name, reason in expected.items())


def test_a_file_lists_what_is_left_out_with_the_reason(tmp_path):
    def problems(name, content, *flags):
        for file, data in content.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(data)
        prepare(tmp_path / name, tmp_path / f"{name}-out", *flags)
        with open(tmp_path / f"{name}-out" / "problems.csv", encoding="utf-8", newline="") as file:
            return dict(csv.reader(file))

    pictures = {f"{n}.png": picture(n) for n in range(4)}
    rows = b"file_name,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,test\n"
    found = problems("listed", {**pictures, "metadata.csv": rows})
    assert found == {"file": "problem", "2.png": "of another split", "3.png": "not listed in the metadata"}
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "gone").symlink_to(tmp_path / "nowhere")
    broken = {"test/metadata.csv": b"file_name,label\n0.png,\xff\n"}
    content = {f"{part}/{name}": data for part in ("train/a", "train/b", "test") for name, data in pictures.items()}
    assert problems("folders", content | {"train/s.png": picture(9)}) == {
        "file": "problem",
        "gone": "a link to nothing",
        "train/s.png": "in no class folder, as others are",
        **{f"test/{name}": "of another split" for name in pictures},
        **{
            f"train/b/{n}.png": f"a copy of train/a/{n}.png (the same size, beginning and end); both are stored"
            for n in range(4)
        },
    }
    rows = b"file_name,label\n0.png,a\n1.png,b\n2.png,a\n3.png,b\n"
    content = {f"{part}/{name}": data for part in ("train", "test") for name, data in pictures.items()}
    found = problems("broken", content | broken | {"train/metadata.csv": rows})
    assert set(found.values()) == {"problem", "of another split"}


def test_copies_of_the_same_name_are_listed(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / "d" / name, {"0.png": picture(0), f"{name}.png": picture(ord(name[0]))})
    assert prepare(tmp_path / "d", tmp_path / "out")["num_images"] == 4
    _, row = (tmp_path / "out" / "problems.csv").read_text(encoding="utf-8").splitlines()
    assert row.startswith('0.png,"a copy of another image of this name ')


def test_an_empty_member_of_a_tar_is_listed_as_empty(tmp_path):
    members = {"0.png": picture(0), "1.png": b""}
    index = prepare(tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert index["skipped"] == [{"name": "1.png", "reason": "empty"}]


def test_a_store_whose_folders_were_sorted_as_text_is_not_gone_on_with(tmp_path, capsys):
    for n in range(11):
        (tmp_path / "d" / str(n)).mkdir(parents=True)
        (tmp_path / "d" / str(n) / "0.png").write_bytes(picture(n))
    index = prepare(tmp_path / "d", tmp_path / "out")
    assert index["class_names"] == [str(n) for n in range(11)]
    assert prepare(tmp_path / "d", tmp_path / "out") == index
    del index["settings"]["class_names"]
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    flags = ("--data_path", str(tmp_path / "d"), "--output_dir", str(tmp_path / "out"), "--img_size", str(SIZE))
    assert main([*flags, "--shard_images", "9"]) == 2
    assert "are now sorted as numbers" in capsys.readouterr().err
