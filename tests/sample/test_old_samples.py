"""Samplings that fc94876 began are finished as it would have."""

import shutil

import numpy as np
import pytest
from helpers import OLD_FOLDERS
from PIL import Image

from jit_accel.sample import main


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_sampling_goes_on(old_folders, tmp_path, format):
    folder = tmp_path / "samples"
    shutil.copytree("samples" if format == "png" else "samples_npz", folder)
    old = {file: file.read_bytes() for file in folder.rglob("*.png")}
    flags = ["--model", "run/pipeline", "--images_per_class", "3", "--batch_size", "4", "--num_inference_steps", "3"]
    flags += ["--mixed_precision", "no", "--output_dir", str(folder), "--format", format]
    assert main([*flags, "--resume"]) == 0
    if format == "png":
        found = np.stack([np.array(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
        assert all(file.read_bytes() == content for file, content in old.items())
    else:
        stored = np.load(folder / "samples.npz")
        found = stored["arr_0"][np.argsort(stored["arr_1"], kind="stable")]  # as the folders of the classes are
    expected = np.load(OLD_FOLDERS / "expected.npz")["samples"]
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []
