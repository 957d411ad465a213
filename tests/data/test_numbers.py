"""Columns of numbers as conditions: read alike from all formats, standardised, and bad where they are no numbers."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import image_folder, numbers_in, png, tar
from datasets import Dataset
from http_server import FailingServer

import jit_accel as jit
from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.batch import arguments_of
from jit_accel.data.batches.holdout import held_by_split, split_holdout
from jit_accel.data.formats.numbers import Vectors, numbers_of, summed, tally_of
from jit_accel.data.formats.source import standardised_as

COUNT = 20


def numbers_for(n: int) -> dict:
    return {"age": n * 0.5, "place": [float(n), float(n * n)]}


def table(rows: dict | None = None) -> pa.Table:
    given = [numbers_for(n) | (rows or {}).get(n, {}) for n in range(COUNT)]
    images = [{"bytes": png(n), "path": f"{n:04d}.png"} for n in range(COUNT)]
    labels = [n % 2 for n in range(COUNT)]
    return pa.table({"image": images, "label": labels, **{k: [row[k] for row in given] for k in ("age", "place")}})


def in_folder(root, rows: dict | None = None):
    image_folder(root, COUNT)
    lines = (
        {"file_name": file.relative_to(root).as_posix(), "label": n % 2} | numbers_for(n) | (rows or {}).get(n, {})
        for n, file in enumerate(sorted(root.rglob("*.png")))
    )
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def in_parquet(root, rows: dict | None = None):
    root.mkdir()
    whole = table(rows)
    pq.write_table(whole.slice(0, 12), root / "a.parquet", row_group_size=5)
    pq.write_table(whole.slice(12), root / "b.parquet", row_group_size=5)


def in_tars(root, rows: dict | None = None):
    members = {}
    for n in range(COUNT):
        members[f"{n:04d}.png"] = png(n)
        entries = {"label": n % 2} | numbers_for(n) | (rows or {}).get(n, {})
        members[f"{n:04d}.json"] = json.dumps(entries).encode()
    parts = list(members.items())
    tar(root / "a.tar", dict(parts[:24]))
    tar(root / "b.tar", dict(parts[24:]))


def saved(root, rows: dict | None = None):
    Dataset(table(rows)).save_to_disk(root)


WRITERS = {"folder": in_folder, "parquet": in_parquet, "tars": in_tars, "saved": saved}
KINDS = [(name, None) for name in WRITERS] + [("parquet", False), ("tars", False)]


def opened(name: str, root, streaming, rows: dict | None = None, columns=("age", "place")):
    WRITERS[name](root, rows)
    return open_images(root, streaming=streaming, vector_column=columns)


def batches_of(source, count: int = 4, **how):
    loader = build_loader(source, **{"img_size": 4, "batch_size": 5, "seed": 0, "horizontal_flip": False} | how)
    found = [next(loader) for _ in range(count)]
    loader.close()
    return found


@pytest.mark.parametrize(("name", "streaming"), KINDS)
def test_all_formats_give_each_image_its_numbers(name, streaming, tmp_path, hf_cache):
    source, values = opened(name, tmp_path / "data", streaming), np.arange(COUNT)
    expected = np.stack([values * 0.5, values, values**2], 1)
    assert source.vectors.names == ("age", "place")
    assert source.vectors.sizes == (1, 2)
    assert np.allclose(source.vectors.mean, expected.mean(0))
    assert np.allclose(source.vectors.std, expected.std(0))
    seen = []
    for batch in batches_of(source):
        images = numbers_in(batch.images)
        assert batch.labels.tolist() == [n % 2 for n in images]
        standard = (expected[images] - expected.mean(0)) / expected.std(0)
        assert np.allclose(batch.vectors.numpy(), standard, atol=1e-6)
        seen += images
    assert sorted(seen) == list(range(COUNT))
    workers = batches_of(source, num_workers=2)
    assert [numbers_in(batch.images) for batch in workers] == [numbers_in(batch.images) for batch in batches_of(source)]
    assert all((a.vectors == b.vectors).all() for a, b in zip(workers, batches_of(source)))


@pytest.mark.parametrize(("name", "streaming"), KINDS)
def test_what_is_no_number_is_a_bad_image(name, streaming, tmp_path, hf_cache):
    rows = {3: {"age": None}, 7: {"age": math.nan}, 11: {"place": [1.0, math.inf]}, 15: {"place": [1.0]}}
    source = opened(name, tmp_path / "data", streaming, rows)
    good = np.setdiff1d(np.arange(COUNT), [3, 7])
    assert source.vectors.mean[0] == pytest.approx((good * 0.5).mean())
    bad, seen = [], []
    for batch in batches_of(source):
        bad += batch.bad_images
        seen += numbers_in(batch.images)
        assert batch.vectors.isfinite().all()
    assert set(seen).isdisjoint(rows)
    assert len(bad) == 4
    reasons = sorted(bad)
    assert all(f"{n:04d}.png: its " in reason for n, reason in zip(sorted(rows), reasons))
    assert [reason.endswith("and not a finite number") for reason in reasons] == [True, True, False, False]
    assert reasons[3].endswith("and not 2 finite numbers")


@pytest.mark.parametrize(("name", "streaming"), KINDS[:3])
def test_those_held_out_have_theirs(name, streaming, tmp_path):
    source = opened(name, tmp_path / "data", streaming)
    rest, held = split_holdout(source, 0.4, max_images=99, img_size=4)
    values = np.array(numbers_in(held.images))
    expected = np.stack([values * 0.5, values, values**2], 1)
    assert 0 < len(values) < COUNT
    assert np.allclose(source.vectors.restored(held.vectors.numpy()), expected, atol=1e-4)
    assert rest.vectors == source.vectors
    other = open_images(tmp_path / "data", vector_column=("age", "place"))
    shifted = Vectors(("age", "place"), (1, 2), (100.0, 0.0, 0.0), (2.0, 1.0, 1.0))
    held = held_by_split(standardised_as(source, shifted), other, max_images=99, img_size=4)
    values = np.array(numbers_in(held.images))
    assert np.allclose(held.vectors.numpy(), np.stack([values * 0.25 - 50, values, values**2], 1))


def test_a_resume_in_the_middle_goes_on_with_the_same_numbers(tmp_path):
    for name in ("folder", "parquet"):
        source = opened(name, tmp_path / name, None)
        how = {"img_size": 4, "batch_size": 3, "seed": 1}
        whole, loader = batches_of(source, 6, batch_size=3, seed=1), build_loader(source, **how)
        for _ in range(2):
            next(loader)
        again = build_loader(source, **how)
        again.load_state_dict(loader.state_dict())
        assert all((next(again).vectors == batch.vectors).all() for batch in whole[2:])


@pytest.mark.parametrize(("name", "ending"), [("parquet", "parquet"), ("tars", "tar")])
def test_numbers_and_labels_come_from_servers(name, ending, tmp_path):
    WRITERS[name](tmp_path / "data")
    server = FailingServer(tmp_path / "data")
    try:
        here, there = (
            open_images(path, vector_column=("age", "place"), label_column="label")
            for path in (tmp_path / "data", f"{server.url}/{{a,b}}.{ending}")
        )
        assert there.vectors == here.vectors
        for one, other in zip(batches_of(here), batches_of(there)):
            assert (one.vectors == other.vectors).all()
            assert (one.labels == other.labels).all()
    finally:
        server.go_away()


def test_large_numbers_keep_their_differences(tmp_path):
    rows = {n: {"age": 1.7e9 + n} for n in range(COUNT)}
    (batch, *_) = batches_of(opened("parquet", tmp_path / "data", None, rows, columns="age"))
    images = np.array(numbers_in(batch.images))
    spread = np.arange(COUNT).std()
    assert np.allclose(batch.vectors[:, 0].numpy(), (images - np.arange(COUNT).mean()) / spread, atol=1e-5)


def test_csv_and_text_are_read_as_numbers(tmp_path):
    image_folder(tmp_path, 4)
    files = [file.relative_to(tmp_path).as_posix() for file in sorted(tmp_path.rglob("*.png"))]
    cells = ["1,2.5,\"[1, 2]\"", "2,,\"[3, 4]\"", "3,n/a,\"[5, 6]\"", "4,.5,\"[7, 8]\""]  # fmt: skip
    lines = "\n".join(f"{file},{cell}" for file, cell in zip(files, cells))
    (tmp_path / "metadata.csv").write_text("file_name,count,weight,place\n" + lines)
    source = open_images(tmp_path, vector_column=("count", "weight", "place"))
    assert source.vectors == Vectors(
        ("count", "weight", "place"), (1, 1, 2), (2.5, 1.5, 4.0, 5.0), (math.sqrt(1.25), 1.0, *[math.sqrt(5)] * 2)
    )
    (batch,) = batches_of(source, 1, batch_size=4)
    assert sorted(batch.bad_images)[0].endswith("0001.png: its weight is 'None' and not a finite number")


def test_the_label_may_be_a_number_and_columns_may_have_the_names_of_ours(tmp_path):
    in_folder(tmp_path, {n: {"image": n, "label": n * 2} for n in range(COUNT)})
    source = open_images(tmp_path, vector_column=("label", "image"))
    assert source.vectors.names == ("label", "image")
    assert not source.is_labelled
    (batch, *_) = batches_of(source)
    values = np.array(numbers_in(batch.images))
    assert np.allclose(source.vectors.restored(batch.vectors.numpy()), np.stack([values * 2, values], 1), atol=1e-5)
    both = open_images(tmp_path, vector_column=("label",), label_column="label")
    assert both.is_labelled
    assert both.num_classes == 39


def test_public_batches_bring_them(tmp_path):
    in_folder(tmp_path)
    batch = next(jit.batches(jit.open_images(tmp_path, vector_column=["age"]), img_size=4, batch_size=4))
    assert batch.vectors.shape == (4, 1)
    assert set(arguments_of(batch)) == {"vectors"}


def test_the_numbers_are_part_of_the_fingerprint(tmp_path):
    in_folder(tmp_path)
    plain, age, both = (open_images(tmp_path, vector_column=names) for names in ((), ("age",), ("age", "place")))
    assert len({plain.fingerprint, age.fingerprint, both.fingerprint}) == 3
    in_folder(tmp_path, {3: {"age": 99}})
    assert open_images(tmp_path, vector_column=("age",)).fingerprint != age.fingerprint


def test_two_rows_of_one_image_must_agree(tmp_path):
    in_folder(tmp_path)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, lines[2]]))
    assert open_images(tmp_path, vector_column=("age", "place")).num_images == COUNT
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, json.dumps(json.loads(lines[2]) | {"age": 5000})]))
    assert open_images(tmp_path, vector_column="place").num_images == COUNT
    with pytest.raises(UserError, match="lists images twice, with different numbers"):
        open_images(tmp_path, vector_column="age")


@pytest.mark.parametrize("name", WRITERS)
def test_columns_that_are_not_there_or_hold_no_number_are_refused(name, tmp_path):
    source = tmp_path / "data"
    with pytest.raises(UserError, match=r"choose from.*Did you mean 'age'\?") as caught:
        opened(name, source, None, columns="agee")
    assert (caught.value.about, caught.value.value) == ("vector_column", "agee")
    WRITERS[name](tmp_path / "none", {n: {"age": "old"} for n in range(COUNT)})
    with pytest.raises(UserError, match=r"no row of .* has a finite number") as caught:
        open_images(tmp_path / "none", vector_column="age")
    assert caught.value.value == "age"


def test_what_cannot_have_numbers_says_so(tmp_path, caplog):
    in_parquet(tmp_path / "parquet", {n: {"age": 4.0} for n in range(COUNT)})
    with pytest.raises(UserError, match="numbers are floats, whole numbers or lists"):
        open_images(tmp_path / "parquet", vector_column="image")
    assert open_images(tmp_path / "parquet", vector_column="age").vectors.std == (1.0,)
    assert "--vector_column age: it is the same for all images" in caplog.text
    image_folder(tmp_path / "plain", 4)
    with pytest.raises(UserError, match=r"has no columns, without metadata.csv"):
        open_images(tmp_path / "plain", vector_column="age")


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (3, [3.0]),
        (True, [1.0]),
        ("0.5", [0.5]),
        (" [1, 2] ", [1.0, 2.0]),
        ([1, "2"], [1.0, 2.0]),
        ([], None),
        ("", None),
        ("nan", None),
        ([1, None], None),
        ("[1, [2]]", None),
        ("[" * 100_000, None),
        (10**400, None),
        ({"a": 1}, None),
        (b"1", [1.0]),
        (None, None),
    ],
)
def test_what_is_a_number(value, numbers):
    assert numbers_of(value) == numbers


def test_parts_sum_up_to_the_whole():
    values = np.random.default_rng(0).normal(1e8, 3, 1000)
    parts = [tally_of(pa.chunked_array([values[:7], values[7:7], values[7:300]])), {}, tally_of(values[300:].tolist())]
    ((length, (count, mean, squares)),) = summed(parts).items()
    assert (length, count) == ("1", 1000)
    assert mean[0] == pytest.approx(values.mean(), rel=1e-14)
    assert squares[0] / 1000 == pytest.approx(values.var(), rel=1e-9)
