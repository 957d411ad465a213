"""Images in tables as numbers: bare bytes of a known shape, HF's Array2D and Array3D, and lists of a known type."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, Array3D, Dataset, Features, Value

import jit_accel as jit
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.prepare import main as prepare

COUNT = 12
DRAWS = np.random.default_rng(0)
BITS_16 = DRAWS.integers(0, 65536, (COUNT, 8, 6, 2), np.uint16)
FLOATS = DRAWS.normal(0, 1, (COUNT, 5, 8, 8)).astype(np.float32)
GREY = DRAWS.integers(0, 256, (COUNT, 8, 8), np.uint8)
COLOUR = DRAWS.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
KINDS = {
    "bits": (BITS_16, {"in_channels": 2}, Array3D),
    "floats": (FLOATS, {"in_channels": 5, "value_range": (-3.0, 3.0)}, Array3D),
    "grey": (GREY, {"in_channels": 1}, Array2D),
    "colour": (COLOUR, {}, Array3D),
}


def raw_of(arrays):
    return {"raw_shape": arrays.shape[1:], "raw_dtype": str(arrays.dtype)}


def write_raw(root, arrays, odd=()):
    """Write bare bytes; those of the numbers `odd` are one byte short."""
    root.mkdir(parents=True)
    images = [array.tobytes()[: -1 if n in odd else None] for n, array in enumerate(arrays)]
    table = pa.table({"image": images, "label": list(range(len(arrays)))})
    pq.write_table(table.slice(0, 7), root / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(7), root / "b.parquet", row_group_size=4)
    return root


def write_files(root, arrays):
    for number, array in enumerate(arrays):
        (root / f"{number:02d}").mkdir(parents=True)
        np.save(root / f"{number:02d}" / "x.npy", array)
    return root


def by_label(source):
    batch = next(jit.batches(source, img_size=(8, 6), batch_size=source.num_images, horizontal_flip=False))
    assert batch.bad_images == []
    return batch.images.numpy()[np.argsort(batch.labels.numpy())]


@pytest.mark.parametrize("kind", KINDS)
def test_bare_bytes_are_read_as_the_same_arrays_in_files(kind, tmp_path, hf_cache):
    arrays, how, _ = KINDS[kind]
    wanted = by_label(jit.open_images(write_files(tmp_path / "files", arrays), **how))
    path = write_raw(tmp_path / "raw", arrays)
    Dataset.from_parquet(str(path / "*.parquet"), cache_dir=hf_cache).save_to_disk(tmp_path / "saved")
    for place, streaming in ((path, None), (path, False), (tmp_path / "saved", None)):
        source = jit.open_images(place, streaming=streaming, **how, **raw_of(arrays))
        np.testing.assert_array_equal(by_label(source), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_arrays_simply_work(kind, tmp_path, hf_cache):
    arrays, how, feature = KINDS[kind]
    wanted = by_label(jit.open_images(write_files(tmp_path / "files", arrays), **how))
    features = Features({"scan": feature(arrays.shape[1:], str(arrays.dtype)), "label": Value("int64")})
    dataset = Dataset.from_dict({"scan": arrays.tolist(), "label": list(range(COUNT))}, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for place, streaming in (
        (tmp_path / "a.parquet", None),
        (tmp_path / "a.parquet", False),
        (tmp_path / "saved", None),
    ):
        np.testing.assert_array_equal(by_label(jit.open_images(place, streaming=streaming, **how)), wanted)


def test_lists_of_a_known_type_have_its_range(tmp_path):
    kind = pa.list_(pa.list_(pa.uint8()))
    table = pa.table({"image": pa.array(GREY.tolist(), kind), "label": list(range(COUNT))})
    pq.write_table(table, tmp_path / "a.parquet")
    source = jit.open_images(tmp_path / "a.parquet", in_channels=1)
    assert source.pixels.value_range is None
    wanted = by_label(jit.open_images(write_files(tmp_path / "files", GREY), in_channels=1))
    np.testing.assert_array_equal(by_label(source), wanted)


@pytest.mark.parametrize("streaming", [None, False])
def test_another_number_of_bytes_is_a_bad_image(streaming, tmp_path, hf_cache):
    path = write_raw(tmp_path / "raw", BITS_16, odd=(3,))
    source = jit.open_images(path, streaming=streaming, in_channels=2, **raw_of(BITS_16))
    batch = next(jit.batches(source, img_size=(8, 6), batch_size=COUNT, horizontal_flip=False))
    assert len(batch.bad_images) == 1
    assert batch.bad_images[0].endswith("191 bytes where 8 x 6 x 2 numbers of uint16 have 192")


def test_a_store_of_bare_bytes_and_its_holdout_are_those_of_the_source(tmp_path, capsys):
    path = write_raw(tmp_path / "raw", BITS_16, odd=(3,))
    flags = ("--raw_shape", "8", "6", "2", "--raw_dtype", "uint16", "--in_channels", "2", "--img_size", "8", "6")
    assert prepare(["--data_path", str(path), "--output_dir", str(tmp_path / "store"), *flags]) == 0
    assert "191 bytes where 8 x 6 x 2 numbers" in (tmp_path / "store" / "problems.csv").read_text()
    store = jit.open_images(tmp_path / "store", in_channels=2)
    wanted = by_label(jit.open_images(write_files(tmp_path / "files", BITS_16), in_channels=2))
    np.testing.assert_array_equal(by_label(store), np.delete(wanted, 3, 0))
    part = {"rank": 0, "world_size": 1, "max_images": 99, "img_size": (8, 6)}
    raw = jit.open_images(path, in_channels=2, streaming=None, **raw_of(BITS_16))
    (_, of_store), (_, of_raw) = split_holdout(store, 0.5, **part), split_holdout(raw, 0.5, **part)
    assert sorted(of_store.labels.tolist()) == sorted(set(of_raw.labels.tolist()) - {3})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"raw_shape": (8, 6, 2)}, "raw_shape 8 6 2: needs the type of the numbers"),
        ({"raw_dtype": "uint16"}, "raw_dtype uint16: is the type of bare bytes"),
        ({"raw_shape": (8,), "raw_dtype": "uint16"}, "raw_shape 8: must be H W, H W C or C H W"),
        ({"raw_shape": (8, 8), "raw_dtype": "complex64"}, "is no type of numbers here"),
        ({"raw_shape": (8, 8), "raw_dtype": "uint8", "image_column": "label"}, "are no bytes but"),
    ],
)
def test_shapes_and_types_that_cannot_be_are_refused(how, message, tmp_path):
    with pytest.raises(jit.UserError, match="raw_") as caught:
        jit.open_images(write_raw(tmp_path / "raw", GREY), **how)
    assert message in str(caught.value)


@pytest.mark.parametrize("streaming", [None, False])
@pytest.mark.parametrize(("shape", "dtype"), [((8, 8), "uint8"), ((8, 8, 3), "float32")])
def test_a_shape_that_no_image_has_is_refused_before_the_training(shape, dtype, streaming, tmp_path, hf_cache):
    how = {"raw_shape": shape, "raw_dtype": dtype, "streaming": streaming}
    with pytest.raises(jit.UserError) as caught:
        jit.open_images(write_raw(tmp_path / "raw", COLOUR), **how)
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert "raw_shape " + " ".join(map(str, shape)) in str(caught.value)
    assert f"192 bytes where {' x '.join(map(str, shape))} numbers of {dtype} have {wanted:,}" in str(caught.value)


def test_folders_and_stores_have_no_bare_bytes(tmp_path):
    with pytest.raises(jit.UserError, match="is no table, whose columns may hold bare bytes: leave the flag out"):
        jit.open_images(write_files(tmp_path / "files", GREY), raw_shape=(8, 8), raw_dtype="uint8")


def test_the_type_is_part_of_the_fingerprint(tmp_path):
    path, how = write_raw(tmp_path / "raw", GREY), {"in_channels": 1, "raw_dtype": "uint8"}
    one, other = (jit.open_images(path, raw_shape=shape, **how) for shape in ((8, 8), (4, 16)))
    assert one.fingerprint != other.fingerprint
