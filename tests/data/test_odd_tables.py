"""Tables that are unusual are read, and what cannot be labels is said to be none."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import labels_by_number, png, refusal
from http_server import FailingServer
from prepare_samples import contents

from jit_accel.data import open_images
from jit_accel.prepare import main

N = 6


@pytest.fixture(autouse=True)
def online(hf_cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def images(numbers=range(N)):
    type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in numbers], type)


def table(**columns):
    return pa.table({"image": images(), **columns})


def write(folder, *tables, **options):
    folder.mkdir(exist_ok=True)
    for number, each in enumerate(tables):
        pq.write_table(each, folder / f"{number}.parquet", **options)
    return folder


def with_empty_row_groups(file, is_first_empty=True, labels=(0, 1) * (N // 2)):
    """Six images in two row groups, and empty row groups before, between and behind them."""
    whole = table(label=pa.array(labels))
    with pq.ParquetWriter(file, whole.schema) as writer:
        for part in [whole[:0]] * is_first_empty + [whole[:4], whole[:0], whole[4:], whole[:0]]:
            writer.write_table(part)
    return file


@pytest.fixture
def serve():
    servers = []

    def start(folder, **options):
        servers.append(FailingServer(folder))
        for name, value in options.items():
            setattr(servers[-1], name, value)
        return servers[-1].url

    yield start
    for server in servers:
        server.go_away()


# --- empty row groups


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("ranges", [None, True, False])
def test_empty_row_groups_hold_no_images_and_no_damage(tmp_path, serve, ranges, streaming):
    with_empty_row_groups(tmp_path / "0.parquet")
    path = tmp_path / "0.parquet" if ranges is None else f"{serve(tmp_path, ranges=ranges)}/0.parquet"
    source = open_images(path, streaming=streaming)
    assert labels_by_number(source, N) == {n: n % 2 for n in range(N)}
    assert source.num_classes == 2


@pytest.mark.parametrize("ranges", [None, True, False])
def test_a_file_without_rows_beside_others_is_no_damage(tmp_path, serve, ranges):
    whole = table(label=[0, 1] * (N // 2))
    write(tmp_path, whole[:0], whole)
    path = tmp_path if ranges is None else f"{serve(tmp_path, ranges=ranges)}/{{0..1}}.parquet"
    assert labels_by_number(open_images(path), N) == {n: n % 2 for n in range(N)}


def test_text_labels_of_empty_row_groups_are_read(tmp_path, serve):
    for type in (pa.string(), pa.large_string()):
        with_empty_row_groups(tmp_path / "0.parquet", labels=pa.array(["a", "b", "c"] * 2, type))
        assert open_images(f"{serve(tmp_path)}/0.parquet").class_names == ("a", "b", "c")


@pytest.mark.parametrize("ranges", [None, True, False])
def test_empty_row_groups_are_prepared(tmp_path, serve, ranges):
    (tmp_path / "data").mkdir()
    with_empty_row_groups(tmp_path / "data" / "0.parquet")
    path = tmp_path / "data" if ranges is None else f"{serve(tmp_path / 'data', ranges=ranges)}/0.parquet"
    flags = ("--img_size", "4", "--num_workers", "1")
    assert main(["--data_path", str(path), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    write(tmp_path / "plain", table(label=[0, 1] * (N // 2)))
    assert main(["--data_path", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "other"), *flags]) == 0
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "other")
    assert ours["shard-00000.npy"] == theirs["shard-00000.npy"]


@pytest.mark.parametrize("streaming", [None, False])
def test_what_has_no_rows_or_mixes_types_of_images_is_refused(tmp_path, streaming):
    whole = table(label=[0, 1] * (N // 2))
    assert "the data set has no rows" in refusal(write(tmp_path / "empty", whole[:0]), streaming=streaming)
    bare = pa.table({"image": [png(n) for n in range(N)], "label": [0, 1] * (N // 2)})
    mixed = write(tmp_path / "mixed", whole, bare)
    if streaming is False:
        assert "HF datasets cannot read these files" in refusal(mixed, streaming=False)


# --- columns


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("is_remote", [False, True])
def test_columns_of_types_that_hf_does_not_know_do_no_harm(tmp_path, serve, is_remote, streaming):
    others = pa.array([[("a", 1)]] * N, pa.map_(pa.string(), pa.int64()))
    write(tmp_path, table(label=[0, 1] * (N // 2), others=others))
    path = f"{serve(tmp_path)}/0.parquet" if is_remote else tmp_path
    assert labels_by_number(open_images(path, streaming=streaming), N) == {n: n % 2 for n in range(N)}
    assert "its type is map<string, int64" in refusal(path, label_column="others", streaming=streaming)
    assert "image_column others: its type is map<string, int64" in refusal(
        path, image_column="others", streaming=streaming
    )


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize("is_remote", [False, True])
def test_columns_of_one_name_matter_only_where_they_are_needed(tmp_path, serve, is_remote, streaming):
    twice = [pa.array([0, 1] * (N // 2))] * 2
    write(tmp_path / "bad", pa.Table.from_arrays([images(), *twice], ["image", "label", "label"]))
    write(tmp_path / "good", pa.Table.from_arrays([images(), twice[0], *twice], ["image", "label", "x", "x"]))
    paths = [f"{serve(tmp_path)}/{name}/0.parquet" if is_remote else tmp_path / name for name in ("bad", "good")]
    assert "two columns are named 'label'" in refusal(paths[0], streaming=streaming)
    assert labels_by_number(open_images(paths[1], streaming=streaming), N) == {n: n % 2 for n in range(N)}


# --- labels


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_numbers_and_texts_are_not_labels_of_one_data_set(tmp_path, serve, is_remote, first):
    tables = [table(label=[0, 1] * (N // 2)), table(label=["a", "b"] * (N // 2))]
    write(tmp_path, tables[first], tables[1 - first])
    message = refusal(f"{serve(tmp_path)}/{{0..1}}.parquet" if is_remote else tmp_path)
    assert "label_column label: " in message
    assert "some labels are text" in message
    assert "others are numbers" in message


NO_LABELS = {
    "float64": pa.array([0.5, 1.0] * (N // 2)),
    "decimal128": pa.array([0.5, 1.0] * (N // 2)).cast(pa.decimal128(20, 1)),
    "int64": pa.array([[1]] * N),
    "null": pa.nulls(N),
}


@pytest.mark.parametrize("type", NO_LABELS)
def test_a_column_that_is_named_label_and_is_none_is_warned_of(tmp_path, caplog, type):
    source = open_images(write(tmp_path, table(label=NO_LABELS[type])))
    assert not source.is_labelled
    (message,) = [record.getMessage() for record in caplog.records if "unlabelled" in record.getMessage()]
    assert "column 'label'" in message
    assert type in message
    assert "label_column" in message


def test_what_is_chosen_or_labelled_is_not_warned_of(tmp_path, caplog):
    path = write(tmp_path, table(target=[0.5] * N, label=[0, 1] * (N // 2)))
    assert open_images(path).is_labelled
    assert not caplog.records


def test_empty_row_groups_leave_the_bounds_of_labels_known(tmp_path, serve):
    with_empty_row_groups(tmp_path / "0.parquet", is_first_empty=False)
    source = open_images(f"{serve(tmp_path)}/0.parquet")
    assert np.array_equal(source.images.sizes, [4, 0, 2, 0])
    assert source.num_classes == 2


def test_a_nested_column_of_the_labels_name_is_another_column(tmp_path):
    meta = pa.array([{"label": 100 + n} for n in range(N)])
    folder = write(tmp_path / "d", pa.table({"meta": meta, "image": images(), "label": pa.array([0, 1] * (N // 2))}))
    source = open_images(folder)
    assert source.num_classes == 2
    assert labels_by_number(source) == {n: n % 2 for n in range(N)}
