"""Statistics and results that fc94876 wrote are read, and lead to its numbers."""

import json
import shutil

import pytest

from jit_accel.evaluate import main

SAMPLING = ["--num_images", "12", "--num_inference_steps", "3", "--guidance_scale", "2", "--batch_size", "8"]


@pytest.mark.parametrize("reference", ["reference.npz", "images"])
def test_an_evaluation_finds_the_same_numbers(old_folders, tmp_path, tiny, reference):
    run = tmp_path / "run"
    shutil.copytree("run", run)
    flags = ["--features", "tiny", "--metrics", "fd", "kd", "precision", "recall", "--mixed_precision", "no"]
    assert main(["--model", str(run), "--reference", reference, *SAMPLING, *flags, "--few_on_card"]) == 0
    old = json.loads((old_folders / "run" / "evaluation.json").read_text())
    for file in (run / "evaluation.json", run / "pipeline" / "evaluation.json"):
        records = json.loads(file.read_text())
        assert records[: len(old)] == old
        for before, now in zip(old, records[len(old) :], strict=True):
            assert now["metrics"] == pytest.approx(before["metrics"], rel=1e-3)
    card = (run / "pipeline" / "README.md").read_text()
    assert card.count("| 2.0 | 0.1 to 1.0 | heun | 3 | 12 | tiny |") == 2
