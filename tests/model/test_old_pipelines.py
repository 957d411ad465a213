"""Pipeline folders, checkpoints and adapters that fc94876 wrote, and folders before it, draw the same images."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from helpers import OLD_FOLDERS, last_checkpoint
from safetensors.torch import load_file

from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.model.generation import generate
from jit_accel.model.loading import averages_of, load_pipeline


def assert_same_images(pipe, name: str) -> None:
    """The images that fc94876 drew, up to the rounding of other machines."""
    pipe.set_progress_bar_config(disable=True)
    drawn = generate(pipe, range(6), num_inference_steps=3, guidance_scale=2.0).numpy()
    expected = np.load(OLD_FOLDERS / "expected.npz")[name]
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A place of this test's own for code that diffusers takes from folders."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_a_folder_draws_the_same_images(old_folders):
    for pipe in (load_pipeline("run"), load_pipeline("run/pipeline"), JiTPipeline.from_pretrained("run/pipeline")):
        assert_same_images(pipe, "run")
        assert pipe.config.class_names == ["ant", "bee", "cat"]


@pytest.mark.parametrize("custom", ["run/pipeline", None])
def test_plain_diffusers_gives_the_classes_of_this_package(old_folders, own_modules, custom):
    settings = {"custom_pipeline": custom} if custom else {}
    pipe = DiffusionPipeline.from_pretrained("run/pipeline", trust_remote_code=True, **settings)
    assert isinstance(pipe, JiTPipeline)
    assert isinstance(pipe.transformer, JiTTransformer2DModel)
    assert isinstance(pipe.scheduler, JiTScheduler)
    assert_same_images(pipe, "run")


def test_the_code_of_a_folder_draws_the_same_images_by_itself(old_folders, own_modules, tmp_path):
    """As where the package is not installed, or has moved its classes once more."""
    folder = tmp_path / "pipeline"
    shutil.copytree("run/pipeline", folder)
    for file in folder.rglob("*.py"):
        file.write_text(file.read_text().replace('import_module("jit_accel.', 'import_module("gone.'))
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert not isinstance(pipe, JiTPipeline)
    assert_same_images(pipe, "run")


@pytest.mark.parametrize("by", ["package", "diffusers"])
def test_a_folder_of_the_oldest_form_draws_the_same_images(old_folders, own_modules, tmp_path, by):
    folder = tmp_path / "pipeline"
    shutil.copytree("run/pipeline", folder, ignore=shutil.ignore_patterns("*.py"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "JiTPipeline",
        "class_names": list(index["class_names"].values()),
        "transformer": ["jit_accel.model", "JiTTransformer2DModel"],
        "scheduler": ["jit_accel.scheduler", "JiTScheduler"],
    }
    del index["method"], index["num_inference_steps"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline.py").write_text("from jit_accel.pipeline import JiTPipeline\n")
    if by == "package":
        pipe = JiTPipeline.from_pretrained(folder)
    else:
        pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert isinstance(pipe, JiTPipeline)
    assert_same_images(pipe, "run")


def test_an_adapter_is_put_on_its_base(old_folders):
    pipe = load_pipeline("run")
    pipe.load_lora_weights("adapter/lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_same_images(pipe, "adapter")


@pytest.mark.parametrize("name", ["run", "muon", "adapter"])
def test_a_checkpoint_draws_the_same_images(old_folders, name):
    assert_same_images(load_pipeline(name, "auto" if name == "run" else None), "checkpoint" if name == "run" else name)


def test_the_averages_of_a_checkpoint_are_those_of_its_files(old_folders):
    checkpoint = last_checkpoint(old_folders / "run")
    assert averages_of(checkpoint) == ["0.5", "auto"]
    for average in ("0.5", "auto", "model"):
        stem = average if average == "model" else f"ema_{average}"
        stored = load_file(checkpoint / f"{stem}.safetensors")
        loaded = load_pipeline("run", average).transformer.state_dict()
        assert all(torch.equal(loaded[key], stored[key]) for key in stored)
