"""Images of one channel, and of arrays: their numbers, their range, and what is refused."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from PIL import Image

import jit_accel as jit
from jit_accel.base.errors import UserError
from jit_accel.data.batches.batch import PixelBatch, ready
from jit_accel.data.batches.holdout import split_holdout
from jit_accel.data.formats.columns import PixelFormat
from jit_accel.data.reading.crop import center_crop, crop_pixels
from jit_accel.data.reading.decode import BadImage, decode_image

RNG = np.random.default_rng(0)
GREY = PixelFormat(1)
CT = (-1024.0, 3071.0)


def first_of(source, side=8, **how):
    how = {"img_size": side, "batch_size": source.num_images, "horizontal_flip": False, "seed": 3} | how
    batch = next(jit.batches(source, **how))
    return batch.images.numpy(), batch.labels.numpy()


def by_label(source, **how):
    images, labels = first_of(source, **how)
    return images[np.argsort(labels)]


def save(folder, arrays, ending="npy"):
    """Write an array for each class into a folder of its own."""
    for number, array in enumerate(arrays):
        (folder / str(number)).mkdir(parents=True)
        path = folder / str(number) / f"x.{ending}"
        if ending == "npy":
            np.save(path, array)
        elif ending == "npz":
            np.savez_compressed(path, array)
        else:
            Image.fromarray(array).save(path)
    return str(folder)


def as_png(array, mode=None):
    file = io.BytesIO()
    Image.fromarray(array, mode).save(file, "PNG")
    return file.getvalue()


def test_grey_is_pillows_l_of_any_picture():
    colour = RNG.integers(0, 256, (9, 9, 3), np.uint8)
    grey = RNG.integers(0, 256, (9, 9), np.uint8)
    assert (decode_image(as_png(grey), 9, pixels=GREY)[0] == grey).all()
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    assert (decode_image(as_png(colour), 9, pixels=GREY)[0] == expected).all()
    clear = np.dstack([colour, np.zeros((9, 9), np.uint8)])  # wholly transparent: white
    assert (decode_image(as_png(clear), 9, pixels=GREY) == 255).all()
    large = Image.fromarray(RNG.integers(0, 256, (40, 33), np.uint8))
    expected = np.asarray(center_crop(large, 8))
    assert (decode_image(as_png(np.asarray(large)), 8, pixels=GREY)[0] == expected).all()


@pytest.mark.parametrize("shape", [(40, 33), (17, 60), (8, 9)])
def test_arrays_are_cropped_as_pictures_channel_by_channel(shape):
    bytes_ = RNG.integers(0, 256, (3, *shape), np.uint8)
    as_colour = crop_pixels(bytes_, 8)
    assert (crop_pixels(np.concatenate([bytes_, bytes_[:2]]), 8)[:3] == as_colour).all()
    floats = crop_pixels(bytes_.astype(np.float32), 8)
    assert floats.dtype == np.float32
    assert floats.shape == (3, 8, 8)
    assert np.abs(floats.clip(0, 255) - as_colour).max() < 3  # each step of the bytes' rounds
    scaled = crop_pixels(bytes_.astype(np.float32) * 10 - 700, 8)
    np.testing.assert_allclose(scaled, floats * 10 - 700, atol=0.02)


def test_float_arrays_are_mapped_by_their_range(tmp_path):
    arrays = [RNG.uniform(*CT, (8, 8)).astype(np.float32) for _ in range(4)]
    arrays[0][0, :2] = -5000, 9000
    source = jit.open_images(save(tmp_path / "a", arrays), in_channels=1, value_range=CT)
    images = by_label(source)
    assert images.dtype == np.float32
    assert images.shape == (4, 1, 8, 8)
    expected = ((np.stack(arrays)[:, None] - CT[0]) / (CT[1] - CT[0]) * 2 - 1).clip(-1, 1)
    np.testing.assert_allclose(images, expected, atol=2e-6)
    packed = jit.open_images(save(tmp_path / "b", arrays, "npz"), in_channels=1, value_range=CT)
    assert (by_label(packed) == images).all()
    tiffs = jit.open_images(save(tmp_path / "c", arrays, "tif"), in_channels=1, value_range=CT)
    assert (by_label(tiffs) == images).all()


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4, 7, 64])
def test_arrays_may_have_their_channels_first_or_last(tmp_path, in_channels):
    arrays = [RNG.integers(0, 256, (in_channels, 8, 8), np.uint8) for _ in range(3)]
    first = by_label(jit.open_images(save(tmp_path / "a", arrays), in_channels=in_channels))
    last = [array.transpose(1, 2, 0) for array in arrays]
    assert (by_label(jit.open_images(save(tmp_path / "b", last), in_channels=in_channels)) == first).all()
    assert (first == torch.from_numpy(np.stack(arrays)).float().div_(127.5).sub_(1).numpy()).all()


def test_16_bits_keep_their_precision_in_arrays_and_pictures(tmp_path):
    arrays = [RNG.integers(0, 65536, (8, 8), np.uint16) for _ in range(3)]
    expected = (np.stack(arrays)[:, None] / 65535 * 2 - 1).astype(np.float32)
    for number, ending in enumerate(("npy", "tif", "png")):
        source = jit.open_images(save(tmp_path / str(number), arrays, ending), in_channels=1)
        assert source.pixels == PixelFormat(1, value_range=(0.0, 65535.0))
        np.testing.assert_allclose(by_label(source), expected, atol=1e-6)


def test_pictures_of_colour_are_read_as_before(tmp_path):
    pictures = [RNG.integers(0, 256, (30, 20, 3), np.uint8) for _ in range(3)]
    source = jit.open_images(save(tmp_path, pictures, "png"))
    assert source.pixels == PixelFormat()
    assert source.images.columns.pixels == PixelFormat()
    other = jit.open_images(str(tmp_path), value_range=(0, 255))
    np.testing.assert_allclose(by_label(other), by_label(source), atol=0.02)
    assert other.fingerprint != source.fingerprint


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_hand_out_floats(tmp_path, num_workers):
    arrays = [RNG.uniform(0, 1, (2, 8, 8)) for _ in range(4)]
    source = jit.open_images(save(tmp_path, arrays), in_channels=2, value_range=(0, 1))
    loader = jit.batches(source, img_size=8, batch_size=2, num_workers=num_workers, horizontal_flip=False)
    found = [next(loader) for _ in range(3)]
    loader.close()
    for batch in found:
        expected = np.stack([arrays[label] for label in batch.labels.tolist()]) * 2 - 1
        np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "how", "rule"),
    [
        (np.linspace(-3, 700, 64).reshape(8, 8), {"in_channels": 1}, r"value_range: .* from -3 to 700 in the first"),
        (np.zeros((8, 8), np.int32), {"in_channels": 1}, r"value_range: .* int32"),
        (np.zeros((5, 8, 8), np.uint8), {"in_channels": 4}, r"in_channels 4: .*\(5, 8, 8\).*--in_channels 5"),
        (np.zeros((2, 8, 8), np.uint8), {}, r"in_channels 3: .*--in_channels 2"),
    ],
)
def test_what_cannot_be_known_is_asked_for(tmp_path, array, how, rule):
    with pytest.raises(UserError, match=rule):
        jit.open_images(save(tmp_path, [array] * 2), **how)


def test_pictures_of_other_channels_are_refused(tmp_path):
    pictures = [RNG.integers(0, 256, (8, 8, 3), np.uint8)] * 2
    with pytest.raises(UserError, match=r"in_channels 5: .*pictures"):
        jit.open_images(save(tmp_path, pictures, "png"), in_channels=5)


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY",
        b"PK\x03\x04 and no more",
        pytest.param("pickle", id="a pickle"),
        pytest.param("large", id="a header of petabytes"),
        pytest.param("nan", id="not a number"),
        pytest.param("text", id="text"),
        pytest.param("several", id="several arrays"),
    ],
)
def test_broken_arrays_are_bad_images(data):
    file = io.BytesIO()
    if data == "pickle":
        np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    elif data == "large":
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**8, 10**7)})
    elif data == "nan":
        np.save(file, np.full((8, 8), np.nan, np.float32))
    elif data == "text":
        np.save(file, np.array([["a", "b"]]))
    elif data == "several":
        np.savez(file, a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    with pytest.raises(BadImage):
        decode_image(file.getvalue() or data, 8, pixels=PixelFormat(1, value_range=(0.0, 1.0)))


def test_arrays_beside_pictures_are_no_images(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    np.save(tmp_path / "a" / "features.npy", np.zeros((8, 8)))
    assert jit.open_images(str(tmp_path)).num_images == 1


@pytest.mark.parametrize("images_are", ["png", "npy"])
def test_conditions_of_16_bits_leave_images_of_8_as_they_are(tmp_path, images_are):
    random = np.random.default_rng(0)
    photos, depths = random.integers(0, 256, (4, 8, 8, 3), np.uint8), random.integers(0, 2**16, (4, 8, 8), np.uint16)
    for name in ("photos", "depths"):
        (tmp_path / name).mkdir()
    for n in range(4):
        photos[n, 0, 0] = n
        if images_are == "png":
            Image.fromarray(photos[n]).save(tmp_path / "photos" / f"{n}.png")
        else:
            np.save(tmp_path / "photos" / f"{n}.npy", photos[n])
        Image.fromarray(depths[n]).save(tmp_path / "depths" / f"{n}.tif")
    source = jit.open_images(tmp_path / "photos", condition_path=tmp_path / "depths")
    batch = next(jit.batches(source, img_size=8, batch_size=4, horizontal_flip=False))
    for image, condition in zip(batch.images, batch.condition):
        n = round((float(image[0, 0, 0]) + 1) * 127.5)
        np.testing.assert_allclose(image, photos[n].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
        np.testing.assert_allclose(condition[0], depths[n] / 32767.5 - 1, atol=1e-6)


@pytest.mark.parametrize("value_range", [None, (0, 1)])
def test_one_range_does_not_hold_for_images_of_8_bits_and_conditions_of_floats(tmp_path, value_range):
    for name in ("photos", "heights"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / "0.png")
    np.save(tmp_path / "heights" / "0.npy", np.random.default_rng(0).random((8, 8), np.float32))
    how = {"condition_path": tmp_path / "heights"}
    with pytest.raises(jit.UserError, match="the values 0 to 255, and their conditions are float32"):
        jit.open_images(tmp_path / "photos", value_range=value_range, **how)
    assert jit.open_images(tmp_path / "photos", value_range=(0, 255), **how).condition_channels == 1


def test_a_condition_may_have_another_number_of_channels_and_range(tmp_path):
    arrays = [RNG.uniform(-1, 5, (8, 8)).astype(np.float32) for _ in range(4)]
    pictures = [RNG.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(4)]
    folders = save(tmp_path / "a", arrays), save(tmp_path / "b", pictures, "png")
    source = jit.open_images(folders[0], condition_path=folders[1], in_channels=1, value_range=(-1, 5))
    assert (source.channels, source.condition_channels) == (4, 3)
    batch = next(jit.batches(source, img_size=8, batch_size=4, horizontal_flip=False))
    for image, condition, label in zip(batch.images, batch.condition, batch.labels.tolist()):
        np.testing.assert_allclose(image[0], (arrays[label] + 1) / 3 - 1, atol=1e-6)
        np.testing.assert_allclose(condition, pictures[label].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    back = jit.open_images(folders[1], condition_path=folders[0], value_range=(0, 255), in_channels=3)
    assert (back.channels, back.condition_channels) == (4, 1)


def test_uint8_batches_are_ready_bit_for_bit():
    pixels = torch.from_numpy(RNG.integers(0, 256, (2, 3, 4, 4), np.uint8))
    batch = PixelBatch(pixels, torch.zeros(2, dtype=torch.int64), np.arange(2))
    assert torch.equal(ready(batch, "cpu").images, pixels.float().div_(127.5).sub_(1))


def test_streams_of_grey_pictures_and_arrays(tmp_path):
    arrays = [RNG.integers(0, 256, (8, 8), np.uint8) for _ in range(6)]
    table = pa.table({"image": [as_png(array) for array in arrays], "label": list(range(6))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    expected = np.stack(arrays)[:, None] / np.float32(127.5) - 1
    for streaming in (True, False):
        source = jit.open_images(str(tmp_path / "a.parquet"), in_channels=1, streaming=streaming)
        np.testing.assert_allclose(by_label(source), expected, atol=1e-6)


def test_holdout_of_floats(tmp_path):
    arrays = [RNG.uniform(0, 9, (8, 8)) for _ in range(30)]
    source = jit.open_images(save(tmp_path, arrays), in_channels=1, value_range=(0, 9))
    rest, held = split_holdout(source, 0.3, max_images=8, img_size=8)
    assert held.images.dtype == torch.float32
    assert held.pixels == source.pixels
    assert rest.pixels == source.pixels
    batch = ready(held.batch(torch.arange(len(held.keys))), "cpu")
    expected = np.stack([arrays[int(source.class_names[label])] for label in held.labels])[:, None] / 4.5 - 1
    np.testing.assert_allclose(batch.images, expected, atol=1e-6)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same twelve arrays (2, 8, 8) in tar files, and as bytes, nested lists and `Array3D` in tables."""
    folder, arrays = tmp_path_factory.mktemp("tables"), [RNG.uniform(-1, 1, (2, 8, 8)).astype("f4") for _ in range(12)]
    labels = list(range(12))
    with tarfile.open(folder / "tar.tar", "w") as tar:
        for number, array in enumerate(arrays):
            for name, data in ((f"{number:02}.npy", npy(array)), (f"{number:02}.cls", str(number).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for name, values in (("bytes", [npy(array) for array in arrays]), ("lists", [array.tolist() for array in arrays])):
        pq.write_table(pa.table({"npy": values, "label": labels}), folder / f"{name}.parquet", row_group_size=5)
    features = Features({"npy": Array3D((2, 8, 8), "float32"), "label": Value("int64")})
    Dataset.from_dict({"npy": arrays, "label": labels}, features=features).to_parquet(str(folder / "typed.parquet"))
    return folder, arrays


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["tar.tar", "bytes.parquet", "lists.parquet", "typed.parquet"])
def test_arrays_in_tables_and_tar_files_are_those_of_folders(tables, name, streaming):
    folder, arrays = tables
    how = {"image_column": "npy", "in_channels": 2, "value_range": (-1, 1), "streaming": streaming}
    source = jit.open_images(folder / name, **how)
    np.testing.assert_allclose(by_label(source), np.stack(arrays), atol=1e-6)
    rest, held = split_holdout(source, 0.4, max_images=8, img_size=8)
    assert 0 < len(held.keys) == 12 - rest.num_images
    expected = np.stack([arrays[label] for label in held.labels])
    np.testing.assert_allclose(ready(held.batch(torch.arange(len(held.keys))), "cpu").images, expected, atol=1e-6)


def test_a_resumed_stream_of_arrays_goes_on_bit_for_bit(tables):
    how = {"image_column": "npy", "in_channels": 2, "value_range": (-1, 1)}
    source = jit.open_images(tables[0] / "lists.parquet", **how)
    loader, again = (jit.batches(source, img_size=4, batch_size=5, seed=1) for _ in range(2))
    next(loader)
    again.load_state_dict(loader.state_dict())
    for _ in range(4):
        assert torch.equal(next(loader).images, next(again).images)
