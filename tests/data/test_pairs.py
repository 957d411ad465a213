"""Pairs: a picture beside each image, its condition, from whatever kind of data, which stays with it everywhere."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import as_hub, refusal, tar
from datasets import ClassLabel, Dataset, Features, Image
from helpers import DEVICES
from http_server import FailingServer
from PIL import Image as PILImage

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.batch import ready
from jit_accel.data.batches.holdout import held_by_split, split_holdout
from jit_accel.data.batches.ready_batches import batches
from jit_accel.data.formats.prepared import read_index
from jit_accel.data.reading.decode import center_crop, have_one_aspect
from jit_accel.evaluate.image_sets import open_image_set
from jit_accel.prepare import main as prepare
from jit_accel.prepare.encode import Encoded, Spool, write_part

N, SIDE = 20, 8


def pixels(number: int) -> np.ndarray:
    """An image that no mirroring leaves as it is, uint8 (H, W, 3); the first pixel is its number."""
    image = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image[0, [0, -1]] = number
    return image


def encoded(image: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format)
    return buffer.getvalue()


def negative(number: int, format: str = "PNG") -> bytes:
    """The condition of an image: its negative."""
    return encoded(255 - pixels(number), format)


def write(path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def two_folders(root):
    """Images in class folders, and conditions with other endings."""
    for n in range(N):
        write(root / "photos" / f"c{n % 2}" / f"{n:02d}.png", encoded(pixels(n)))
        write(root / "negatives" / f"c{n % 2}" / f"{n:02d}.{'bmp' if n % 3 else 'png'}", negative(n))
    return root / "photos", root / "negatives"


def table(image: bytes | None = None):
    feature = Features({"image": Image(), "shown": Image(), "label": ClassLabel(names=["c0", "c1"])})
    rows = {
        "image": [{"bytes": encoded(pixels(n)), "path": f"{n}.png"} for n in range(N)],
        "shown": [{"bytes": negative(n), "path": f"n{n}.png"} for n in range(N)],
        "label": [n % 2 for n in range(N)],
    }
    schema = feature.arrow_schema
    return pa.table({name: pa.array(rows[name], schema.field(name).type) for name in rows}, schema=schema)


def by_folders(root):
    photos, negatives = two_folders(root)
    return open_images(photos, condition_path=negatives)


def by_metadata(root, name):
    for n in range(N):
        write(root / name / "in" / f"{n:02d}.bmp", negative(n, "BMP"))
        write(root / name / f"{n:02d}.png", encoded(pixels(n)))
    rows = [{"file_name": f"{n:02d}.png", "target": f"in/{n:02d}.bmp", "label": f"c{n % 2}"} for n in range(N)]
    if name == "csv":
        text = "file_name,target,label\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    write(root / name / f"metadata.{name}", text.encode())
    return open_images(root / name, condition_column="target")


def by_parquet(root, **how):
    for shard, (start, end) in enumerate([(0, 7), (7, 8), (8, N)]):
        (root / "parquet").mkdir(exist_ok=True)
        pq.write_table(table().slice(start, end - start), root / "parquet" / f"{shard}.parquet", row_group_size=4)
    return open_images(root / "parquet", condition_column="shown", **how)


def by_saved_table(root):
    Dataset(table()).save_to_disk(root / "saved")
    return open_images(root / "saved", condition_column="shown")


def by_tars(root, **how):
    for shard, numbers in enumerate([range(9), range(9, N)]):
        members = {}
        for n in numbers:
            members |= {f"{n:02d}.png": encoded(pixels(n)), f"{n:02d}.cond.png": negative(n)}
            members[f"{n:02d}.cls"] = b"%d" % (n % 2)
        tar(root / "tar" / f"{shard}.tar", members)
    return open_images(root / "tar", condition_column=".cond.png", **how)


def by_urls(root, open_local, pattern, column):
    """What the server has goes on being read while tests run: it ends with the process."""
    folder = Path(open_local(root).name)
    return open_images(f"{FailingServer(folder).url}/{pattern}", condition_column=column)


def prepared(root, format, *flags, of=two_folders):
    """Conditions are found again in what is prepared, without a word."""
    data, condition = of(root)
    which = "--condition_column" if isinstance(condition, str) else "--condition_path"
    flags = (*flags, *([which, str(condition)] if condition else []), "--num_workers", "1")
    out = str(root / f"prepared_{format}")
    flags = ("--data_path", str(data), "--img_size", str(SIDE), "--format", format, "--output_dir", out, *flags)
    assert prepare(list(flags)) == 0
    return open_images(out)


def parquet_files(root):
    by_parquet(root)
    return root / "parquet", "shown"


def store(root):
    prepared(root, "uint8")
    return root / "prepared_uint8", None


KINDS = {
    "folders": by_folders,
    "csv": lambda root: by_metadata(root, "csv"),
    "jsonl": lambda root: by_metadata(root, "jsonl"),
    "parquet": by_parquet,
    "parquet_table": lambda root: by_parquet(root, streaming=False),
    "saved": by_saved_table,
    "tar": by_tars,
    "tar_table": lambda root: by_tars(root, streaming=False),
    "parquet_urls": lambda root: by_urls(root, by_parquet, "{0..2}.parquet", "shown"),
    "tar_urls": lambda root: by_urls(root, by_tars, "{0..1}.tar", "cond.png"),
    "uint8": lambda root: prepared(root, "uint8"),
    "uint8_of_stream": lambda root: prepared(root, "uint8", "--shard_images", "6", of=parquet_files),
    "raw": lambda root: prepared(root, "raw", "--shard_images", "9"),
    "raw_of_store": lambda root: prepared(root, "raw", of=store),
    "png": lambda root: prepared(root, "png", "--shard_images", "9"),
    "webp_of_stream": lambda root: prepared(root, "webp", "--quality", "100", of=parquet_files),
}


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    """The same twenty pairs in every kind of data."""
    return KINDS[request.param](tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def loaders():
    """Build loaders that are closed after the test."""
    opened = []

    def build(source, **changes):
        how = {"img_size": SIDE, "batch_size": 3, "seed": 11, "shuffle_buffer": 4} | changes
        opened.append(build_loader(source, **how))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def test_every_kind_has_the_same_pairs(source, loaders):
    assert (source.channels, source.condition_channels, source.num_images) == (6, 3, N)
    batch = next(loaders(source, batch_size=N, horizontal_flip=False))
    numbers = batch.images[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(N))
    assert batch.labels.tolist() == [number % 2 for number in numbers]
    for number, pair in zip(numbers, batch.images):
        assert np.array_equal(pair[:3].permute(1, 2, 0), pixels(number))
        assert torch.equal(pair[3:], 255 - pair[:3])


def test_both_pictures_of_a_pair_are_mirrored_together(source):
    with_flips, without = (
        next(batches(source, img_size=SIDE, batch_size=N, horizontal_flip=flip)) for flip in (True, False)
    )
    is_mirrored = (with_flips.images != without.images).flatten(1).any(1)
    assert 0 < is_mirrored.sum() < N
    for batch in (with_flips, without):
        assert batch.images.shape == batch.condition.shape == (N, 3, SIDE, SIDE)
        assert torch.allclose(batch.condition, -batch.images, atol=1e-6)
        assert batch.images.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_both_pictures_of_a_pair_arrive_on_a_device(device, tmp_path):
    photos, negatives = two_folders(tmp_path)
    source = open_images(photos, condition_path=negatives)
    expected, found = (batches(source, img_size=SIDE, batch_size=6, device=where) for where in ("cpu", device))
    with contextlib.closing(expected), contextlib.closing(found):
        for _ in range(8):
            there, here = next(found), next(expected)
            assert there.condition.device.type == device
            assert torch.equal(there.images.cpu(), here.images)
            assert torch.equal(there.condition.cpu(), here.condition)


def test_pairs_come_in_the_same_steps_however_they_are_read(source, loaders):
    first = loaders(source)
    expected = [next(first) for _ in range(12)]
    for changes in ({"num_workers": 1}, {"num_workers": 2}):
        other = loaders(source, **changes)
        assert all(torch.equal(batch.images, next(other).images) for batch in expected)
    resumed, started = loaders(source, num_workers=1), loaders(source)
    for _ in range(5):
        next(started)
    resumed.load_state_dict(started.state_dict())
    assert all(torch.equal(batch.images, next(resumed).images) for batch in expected[5:])
    halves = [loaders(source, rank=rank, world_size=3, batch_size=1) for rank in range(3)]  # one image a process
    state = started.state_dict()
    for loader in halves:
        loader.load_state_dict(state)
    for batch in expected[5:]:
        parts = [next(loader) for loader in halves]
        found = {int(part.positions[0]): part.images[0] for part in parts}
        assert all(torch.equal(found[position], image) for position, image in zip(batch.positions, batch.images))


def test_images_to_compare_with_are_those_without_conditions(source):
    shares = open_image_set(source, "reference", SIDE).shares(7, 0, 1)
    found = {int(image[0, 0, 0]): image for share in shares for image in share.images}
    assert sorted(found) == list(range(N))
    assert all(np.array_equal(image.permute(1, 2, 0), pixels(number)) for number, image in found.items())


def test_what_is_held_out_follows_from_the_images_alone(source, loaders, tmp_path):
    how = {"max_images": N, "img_size": SIDE}
    rest, held = split_holdout(source, 0.3, **how)
    assert 0 < len(held.keys) < N
    assert torch.equal(held.images[:, 3:], 255 - held.images[:, :3])
    photos, _ = two_folders(tmp_path)
    _, alone = split_holdout(open_images(photos), 0.3, **how)
    places, others = alone.keys.argsort(), held.keys.argsort()  # streams are read in their order
    assert alone.keys[places].tolist() == held.keys[others].tolist()
    assert torch.equal(alone.images[places], held.images[others, :3])
    batch = next(loaders(rest, batch_size=rest.num_images, horizontal_flip=False))
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])
    assert not set(batch.images[:, 0, 0, 0].tolist()) & set(held.images[:, 0, 0, 0].tolist())


def test_the_fingerprint_tells_pairs_from_images_and_from_other_pairs(tmp_path):
    photos, negatives = two_folders(tmp_path / "a")
    plain, paired = open_images(photos), open_images(photos, condition_path=negatives)
    assert plain.fingerprint != paired.fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    moved = open_images(tmp_path / "b" / "photos", condition_path=tmp_path / "b" / "negatives")
    assert moved.fingerprint == paired.fingerprint
    next((tmp_path / "b" / "negatives").glob("c*/00.*")).rename(tmp_path / "b" / "negatives" / "c0" / "00.tif")
    other = open_images(tmp_path / "b" / "photos", condition_path=tmp_path / "b" / "negatives")
    assert other.fingerprint != paired.fingerprint
    tables = [by_parquet(tmp_path), open_images(tmp_path / "parquet", image_column="image")]
    assert tables[0].fingerprint != tables[1].fingerprint


def test_bad_partners_are_bad_images_with_names(tmp_path, loaders, caplog):
    photos, negatives = two_folders(tmp_path)
    names = {n: next(negatives.glob(f"c*/{n:02d}.*")) for n in (3, 5, 8)}
    names[3].unlink()
    names[5].write_bytes(b"broken")
    PILImage.new("RGB", (2 * SIDE, SIDE)).save(names[8])
    source = open_images(photos, condition_path=negatives)
    assert "1 of 20 images have no picture of their name there and count as bad ones, as c1/03.png" in caplog.text
    batch = next(loaders(source, batch_size=N))
    assert len(batch.bad_images) == 3
    found = {n: next(text for text in batch.bad_images if f"/{n:02d}.png: " in text) for n in names}
    assert found[3].endswith("its condition is missing")
    assert f"its condition {names[5]}: UnidentifiedImageError" in found[5]
    assert f"its condition {names[8]} has 16 x 8 pixels, another aspect than the image's 8 x 8" in found[8]
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])  # of substitutes, too


def test_bad_partners_in_a_stream_are_named_too(tmp_path, loaders):
    rows = table().to_pylist()
    rows[4]["shown"], rows[9]["shown"]["bytes"] = None, b"broken"
    for n, row in enumerate(rows):
        row["image"]["path"] = f"{n}.png"
    (tmp_path / "bad").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, table().schema), tmp_path / "bad" / "0.parquet", row_group_size=4)
    batch = next(loaders(open_images(tmp_path / "bad", condition_column="shown"), batch_size=N))
    assert sorted(text.partition(":")[0] for text in batch.bad_images) == ["4.png", "9.png"]
    assert any("9.png: its condition n9.png: UnidentifiedImageError" in text for text in batch.bad_images)
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])


def test_a_row_group_of_bad_partners_is_not_all_of_the_data(tmp_path, loaders):
    rows = table().to_pylist()
    for row in rows[:6]:
        row["shown"] = None
    (tmp_path / "bad").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, table().schema), tmp_path / "bad" / "0.parquet", row_group_size=2)
    source = open_images(tmp_path / "bad", condition_column="shown")
    assert len(next(loaders(source, batch_size=N)).bad_images) == 6
    for row in rows:
        row["shown"] = None
    pq.write_table(pa.Table.from_pylist(rows, table().schema), tmp_path / "bad" / "0.parquet", row_group_size=2)
    assert "none of the conditions looked at (20)" in refusal(tmp_path / "bad", condition_column="shown")


def test_a_missing_member_is_a_bad_image_and_dots_in_names_do_no_harm(tmp_path, loaders):
    members = {}
    for n in range(6):
        members[f"shot 10.1{n}.30.png"] = encoded(pixels(n))
        if n != 2:
            members[f"shot 10.1{n}.30.cond.png"] = negative(n)
    source = open_images(tar(tmp_path / "a.tar", members), condition_column="cond.png")
    assert source.num_images == 6
    batch = next(loaders(source, batch_size=6))
    assert batch.bad_images == ["shot 10.12.30.png: its condition is missing"]
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])


def test_conditions_of_another_size_are_resampled_to_the_same_square(tmp_path, loaders):
    for n in range(4):
        grey = PILImage.new("L", (30 + n, 20), 50 * n)
        for side, name in ((1, "small"), (4, "large")):
            (tmp_path / name).mkdir(exist_ok=True)
            grey.resize((round((30 + n) * side / 4), 5 * side)).save(tmp_path / name / f"{n}.png")
    source = open_images(tmp_path / "large", condition_path=tmp_path / "small")
    batch = next(loaders(source, batch_size=4, img_size=16))
    assert not batch.bad_images
    assert torch.equal(batch.images[:, 3:], batch.images[:, :3])


@pytest.mark.parametrize(
    ("size", "other", "is_one"),
    [
        ((100, 100), (101, 100), True),
        ((100, 100), (102, 100), False),
        ((256, 256), (64, 64), True),
        ((101, 75), (25, 19), True),  # a quarter, rounded
        ((28, 28), (28, 29), False),
        ((28, 28), (7, 8), False),
        ((640, 480), (480, 640), False),
        ((3000, 2000), (300, 201), True),
    ],
)
def test_aspects_agree_up_to_a_hundredth_or_the_rounding_of_the_smaller(size, other, is_one):
    assert have_one_aspect(size, other) == have_one_aspect(other, size) == is_one


def test_the_rotation_that_exif_asks_for_counts(tmp_path, loaders):
    for name, size, turn in (("photos", (12, 8), 1), ("turned", (8, 12), 6)):
        (tmp_path / name).mkdir()
        exif = PILImage.Exif()
        exif[0x0112] = turn
        PILImage.new("RGB", size, "red").save(tmp_path / name / "0.jpg", exif=exif)
    source = open_images(tmp_path / "photos", condition_path=tmp_path / "turned")
    assert not next(loaders(source, batch_size=1)).bad_images


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path):
    photos, negatives = two_folders(tmp_path)
    assert "condition_path" in refusal(photos, condition_path=tmp_path / "negative")
    assert "Did you mean 'negatives'" in refusal(photos, condition_path=tmp_path / "negative")
    assert "lies inside" in refusal(tmp_path, condition_path=negatives)
    assert "lies inside" in refusal(photos, condition_path=photos)
    (tmp_path / "empty").mkdir()
    assert "none of the 20 images" in refusal(photos, condition_path=tmp_path / "empty")
    assert "no columns" in refusal(photos, condition_column="shown")
    assert "give only one" in refusal(photos, condition_path=negatives, condition_column="shown")
    for path in negatives.glob("c*/*"):
        PILImage.new("RGB", (2 * SIDE, SIDE)).save(path)
    assert "16 x 8 pixels, another aspect than the image's 8 x 8" in refusal(photos, condition_path=negatives)
    for path in negatives.glob("c*/*"):
        path.write_bytes(b"broken")
    assert "none of the conditions looked at (20) can be used" in refusal(photos, condition_path=negatives)


def test_a_folder_behind_a_link_inside_the_images_is_refused(tmp_path):
    photos, negatives = two_folders(tmp_path)
    (photos / "beside").symlink_to(negatives)
    assert "lies inside" in refusal(photos, condition_path=photos / "beside")


def test_a_partner_may_have_any_ending_and_any_form_of_unicode(tmp_path, loaders):
    photos, negatives = tmp_path / "photos", tmp_path / "negatives"
    names = {0: ("caf\u00e9.jpeg.png", "cafe\u0301.jpeg.webp"), 1: ("a.b.png", "a.b.BMP"), 2: ("x/y.png", "x/y.tif")}
    names[3] = ("x.png", "x.png")
    for n, (image, partner) in names.items():
        write(photos / image, encoded(pixels(n)))
        PILImage.fromarray(255 - pixels(n)).save(place_of(negatives / partner), lossless=True)
    write(negatives / "x.bmp", encoded(pixels(0)))  # beside x.png, which is nearer
    write(negatives / "a.png", encoded(pixels(0)))  # of no image
    source = open_images(photos, condition_path=negatives)
    batch = next(loaders(source, batch_size=4, horizontal_flip=False))
    assert not batch.bad_images
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])


def place_of(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_metadata_names_partners_from_where_it_lies(tmp_path, loaders):
    photos = tmp_path / "photos"
    for n in range(4):
        write(photos / "in" / f"{n}.png", encoded(pixels(n)))
    write(tmp_path / "far" / "0.png", negative(0))
    write(photos / "in" / "beside" / "1.png", negative(1))
    write(photos / "2.png", negative(2))
    lines = f"0.png,{tmp_path / 'far' / '0.png'}", "1.png,beside/1.png", "2.png,..\\2.png", "3.png,"
    write(photos / "in" / "metadata.csv", "\n".join(["file_name,shown", *lines]).encode())
    source = open_images(photos, condition_column="shown")
    assert source.num_images == 4
    assert not source.is_labelled
    batch = next(loaders(source, batch_size=4))
    assert [text.partition("/in/")[2] for text in batch.bad_images] == ["3.png: its condition is missing"]
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])


@pytest.mark.parametrize("kind", ["csv", "parquet", "parquet_table"])
def test_pairs_may_have_numbers_as_well(tmp_path, loaders, kind):
    if kind == "csv":
        by_metadata(tmp_path, "jsonl")
        file = tmp_path / "jsonl" / "metadata.jsonl"
        rows = [json.loads(line) | {"age": float(n)} for n, line in enumerate(file.read_text().splitlines())]
        file.write_text("\n".join(map(json.dumps, rows)))
        source = open_images(file.parent, condition_column="target", vector_column=["age"])
    else:
        write(tmp_path / "t" / "0.parquet", b"")
        numbers = table().append_column("age", pa.array([float(n) for n in range(N)]))
        pq.write_table(numbers, tmp_path / "t" / "0.parquet", row_group_size=6)
        how = {"streaming": kind == "parquet", "vector_column": ["age"]}
        source = open_images(tmp_path / "t", condition_column="shown", **how)
    batch = ready(next(loaders(source, batch_size=N, horizontal_flip=False)), "cpu")
    numbers = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round()
    assert torch.allclose(batch.condition, -batch.images, atol=1e-6)
    assert torch.allclose(batch.vectors[:, 0], (numbers - numbers.mean()) / numbers.std(unbiased=False), atol=1e-5)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_table_may_hold_the_paths_of_its_conditions(tmp_path, loaders, streaming):
    _, negatives = two_folders(tmp_path)
    paths = [str(next(negatives.glob(f"c*/{n:02d}.*"))) for n in range(N)]
    (tmp_path / "t").mkdir()
    pq.write_table(table().set_column(1, "shown", pa.array(paths)), tmp_path / "t" / "0.parquet", row_group_size=6)
    batch = next(loaders(open_images(tmp_path / "t", condition_column="shown", streaming=streaming), batch_size=N))
    assert not batch.bad_images
    assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "imagefolder"])
def test_pairs_of_the_hub(tmp_path, loaders, monkeypatch, kind):
    opened = KINDS[{"parquet": "parquet", "webdataset": "tar", "imagefolder": "csv"}[kind]](tmp_path)
    column = {"parquet": "shown", "webdataset": "cond.png", "imagefolder": "target"}[kind]
    if kind == "imagefolder":  # in whose metadata names of such columns make pictures of them
        file = tmp_path / "csv" / "metadata.csv"
        file.write_text(file.read_text().replace("target", "target_file_name", 1))
    files = sorted(path for path in tmp_path.joinpath(opened.name).rglob("*") if path.is_file())
    as_hub(monkeypatch, kind, *files)
    for streaming in (None, False):
        source = open_images("someone/pairs", condition_column=column, streaming=streaming)
        assert (source.format, source.num_images, source.condition_channels) == ("hub", N, 3)
        batch = next(loaders(source, batch_size=N))
        assert not batch.bad_images
        assert torch.equal(batch.images[:, 3:], 255 - batch.images[:, :3])


def test_splits_have_their_pairs_in_one_folder(tmp_path):
    photos, negatives = two_folders(tmp_path)
    for folder in (photos, negatives):
        (folder / "c0").rename(folder / "train")
        (folder / "c1").rename(folder / "test")
    trained, tested = (open_images(photos, condition_path=negatives, split=split) for split in ("train", "test"))
    held = held_by_split(trained, tested, max_images=N, img_size=SIDE)
    assert sorted(held.images[:, 0, 0, 0].tolist()) == list(range(1, N, 2))
    assert torch.equal(held.images[:, 3:], 255 - held.images[:, :3])


@pytest.mark.parametrize("turn", [1, 6])
def test_a_fast_preparation_knows_the_aspect_of_the_whole_pictures(tmp_path, turn):
    """Decoded at an eighth, 100 x 75 pixels are 13 x 10, which is another aspect than that of 50 x 38."""
    exif = PILImage.Exif()
    exif[0x0112] = turn
    for name, size in (("photos", (100, 75)), ("half", (50, 38))):
        (tmp_path / name).mkdir()
        PILImage.new("RGB", size, "red").save(tmp_path / name / "0.jpg", exif=exif)
    flags = ["--data_path", str(tmp_path / "photos"), "--condition_path", str(tmp_path / "half"), "--resize", "fast"]
    assert prepare([*flags, "--img_size", "8", "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]) == 0
    assert read_index(tmp_path / "out")["num_skipped"] == 0


def test_wrong_columns_are_refused_with_the_right_ones(tmp_path):
    by_parquet(tmp_path)
    parquet = tmp_path / "parquet"
    assert "no such column; choose from image, shown, label" in refusal(parquet, condition_column="shwon")
    assert "conditions are JPEG, PNG" in refusal(parquet, condition_column="label")
    assert "already" in refusal(parquet, condition_column="image", image_column="image")
    captions = table().set_column(1, "caption", pa.array(["a  shoe " * 900] * N))
    write(tmp_path / "captions" / "0.parquet", b"")
    pq.write_table(captions, tmp_path / "captions" / "0.parquet")
    said = refusal(tmp_path / "captions", condition_column="caption")
    assert "none of the conditions looked at (20) can be used, the first: 0.png: its condition " in said
    assert len(said) < 1000
    assert "--condition_column names" in refusal(parquet, condition_path=tmp_path)
    by_metadata(tmp_path, "csv")
    assert "no such column" in refusal(tmp_path / "csv", condition_column="targets")
    assert "none of the 20 files that it names is there" in refusal(tmp_path / "csv", condition_column="label")
    for odd in (3, ["in/00.bmp"], {"path": "in/00.bmp"}, {"a": 1}):
        rows = [{"file_name": f"{n:02d}.png", "odd": odd} for n in range(N)]
        write(tmp_path / "odd" / "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
        for n in range(N):
            write(tmp_path / "odd" / f"{n:02d}.png", encoded(pixels(n)))
        assert "odd" in refusal(tmp_path / "odd", condition_column="odd")
    text = (tmp_path / "csv" / "metadata.csv").read_text()
    (tmp_path / "csv" / "metadata.csv").write_text(text + "00.png,in/01.bmp,c0\n")
    assert "lists 00.png with two of them" in refusal(tmp_path / "csv", condition_column="target")
    (tmp_path / "csv" / "metadata.csv").write_text("file_name,target,target\n00.png,in/00.bmp,in/01.bmp\n")
    assert "two columns named 'target'" in refusal(tmp_path / "csv", condition_column="target")
    by_tars(tmp_path)
    assert "name the ending of the conditions" in refusal(tmp_path / "tar", condition_column="mask.png")
    assert "are no images" in refusal(tmp_path / "tar", condition_column="cls", label_column=None)


def test_a_column_of_conditions_is_neither_image_nor_label(tmp_path, caplog):
    source = by_metadata(tmp_path, "csv")  # whose column target is a name of labels, too
    assert source.class_names == ("c0", "c1")
    assert "left out" not in caplog.text
    flipped = table().rename_columns(["picture", "image", "label"])
    (tmp_path / "p").mkdir()
    pq.write_table(flipped, tmp_path / "p" / "0.parquet")
    columns = open_images(tmp_path / "p", condition_column="image").images.columns
    assert (columns.image, columns.condition) == ("picture", "image")
    members = {}
    for n in range(4):
        members |= {f"{n}.jpg": encoded(pixels(n), "JPEG"), f"{n}.png": negative(n)}
    columns = open_images(tar(tmp_path / "a.tar", members), condition_column="png").images.columns
    assert (columns.image, columns.condition) == ("jpg", "png")


def test_a_store_of_pairs_can_be_read_smaller_or_without_the_conditions(tmp_path, loaders):
    source = prepared(tmp_path, "uint8")
    whole, half = (next(loaders(source, batch_size=N, img_size=side)) for side in (SIDE, SIDE // 2))
    assert half.images.shape == (N, 6, SIDE // 2, SIDE // 2)
    for large, small in zip(whole.images, half.images):
        for part in (slice(3), slice(3, 6)):
            picture = PILImage.fromarray(large[part].permute(1, 2, 0).numpy())
            assert np.array_equal(small[part].permute(1, 2, 0), np.asarray(center_crop(picture, SIDE // 2)))
    for side in (SIDE, SIDE // 2):
        both, alone = (np.empty((N, channels, side, side), np.uint8) for channels in (6, 3))
        source.images.read(np.arange(N), both)
        source.images.read(np.arange(N), alone)
        assert np.array_equal(both[:, :3], alone)


def test_parts_of_an_unfinished_older_preparation_go_with_newer_ones(tmp_path):
    images = [Encoded(b"%d" % n, f"{n}.png", n, n) for n in range(4)]
    write_part(tmp_path / "new", images[2:])
    old = pa.Table.from_pylist([image._asdict() for image in images[:2]]).drop_columns(["condition"])
    types = {name: pa.large_binary() if name == "data" else old.schema.field(name).type for name in old.column_names}
    types["key"] = pa.uint64()
    with pa.ipc.new_file(tmp_path / "old", pa.schema(list(types.items()))) as writer:
        writer.write_table(old.cast(pa.schema(list(types.items()))))
    spool = Spool([tmp_path / "old", tmp_path / "new"])
    assert list(spool.images_at(np.arange(4))) == images


def test_a_store_has_another_version_where_there_are_pairs(tmp_path, capsys):
    photos, negatives = two_folders(tmp_path)
    missing, wide = (next(negatives.glob(f"c*/{n:02d}.*")) for n in (4, 7))
    missing.unlink()
    PILImage.new("RGB", (2 * SIDE, SIDE)).save(wide)
    flags = ["--data_path", str(photos), "--img_size", str(SIDE), "--num_workers", "2", "--output_dir"]
    assert prepare([*flags, str(tmp_path / "plain")]) == 0
    paired = [*flags, str(tmp_path / "paired"), "--condition_path", str(negatives)]
    assert prepare(paired) == 0
    plain, pairs = (read_index(tmp_path / name) for name in ("plain", "paired"))
    assert (plain["version"], pairs["version"]) == (1, 2)
    assert not {"condition_path", "condition_column"} & plain["settings"].keys()
    reasons = {image["name"]: image["reason"] for image in pairs["skipped"]}
    assert reasons["c0/04.png"] == "its condition is missing"
    assert "has 16 x 8 pixels" in reasons["c1/07.png"]
    assert (
        PILImage.open(tmp_path / "paired" / "preview.png").width
        > 1.8 * PILImage.open(tmp_path / "plain" / "preview.png").width
    )
    capsys.readouterr()
    assert prepare(paired) == 0
    assert "finished already" in capsys.readouterr().out
    write(missing, negative(4))
    assert prepare(paired) == 2
    assert "the images of --data_path changed" in capsys.readouterr().err
    assert "was prepared" in refusal(tmp_path / "paired", condition_path=negatives)
    assert prepare(["--verify", str(tmp_path / "paired")]) == 0


def test_images_with_conditions_are_not_degraded_as_well(source):
    with pytest.raises(UserError, match="come with conditions"):
        batches(source, img_size=SIDE, batch_size=2, condition_from="grey")


def test_without_conditions_a_batch_is_what_it_was(tmp_path, loaders):
    photos, negatives = two_folders(tmp_path)
    plain, paired = (
        next(loaders(open_images(photos, condition_path=path), batch_size=N)) for path in (None, negatives)
    )
    assert plain.images.shape == (N, 3, SIDE, SIDE)
    assert torch.equal(plain.images, paired.images[:, :3])
    assert ready(plain, "cpu").condition is None
