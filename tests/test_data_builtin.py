"""The embedded data set is complete, described, and needs neither cache nor network."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

import jit_accel.data
from jit_accel.data import build_loader, open_source

FOLDER = Path(jit_accel.data.__file__).parent / "builtin" / "fashion_mnist"


@pytest.fixture(scope="module")
def source():
    return open_source("builtin:fashion_mnist")


def test_it_holds_a_thousand_different_images_of_each_of_ten_named_classes(source):
    assert source.num_images == 10_000
    assert (len(source.class_names), source.class_names[0], source.class_names[9]) == (10, "T-shirt/top", "Ankle boot")
    assert np.bincount(source.images.dataset["label"]).tolist() == [1000] * 10
    assert len({image["path"] for image in source.images.dataset["image"]}) == 10_000
    assert FOLDER.joinpath("train.parquet").stat().st_size < 5_000_000


def test_its_order_is_shuffled(source):
    labels = np.array(source.images.dataset["label"])
    assert all(np.bincount(part, minlength=10).min() > 50 for part in labels.reshape(10, 1000))


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
    assert streamed.features["label"].names == list(open_source("builtin:fashion_mnist").class_names)


def test_licence_and_source_lie_beside_it():
    assert "Zalando" in (FOLDER / "LICENSE").read_text()
    readme = (FOLDER / "README.md").read_text()
    assert "https://github.com/zalandoresearch/fashion-mnist" in readme
    assert "make_fashion_mnist.py" in readme


def test_it_opens_without_a_cache_folder(tmp_path):
    cache = tmp_path / "file"
    cache.touch()  # no folder can be made here
    code = "from jit_accel.data import open_source; print(open_source('builtin:fashion_mnist').num_images)"
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("10000\n", 0), done.stderr
