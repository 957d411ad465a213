import gc
import os
import shutil
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # for deterministic kernels; read once, by the first product
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the other check for GPUs forbids them to processes that are forked
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each program that a test starts would compile the package anew

import pytest
import torch
from helpers import OLD_FOLDERS, clothes, offer_fork_server


def pytest_configure(config):
    gc.disable()  # while modules are imported, which leave no garbage
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["JIT_ACCEL_CACHE"] = folder.name  # of what the fork server starts, but for `Group`
        offer_fork_server()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # a million objects of modules, which each collection would look through
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The package's own cache, in place of the user's."""
    os.environ["JIT_ACCEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_power_cuts():
    """Nothing waits for the disk: what a killed process wrote is there all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def hf_cache(tmp_path_factory, monkeypatch):
    """A cache of HF datasets for one test: files are known again by their URL alone, and ports are used again."""
    import datasets

    folder = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", folder / "downloads" / "extracted")


@pytest.fixture(scope="module")
def tiny():
    """The feature network `tiny`, which costs nothing."""
    import tiny_features

    tiny_features.install()
    yield
    tiny_features.remove()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 44 Fashion-MNIST images in four class folders."""
    return clothes(tmp_path_factory.mktemp("data") / "clothes")


@pytest.fixture(scope="module")
def old_folders(tmp_path_factory):
    """A copy of what fc94876 wrote (tests/fixtures/fc94876/make.py), as the working folder; the smallest size is known.

    Tests must not change what they find there.
    """
    from jit_accel.config.presets import PRESETS, Preset

    folder = tmp_path_factory.mktemp("old") / "fc94876"
    shutil.copytree(OLD_FOLDERS, folder, ignore=shutil.ignore_patterns("make.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "JiT-XS", Preset(2, 8, 2, 4, 1, in_context_len=2))
        patch.chdir(folder)
        yield folder
