"""The embedded data sets are complete, described, and need neither cache nor network."""

import gzip
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jit_accel.data
from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images

FOLDER = Path(jit_accel.data.__file__).parent / "builtin" / "fashion_mnist"
MAKER = Path(__file__).parents[2] / "examples" / "make_fashion_mnist.py"


@pytest.fixture(scope="module")
def source():
    return open_images("builtin:fashion_mnist")


@pytest.fixture(scope="module")
def test_split():
    return open_images("builtin:fashion_mnist_test")


def test_it_holds_a_thousand_different_images_of_each_of_ten_named_classes(source):
    assert source.num_images == 10_000
    assert (len(source.class_names), source.class_names[0], source.class_names[9]) == (10, "T-shirt/top", "Ankle boot")
    assert np.bincount(source.images.dataset["label"]).tolist() == [1000] * 10
    assert len({image["path"] for image in source.images.dataset["image"]}) == 10_000
    assert FOLDER.joinpath("train.parquet").stat().st_size < 5_000_000


def test_it_stays_the_data_set_that_earlier_runs_were_trained_on(source):
    assert source.fingerprint == "b3015e64c2eef95d"


def test_the_test_split_holds_two_hundred_images_of_each_class(source, test_split):
    assert (test_split.num_images, test_split.class_names) == (2_000, source.class_names)
    assert np.bincount(test_split.images.dataset["label"]).tolist() == [200] * 10
    assert sum(file.stat().st_size for file in FOLDER.glob("*.parquet")) < 5_700_000
    assert test_split.fingerprint != source.fingerprint


def test_no_test_image_is_a_training_image(source, test_split):
    # Pixels, since equal pictures may have unequal files.
    of_training, of_test = ({picture.tobytes() for picture in pictures(one)} for one in (source, test_split))
    assert (len(of_training), len(of_test)) == (10_000, 2_000)
    assert not of_training & of_test


def pictures(source):
    for image in source.images.dataset["image"]:
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            yield np.asarray(opened)


@pytest.mark.parametrize(
    ("name", "meant"), [("fashon_mnist", "fashion_mnist"), ("fashion_mnist_tst", "fashion_mnist_test")]
)
def test_a_wrong_name_is_answered_with_the_nearest(name, meant):
    with pytest.raises(UserError, match=f"Did you mean 'builtin:{meant}'") as caught:
        open_images(f"builtin:{name}")
    assert "choose from builtin:fashion_mnist, builtin:fashion_mnist_test." in str(caught.value)


def test_the_script_draws_a_balanced_split_from_the_original_files(tmp_path):
    labels = np.arange(2_500, dtype=np.uint8) % 10
    for kind, values in (("images", np.repeat(labels, 4).reshape(-1, 2, 2)), ("labels", labels)):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        (tmp_path / f"t10k-{kind}-idx{values.ndim}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    runpy.run_path(str(MAKER))["make"](tmp_path, tmp_path / "new" / "test.parquet", "test")
    drawn = pq.read_table(tmp_path / "new" / "test.parquet").to_pydict()
    numbers = [int(image["path"].removeprefix("test_").removesuffix(".png")) for image in drawn["image"]]
    assert len(set(numbers)) == 2_000
    assert np.bincount(drawn["label"]).tolist() == [200] * 10
    assert labels[numbers].tolist() == drawn["label"]


@pytest.mark.parametrize(("name", "parts"), [("source", 10), ("test_split", 4)])
def test_its_order_is_shuffled(name, parts, request):
    labels = np.array(request.getfixturevalue(name).images.dataset["label"]).reshape(parts, -1)
    assert all(np.bincount(part, minlength=10).min() > labels.shape[1] / 20 for part in labels)


def test_it_is_read_as_28_pixel_grey_images(source):
    batch = next(build_loader(source, img_size=28, batch_size=64, seed=0))
    assert not batch.bad_images
    assert (batch.images[:, 0] == batch.images[:, 2]).all()
    assert 40 < batch.images.float().mean() < 110
    trousers = next(build_loader(source, img_size=28, batch_size=512, seed=0))
    trousers = trousers.images[trousers.labels == 1].float().mean((0, 1))
    assert trousers[:, 14].mean() > 3 * trousers[:, 2].mean()  # narrow things in the middle


def test_hf_datasets_sees_images_and_class_names():
    streamed = datasets.load_dataset("parquet", data_files=str(FOLDER / "train.parquet"), split="train", streaming=True)
    assert isinstance(streamed.features["image"], datasets.Image)
    assert streamed.features["label"].names == list(open_images("builtin:fashion_mnist").class_names)


def test_licence_and_source_lie_beside_it():
    assert "Zalando" in (FOLDER / "LICENSE").read_text()
    readme = (FOLDER / "README.md").read_text()
    assert "https://github.com/zalandoresearch/fashion-mnist" in readme
    assert "make_fashion_mnist.py" in readme


def test_they_open_without_a_cache_folder(tmp_path):
    cache = tmp_path / "file"
    cache.touch()  # no folder can be made here
    names = ("builtin:fashion_mnist", "builtin:fashion_mnist_test")
    code = f"from jit_accel.data import open_images; print(*[open_images(name).num_images for name in {names}])"
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("10000 2000\n", 0), done.stderr
