"""jit_accel.sample with models of arrays, of numbers beside the noise, and of several labels an image."""

import json

import numpy as np
import pytest
import torch
from helpers import in_fresh_accelerate
from PIL import Image

import jit_accel as jit
from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.sample import main
from jit_accel.sample.image_plan import classes_of, label_of_several

SIZES = {"img_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 4, "num_heads": 2, "bottleneck_dim": 4}
SIZES |= {"in_context_len": 2, "in_context_start": 1, "num_classes": 4}
NAMES = ["cat", "a+b", "old", "wet"]
COLUMNS = {"names": ["age", "pose"], "sizes": [1, 2], "mean": [40.0, 0.0, 0.0], "std": [10.0, 0.1, 2.0]}
CT = (-1024.0, 3071.0)
MODELS = {
    "arrays": ({"in_channels": 2}, {"value_range": CT}),
    "bytes": ({"in_channels": 5}, {}),
    "grey": ({"in_channels": 1}, {"value_range": CT}),
    "numbers": ({"vector_sizes": [1, 2]}, {"vectors": COLUMNS}),
    "several": ({"has_several_labels": True}, {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of pipelines by their names, and the pipelines."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, (sizes, own) in MODELS.items():
        torch.manual_seed(0)
        network = JiTTransformer2DModel(**SIZES, **sizes).eval()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.3)
        pipe = JiTPipeline(network, JiTScheduler(), NAMES, **own)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(root / name)
        found[name] = str(root / name), pipe
    return found


@pytest.fixture
def sample(models, tmp_path):
    def run(name: str, *flags: str, output: str = "out") -> int:
        how = ("--num_inference_steps", "2", "--mixed_precision", "no", "--output_dir", str(tmp_path / output))
        with in_fresh_accelerate():
            return main(["--model", models[name][0], *how, *flags])

    return run


def found_in(folder, ending):
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob(f"0*/*.{ending}"))}


def test_arrays_are_files_in_the_units_of_the_data(sample, models, tmp_path):
    assert sample("arrays", "--num_images", "8", "--grid", "--trajectory") == 0
    found = found_in(tmp_path / "out", "npy")
    assert list(found)[:2] == ["000_cat/000000.npy", "000_cat/000004.npy"]
    values = np.load(found["000_cat/000004.npy"])
    assert (values.shape, values.dtype) == ((8, 8, 2), np.float32)
    tensor = jit.generate(models["arrays"][1], [4], num_inference_steps=2)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose((values - CT[0]) / (CT[1] - CT[0]) * 255, tensor, atol=0.51)
    assert (values % 1 != 0).any()
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 2 * 2 * grid.height / 4
        assert np.ptp(np.asarray(grid.convert("RGB")), axis=2).max() == 0


def test_a_training_reads_arrays_back(sample, tmp_path):
    assert sample("arrays", "--num_images", "8", "--grid") == 0
    source = jit.open_images(tmp_path / "out", in_channels=2, value_range=CT)
    assert (source.num_images, source.num_classes) == (8, 4)
    assert sample("bytes", "--num_images", "8", output="bytes") == 0
    source = jit.open_images(tmp_path / "bytes", in_channels=5)
    assert (source.num_images, source.pixels.value_range) == (8, None)


def test_a_resume_makes_arrays_that_are_cut_off_again(sample, tmp_path, capsys):
    assert sample("bytes", "--num_images", "4") == 0
    found = found_in(tmp_path / "out", "npy")
    before = {name: path.read_bytes() for name, path in found.items()}
    first, second, *_ = found.values()
    first.write_bytes(before["000_cat/000000.npy"][:-1])
    second.unlink()
    assert sample("bytes", "--num_images", "4", "--resume") == 0
    assert "2 of them now" in capsys.readouterr().out
    assert {name: path.read_bytes() for name, path in found.items()} == before


def test_grey_of_a_range_is_pictures_or_arrays(sample, tmp_path):
    assert sample("grey", "--num_images", "4") == 0
    assert sample("grey", "--num_images", "4", "--format", "npy", output="arrays") == 0
    with Image.open(tmp_path / "out" / "000_cat" / "000000.png") as picture:
        pixels = np.asarray(picture)
    values = np.load(tmp_path / "arrays" / "000_cat" / "000000.npy")[..., 0]
    np.testing.assert_array_equal(np.rint((values - CT[0]) / (CT[1] - CT[0]) * 255), pixels)


@pytest.mark.parametrize("format", ["png", "npz"])
def test_pictures_of_arrays_are_refused(format, sample, capsys):
    assert sample("arrays", "--format", format) == 2
    assert f"--format {format}: the model makes images of 2 channels" in capsys.readouterr().err


def as_pixels(images):
    return images.permute(0, 2, 3, 1).numpy()


def test_numbers_are_given_to_all_images(sample, models, tmp_path, capsys):
    assert sample("numbers", "--vectors", "pose=0.1,-2", "age=34", "--num_images", "8") == 0
    assert "have none" not in capsys.readouterr().err
    wanted = jit.generate(models["numbers"][1], [5], num_inference_steps=2, vectors=[[34, 0.1, -2]])
    with Image.open(tmp_path / "out" / "001_a-b" / "000005.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), as_pixels(wanted)[0])
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["settings"]["vectors"] == "pose=0.1,-2 age=34"
    assert sample("numbers", "--vectors", "age=35", "pose=0.1,-2", "--num_images", "8", "--resume") == 2
    assert sample("numbers", "--num_images", "8", "--resume") == 2
    assert "--vectors was pose=0.1,-2 age=34 and is None now" in capsys.readouterr().err


ROWS = [(20, [0.1, 1]), (60, [-0.2, 3])]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "bare.csv"])
def test_each_image_has_its_row_of_a_file(ending, sample, models, tmp_path):
    file, mark = tmp_path / f"rows.{ending}", "\t" if ending == "tsv" else ","
    if ending == "jsonl":
        file.write_text("\n".join(json.dumps({"pose": pose, "age": age, "other": "x"}) for age, pose in ROWS))
    else:
        edges = " []" if ending == "bare.csv" else " "
        lines = [mark.join(["age", "note", "pose"])]
        lines += [mark.join([str(age), "x", f'"{str(pose).strip(edges)}"']) for age, pose in ROWS]
        file.write_text("\n".join(lines))
    assert sample("numbers", "--vectors", str(file), "--images_per_class", "3") == 0
    vectors = [[age, *pose] for age, pose in (*ROWS, ROWS[0])]
    how = {"labels": [None] * 3, "num_inference_steps": 2}
    wanted = as_pixels(jit.generate(models["numbers"][1], range(3), vectors=vectors, **how))
    for number, one in enumerate(wanted):
        with Image.open(tmp_path / "out" / "none" / f"{number:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), one)
    assert sample("numbers", "--vectors", str(file), "--classes", "cat,wet", output="named") == 0
    assert len(list((tmp_path / "named").rglob("*.png"))) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("bytes", ["age=3"], "was trained without numbers: leave it out"),
        ("numbers", ["age=3"], "pose is missing: give age=0 pose=0,0"),
        ("numbers", ["age=x", "pose=1,2"], "--vectors age=x pose=1,2: age is 'x' and not finite numbers"),
        ("numbers", ["age=1", "pose=1,2,3"], "3 numbers of pose: give 2"),
        ("numbers", ["age=1", "pose=1,2", "size=3"], "size is no column of the model's"),
        ("numbers", ["age=1", "age=2"], "age is given twice"),
        ("numbers", ["34"], "34 is no NAME=VALUE, and no file"),
        ("numbers", ["nothing.csv"], "cannot be read (No such file"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(name, words, message, sample, tmp_path, capsys):
    assert sample(name, "--vectors", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_wrong_is_named(sample, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    file.write_text('age,pose\n1,"[1, 2]"\n2,\n')
    assert sample("numbers", "--vectors", str(file)) == 2
    assert "row 2: pose is '' and not finite numbers" in capsys.readouterr().err
    file.write_text("age,pose\n")
    assert sample("numbers", "--vectors", str(file)) == 2
    assert "has no rows" in capsys.readouterr().err
    file = tmp_path / "rows.jsonl"
    for line in ("{", "[34]"):
        file.write_text(f'{{"age": 34, "pose": [1, 2]}}\n{line}\n')
        assert sample("numbers", "--vectors", str(file)) == 2
        assert 'cannot be read (line 2 is not like {"age": 34})' in capsys.readouterr().err


def test_images_may_have_several_classes(sample, models, tmp_path, capsys):
    assert sample("several", "--classes", "wet+cat", "a+b", "0+2+3", "old", "--images_per_class", "2", "--grid") == 0
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["000+002+003_cat-old-wet", "000+003_cat-wet", "001_a-b", "002_old"]
    how = {"labels": [[0, 3], [0, 2, 3]], "num_inference_steps": 2}
    wanted = as_pixels(jit.generate(models["several"][1], [1, 1], **how))
    for folder, one in zip(("000+003_cat-wet", "000+002+003_cat-old-wet"), wanted):
        with Image.open(tmp_path / "out" / folder / "000001.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), one)
    alone = jit.generate(models["several"][1], [6], num_inference_steps=2)
    with Image.open(tmp_path / "out" / "002_old" / "000006.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), as_pixels(alone)[0])
    more = ("--classes", "cat+wet,a+b,cat+old+wet,old,cat+old", "--images_per_class", "2", "--resume")
    assert sample("several", *more) == 0
    assert "2 of them now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("bytes", ("--classes", "cat+wet"), "one class an image: name one"),
        ("several", ("--classes", "cat+none"), "names no class beside others"),
        ("several", ("--classes", "cat+"), "no such class"),
        ("several", ("--classes", "cat+cow"), "--classes cow: no such class"),
        ("several", ("--classes", "cat+wet", "--format", "npz"), "holds one class an image"),
    ],
)
def test_several_classes_that_cannot_be_are_refused(name, flags, message, sample, capsys):
    assert sample(name, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_set_of_classes_has_a_number_of_its_own():
    sets = [[a, b] for a in range(4) for b in range(a + 1, 4)] + [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3]]
    numbers = [label_of_several(labels[::-1], 4) for labels in sets]
    assert len(set(numbers)) == len(sets)
    assert min(numbers) > 4
    assert [classes_of(number, 4) for number in numbers] == sets
    assert [classes_of(label, 4) for label in (0, 3, 4)] == [[0], [3], []]
