"""`python -m jit_accel.evaluate --pairs`."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from data_samples import tar
from helpers import Group, clothes, in_fresh_accelerate, train_here
from PIL import Image, ImageOps

import jit_accel as jit
from jit_accel.base.errors import UserError
from jit_accel.config.groups import ConditionConfig
from jit_accel.data.batches.degradations import degradation_of
from jit_accel.data.formats.sources import open_images
from jit_accel.evaluate import main
from jit_accel.evaluate.features import load_features
from jit_accel.evaluate.pair_evaluator import PairEvaluator
from jit_accel.evaluate.pair_scores import PairScores
from jit_accel.evaluate.pairs import label_function, open_pairs
from jit_accel.evaluate.statistics import Moments, frechet_distance
from jit_accel.model.generation import SamplerSettings
from jit_accel.monitor.log import read_metrics
from jit_accel.prepare import main as prepare

ENLARGED = ConditionConfig("downscale:4")
FAST = ("--num_inference_steps", "2", "--method", "euler", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run that learns to enlarge."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = ("--condition_from", "downscale:4", "--max_steps", "2", "--save_every_steps", "2", "--ema_decays", "0")
    flags += ("--learning_rate", "0.1", "--warmup_steps", "0")  # so that guidance makes a difference
    assert train_here("--data_path", str(images), *flags, "--output_dir", str(out)) == 0
    return out


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """A run without a condition."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert train_here("--data_path", str(images), "--max_steps", "2", "--output_dir", str(out)) == 0
    return out


def evaluate(tmp_path, *flags: str) -> dict[str, dict]:
    """Evaluate in this process; return the records by what was scored."""
    file = tmp_path / "found.json"
    file.unlink(missing_ok=True)
    with in_fresh_accelerate():
        assert main([*flags, *FAST, "--output", str(file)]) == 0
    return {record["scored"]: record for record in json.loads(file.read_text())}


def test_the_scores_are_those_of_images_made_by_hand(run, images, tmp_path, capsys):
    found = evaluate(tmp_path, "--model", str(run), "--pairs", str(images), "--samples_each", "3")
    assert list(found) == ["untouched", "sample", "mean of 3"]
    assert {record["num_images"] for record in found.values()} == {44}
    assert {record["condition_from"] for record in found.values()} == {"downscale:4"}
    pairs = open_pairs(str(images), ENLARGED, pipe := jit.load(run), 28, 50_000)
    scores, sums = PairScores(), {row: [] for row in found}
    for part, _ in pairs.parts(64, 0, 1):
        how = {"labels": part.labels, "conditions": part.conditions, "num_inference_steps": 2, "method": "euler"}
        samples = [jit.generate(pipe, (part.keys + i).tolist(), **how) for i in range(3)]
        sums["sample"] += [scores(some, part.truths) for some in samples]
        mean = torch.stack(samples).double().mean(0).round().to(torch.uint8)
        sums["mean of 3"].append(scores(mean, part.truths))
        sums["untouched"].append(scores((part.conditions * 255).round().to(torch.uint8), part.truths))
    for row, of_parts in sums.items():
        expected = torch.cat(of_parts).mean(0).tolist()
        assert [found[row]["metrics"][name] for name in ("psnr", "ssim", "mae")] == pytest.approx(expected, rel=1e-4)
    table = capsys.readouterr().out
    assert "untouched" in table
    assert f"{found['sample']['metrics']['psnr']:.5g} [{found['sample']['metrics']['psnr_low']:.5g}, " in table


def test_the_mean_of_samples_has_no_greater_error_than_one(run, images, tmp_path):
    found = evaluate(tmp_path, "--model", str(run), "--pairs", str(images), "--samples_each", "4", "--metrics", "mae")
    assert set(found["sample"]["metrics"]) == {"mae", "mae_low", "mae_high"}
    rounding = 0.5 / 255
    assert found["mean of 4"]["metrics"]["mae"] <= found["sample"]["metrics"]["mae"] + rounding


@pytest.mark.multiprocess
def test_two_processes_find_what_one_does(run, images, tmp_path, tiny):
    flags = ("--model", str(run), "--pairs", str(images), "--samples_each", "2", "--num_images", "43")
    flags += ("--features", "tiny", "--metrics", "psnr,ssim,mae,fd")
    alone = evaluate(tmp_path, *flags)
    together = tmp_path / "two.json"
    environment = {"TEST_MAIN": "jit_accel.evaluate:main", "TEST_SETUP": "tiny_features:install"}
    group = Group([*flags, *FAST, "--output", str(together)], tmp_path / "log.txt", 2, environment)
    assert group.wait() == [0, 0], group.output()
    for record in json.loads(together.read_text()):
        expected = alone[record["scored"]]
        assert record["num_images"] == expected["num_images"] == 43
        assert list(record["metrics"].values()) == pytest.approx(list(expected["metrics"].values()), rel=1e-4)
    assert (tmp_path / "pairs.png").is_file()


@pytest.mark.multiprocess
def test_more_processes_than_images_find_the_same(run, images, tmp_path):
    flags = ("--model", str(run), "--pairs", str(images), "--num_images", "2")
    alone = evaluate(tmp_path, *flags)
    together, environment = tmp_path / "three.json", {"TEST_MAIN": "jit_accel.evaluate:main"}
    group = Group([*flags, *FAST, "--output", str(together)], tmp_path / "log.txt", 3, environment)
    assert group.wait() == [0, 0, 0], group.output()
    for record in json.loads(together.read_text()):
        assert record["metrics"] == pytest.approx(alone[record["scored"]]["metrics"], rel=1e-4)


def test_results_stand_in_the_folders_record_and_on_its_card_beside_a_sheet(run, images):
    with in_fresh_accelerate():
        assert main(["--model", str(run), "--pairs", str(images), "--num_images", "9", *FAST]) == 0
    assert len(json.loads((run / "evaluation.json").read_text())) == 2
    card = (run / "pipeline" / "README.md").read_text()
    assert "| untouched |" in card
    assert str(images) not in card
    sheet = Image.open(run / "pairs.png")
    assert sheet.height == 3 * (84 + 2)


def test_what_made_the_conditions_is_found_for_run_checkpoint_and_pipeline_folder(run, images, tmp_path):
    for place in (run, run / "pipeline", run / "checkpoints" / "step_00000002"):
        found = evaluate(tmp_path, "--model", str(place), "--pairs", str(images), "--num_images", "4")
        assert found["sample"]["condition_from"] == "downscale:4"
    other = evaluate(tmp_path, "--model", str(run), "--pairs", str(images), "--condition_from", "blur:1")
    assert other["untouched"]["metrics"]["psnr"] > found["untouched"]["metrics"]["psnr"]
    (tmp_path / "alone").symlink_to(run / "pipeline")


def test_streams_and_folders_give_the_same_scores_and_bad_images_are_named(run, images, tmp_path, capsys):
    files = sorted(images.glob("*/*.png"))
    members = {f"{number:03d}.png": file.read_bytes() for number, file in enumerate(files)}
    tar(tmp_path / "a.tar", members)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, data in members.items():
        (flat / name).write_bytes(data)
    (flat / "zzz.png").write_bytes(b"broken")
    of_kinds = [evaluate(tmp_path, "--model", str(run), "--pairs", str(tmp_path / name)) for name in ("a.tar", "flat")]
    for row in ("untouched", "sample"):
        assert of_kinds[0][row]["metrics"] == pytest.approx(of_kinds[1][row]["metrics"], rel=1e-5)
    assert "1 images cannot be read and are left out" in capsys.readouterr().err.replace("\n", " ")


def test_labels_go_by_name_else_by_number(run, images, tmp_path):
    pipe, source = jit.load(run), open_images(images)
    names = list(pipe.config.class_names.values() if isinstance(pipe.config.class_names, dict) else source.class_names)
    assert [label_function(source, pipe)(label) for label in range(4)] == [0, 1, 2, 3]
    for name in ("0", "1"):  # the last class of the model comes first in this data
        folder = tmp_path / "some" / (names[3] if name == "0" else names[0])
        folder.mkdir(parents=True)
        Image.new("RGB", (28, 28)).save(folder / "a.png")
    some = open_images(tmp_path / "some")
    assert [names[label_function(some, pipe)(label)] for label in range(2)] == list(some.class_names)
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    pipe.register_to_config(class_names=None)
    assert [label_function(some, pipe)(label) for label in range(2)] == [0, 1]
    for number in range(5):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
        Image.new("RGB", (28, 28)).save(tmp_path / "many" / str(number) / "a.png")
    with pytest.raises(UserError, match="has 5 classes, and the model knows 4"):
        label_function(open_images(tmp_path / "many"), pipe)


def test_a_grey_condition_is_scored_as_a_picture_and_one_of_other_channels_not_at_all(images, tmp_path):
    out, how = tmp_path / "grey", ("--condition_from", "grey", "--max_steps", "2", "--warmup_steps", "0")
    assert train_here("--data_path", str(images), *how, "--output_dir", str(out)) == 0
    found = evaluate(tmp_path, "--model", str(out), "--pairs", str(images), "--num_images", "8")
    assert found["untouched"]["metrics"]["psnr"] == pytest.approx(100, abs=1)  # of grey images


@pytest.mark.parametrize("count", ["1", "2"])
def test_the_distance_of_restored_images_from_the_truths_is_measured_too(run, images, tmp_path, tiny, count):
    flags = ("--model", str(run), "--pairs", str(images), "--features", "tiny", "--samples_each", count)
    found = evaluate(tmp_path, *flags, "--metrics", "fd")
    assert all({"psnr", "ssim", "mae", "fd_tiny"} <= set(record["metrics"]) for record in found.values())
    for record in found.values():
        assert record["metrics"]["fd_tiny_low"] < record["metrics"]["fd_tiny"] < record["metrics"]["fd_tiny_high"]
    network, pipe = load_features("tiny"), jit.load(run)
    sums = {row: Moments(16) for row in ("truth", "untouched", "sample")}
    for part, _ in open_pairs(str(images), ENLARGED, pipe, 28, 50_000).parts(64, 0, 1):
        how = {"labels": part.labels, "conditions": part.conditions, "num_inference_steps": 2, "method": "euler"}
        sums["sample"].add(network(jit.generate(pipe, part.keys.tolist(), **how))["main"])
        sums["truth"].add(network(part.truths)["main"])
        sums["untouched"].add(network((part.conditions * 255).round().to(torch.uint8))["main"])
    truth = sums.pop("truth").gaussian()
    for row, moments in sums.items():
        expected = frechet_distance(moments.gaussian(), truth)
        assert found[row]["metrics"]["fd_tiny"] == pytest.approx(expected, rel=1e-4)


def test_conditions_that_the_data_brings_are_scored(images, tmp_path):
    """Of a folder, of a column, of a store: the negatives of the images."""
    files = sorted(images.glob("*/*.png"))
    for number, file in enumerate(files):
        for folder, turn in (("clothes", lambda x: x), ("negatives", ImageOps.invert)):
            path = tmp_path / folder / file.parent.name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            turn(Image.open(file).convert("RGB")).save(path)
    data, partners = str(tmp_path / "clothes"), str(tmp_path / "negatives")
    flags = ("--data_path", data, "--condition_path", partners, "--max_steps", "2", "--holdout", "0.2")
    assert train_here(*flags, "--output_dir", str(tmp_path / "run")) == 0
    trained = read_metrics(tmp_path / "run")[-1]
    assert trained["val/psnr_untouched"] < 10
    model = ("--model", str(tmp_path / "run"), "--num_images", "44")
    by_folder = evaluate(tmp_path, *model, "--pairs", data, "--condition_path", partners)
    of_store = tmp_path / "store"
    flags = ("--data_path", data, "--condition_path", partners, "--output_dir", str(of_store), "--img_size", "28")
    assert prepare([*flags, "--num_workers", "1", "--format", "uint8"]) == 0
    by_store = evaluate(tmp_path, *model, "--pairs", str(of_store))
    rows = [
        {
            "image": {"bytes": file.read_bytes(), "path": None},
            "label": 0,
            "other": {"bytes": other.read_bytes(), "path": None},
        }
        for file, other in zip(*(sorted((tmp_path / name).glob("*/*.png")) for name in ("clothes", "negatives")))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    by_column = evaluate(tmp_path, *model, "--pairs", str(tmp_path / "a.parquet"), "--condition_column", "other")
    for found in (by_folder, by_store, by_column):
        assert found["sample"]["condition_from"] == "the data's"
        for name in ("psnr", "ssim", "mae"):  # the interval depends on their order
            expected = by_folder["untouched"]["metrics"][name]
            assert found["untouched"]["metrics"][name] == pytest.approx(expected, rel=1e-5)
    assert by_store["sample"]["metrics"]["psnr"] == pytest.approx(by_folder["sample"]["metrics"]["psnr"], rel=1e-4)
    mean = np.mean([np.abs(2 * np.asarray(Image.open(file), float) / 255 - 1).mean() for file in files])
    assert by_folder["untouched"]["metrics"]["mae"] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "PLAIN", "--pairs", "IMAGES"), "was trained without a condition: measure it against --reference"),
        (("--model", "RUN", "--reference", "IMAGES"), "was trained with a condition, of which it makes images: give"),
        (("--model", "RUN", "--pairs", "nowhere"), "--pairs nowhere: "),
        (("--pairs", "IMAGES"), "--model: not given"),
        (("--model", "RUN", "--pairs", "IMAGES", "--reference", "x"), "--reference x: does not go with --pairs"),
        (("--model", "RUN", "--pairs", "IMAGES", "--images", "x"), "--images x: does not go with --pairs"),
        (("--model", "RUN", "--pairs", "IMAGES", "--guidance_scale", "1,2"), "--guidance_scale 1 2: must be one value"),
        (("--model", "RUN", "--pairs", "IMAGES", "--metrics", "psrn"), "--metrics psrn: unknown; choose from psnr"),
        (("--model", "RUN", "--pairs", "IMAGES", "--samples_each", "0"), "--samples_each 0: must be at least 1"),
        (
            ("--model", "RUN", "--pairs", "IMAGES", "--condition_from", "grey"),
            "the conditions have 1 channels, and the",
        ),
        (("--model", "RUN", "--pairs", "IMAGES", "--condition_from", "downscale:29"), "leaves less than a"),
        (("--model", "RUN", "--pairs", "IMAGES", "--img_size", "30"), "--img_size 30: must be a multiple"),
        (("--model", "PLAIN", "--reference", "IMAGES", "--samples_each", "2"), "--samples_each 2: is for conditions"),
        (
            ("--model", "RUN", "--pairs", "IMAGES", "--condition_from", "grey", "--condition_column", "x"),
            "--condition_column x: does not go with --condition_from",
        ),
        (("--model", "RUN", "--pairs", "IMAGES", "--condition_path", "nowhere"), "--condition_path nowhere"),
        (("--model", "ALONE", "--pairs", "IMAGES"), "has no condition, and the model's folder does not say"),
    ],
)
def test_what_does_not_fit_is_refused(run, plain, images, tmp_path, monkeypatch, capsys, tiny, flags, message):
    jit.load(run).save_pretrained(tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run, "PLAIN": plain, "IMAGES": images, "ALONE": tmp_path / "alone"}
    with in_fresh_accelerate():
        flags = [str(places.get(flag, flag)) for flag in flags]
        assert main([*flags, *(("--features", "tiny") if "--reference" in flags else ())]) == 2
    errors = capsys.readouterr().err
    assert message in errors.replace("\n", " "), errors
    assert "Traceback" not in errors


def test_the_python_function_that_measures_refuses_conditions(run, images):
    with pytest.raises(UserError, match=r"pipe: was trained with a condition: score it with .* --pairs"):
        jit.measure(jit.load(run), images)


def test_the_sheet_shows_the_settings_asked_for_where_others_are_measured_too(run, images, tmp_path):
    flags, sheets = ("--model", str(run), "--pairs", str(images), "--num_images", "4"), []
    for more in (("--guidance_scale", "9"), ("--guidance_scale", "9", "--no_unguided"), ()):
        found = tmp_path / "found.json"
        found.unlink(missing_ok=True)
        evaluate(tmp_path, *flags, *more)
        assert len(json.loads(found.read_text())) == (3 if more and "--no_unguided" not in more else 2)
        sheets.append(Image.open(tmp_path / "pairs.png").tobytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_samples_of_a_condition_differ_and_the_first_is_the_same_however_many(run, images):
    pipe = jit.load(run)
    pairs = open_pairs(str(images), ENLARGED, pipe, 28, 5)
    with in_fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        how = SamplerSettings(2, method="euler")
        one, three = (PairEvaluator(pairs, PairScores(), accelerator, count).measure(pipe, how) for count in (1, 3))
        other = PairEvaluator(pairs, PairScores(), accelerator, seed=1).measure(pipe, how)
    assert (one.num_images, three.num_images) == (5, 5)
    assert torch.equal(one.first["sample"], three.first["sample"])
    assert not torch.equal(one.first["sample"], other.first["sample"])
    assert one.scores["untouched"]["psnr"] == other.scores["untouched"]["psnr"]
    assert not np.array_equal(one.first["sample"], three.first["mean of 3"])


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_channels_and_range_are_scored(tmp_path, capsys, channels):
    data, out, draws = tmp_path / "arrays", tmp_path / "out", np.random.default_rng(0)
    data.mkdir()
    for number in range(24):
        coarse = draws.normal(size=(7, 7, channels)).repeat(4, 0).repeat(4, 1)
        np.save(data / f"{number:02d}.npy", (40 * coarse).clip(-100, 300).astype(np.float32))
    flags = ("--data_path", str(data), "--in_channels", str(channels), "--value_range", "-100", "300")
    flags += ("--condition_from", "downscale:4", "--holdout", "0.3", "--max_steps", "2", "--output_dir", str(out))
    assert train_here(*flags) == 0
    trained = read_metrics(out)[-1]
    found = evaluate(tmp_path, "--model", str(out), "--pairs", str(data))
    assert found["sample"]["num_images"] == 24
    arrays = np.stack([np.load(file) for file in sorted(data.iterdir())])
    truths = torch.from_numpy(((arrays + 100) / 400 * 255).round()).permute(0, 3, 1, 2)
    conditions = degradation_of("downscale:4")(truths / 127.5 - 1, np.arange(24))
    expected = ((conditions + 1) * 127.5 - truths).abs().mean() / 255
    assert found["untouched"]["metrics"]["mae"] == pytest.approx(float(expected), abs=1e-3)
    assert trained["val/mae_untouched"] == pytest.approx(float(expected), rel=0.5)
    sheet = Image.open(tmp_path / "pairs.png")
    assert (sheet.width > 10 * sheet.height) == (channels == 5)  # whose channels lie side by side
    if channels == 5:
        with in_fresh_accelerate():
            assert main(["--model", str(out), "--pairs", str(data), "--metrics", "lpips", "--img_size", "56"]) == 2
        assert "--metrics lpips" in capsys.readouterr().err


def test_several_labels_are_given_to_the_network(tmp_path):
    root, out = clothes(tmp_path / "clothes"), tmp_path / "out"
    files = sorted(root.rglob("*.png"))
    lines = [
        {"file_name": f.relative_to(root).as_posix(), "tags": [f.parent.name, "wet"][: 1 + n % 2]}
        for n, f in enumerate(files)
    ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--data_path", str(root), "--label_column", "tags", "--condition_from", "grey", "--holdout", "0.3")
    assert train_here(*flags, "--max_steps", "2", "--output_dir", str(out)) == 0
    assert "val/psnr" in read_metrics(out)[-1]
    pipe = jit.load(out)
    pairs = open_pairs(str(root), ConditionConfig("grey"), pipe, 28, 99, label_column="tags")
    ((part, _),) = pairs.parts(64, 0, 1)
    wet = pipe.label_ids(["wet"])[0]
    assert [wet in label for label in part.labels] == [n % 2 == 1 for n in range(44)]
    found = evaluate(tmp_path, "--model", str(out), "--pairs", str(root), "--label_column", "tags")
    assert found["sample"]["num_images"] == 44
