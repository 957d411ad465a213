"""Guidance that the network learns: targets made of its own predictions, sampling at one call a step."""

import json

from helpers import train_here

from jit_accel.monitor.log import read_metrics

GUIDED = ("--model_guidance", "2", "--proj_dropout", "0.1", "--max_steps", "6")


def losses(folder) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


def test_a_guided_training_goes_on_bit_for_bit_and_its_pipeline_needs_no_guidance(images, tmp_path, capsys):
    data = ("--data_path", str(images))
    assert train_here(*data, "--output_dir", str(tmp_path / "whole"), *GUIDED) == 0
    parts = (*data, "--output_dir", str(tmp_path / "parts"), *GUIDED, "--resume", "auto")
    assert train_here(*parts, "--save_every_steps", "3", "--keep_checkpoints", "9") == 0
    resumed = (*data, "--output_dir", str(tmp_path / "resumed"), *GUIDED)
    assert train_here(*resumed, "--resume", str(tmp_path / "parts/checkpoints/step_00000003")) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]
    index = json.loads((tmp_path / "whole/pipeline/model_index.json").read_text())
    assert index["guidance_scale"] == 1.0
    assert "has learnt guidance" not in "".join(capsys.readouterr())
    assert train_here(*data, *GUIDED, "--output_dir", str(tmp_path / "plan"), "--guidance_scale", "2", "--dry_run") == 0
    assert "--guidance_scale 2 guides samples of a network that has learnt guidance" in "".join(capsys.readouterr())
    plain = (*data, "--output_dir", str(tmp_path / "plain"), *GUIDED[2:])
    assert train_here(*plain) == 0
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")


def test_a_guidance_that_nothing_can_be_learnt_of_is_refused(images, tmp_path, capsys):
    command = ("--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--model_guidance")
    assert train_here(*command, "0.5") == 2
    assert "--model_guidance 0.5: must be 1 (none) or more" in capsys.readouterr().err
    assert train_here(*command, "2", "--label_drop_prob", "0") == 2
    assert "raise --label_drop_prob" in capsys.readouterr().err
    (tmp_path / "flat").mkdir()
    for path in images.glob("*/*.png"):
        (tmp_path / "flat" / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    flat = ("--data_path", str(tmp_path / "flat"), *command[2:], "2")
    assert train_here(*flat) == 2
    assert "is a guidance on labels, and this data has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
