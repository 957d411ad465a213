"""`jit_accel.sample`: images by number, as files or .npz, shared by processes and continued."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import patch_environment
from diffusers import FlowMatchEulerDiscreteScheduler
from golden import load_golden
from helpers import Group
from PIL import Image

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.data.formats.sources import open_images
from jit_accel.model.generation import SamplerSettings, generate_batches
from jit_accel.model.transformer import JiTTransformer2DModel
from jit_accel.sample import main, parse_args
from jit_accel.sample.image_files import (
    ImageFiles,
    NpzFile,
    denoising,
    is_whole,
    open_array,
    pixels,
    start_noise,
    strip_images,
)
from jit_accel.sample.image_plan import ImageId, SamplePlan, label_of, plan_images

NAMES = ["T-shirt/top", "../up", "crème brûlée", "猫", "a" * 300, "cat", "Cat", "cat", ".", "with, comma"]
FAST = ("--num_inference_steps", "2", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    JiTPipeline(load_golden("tiny").model(), JiTScheduler(), NAMES, guidance_scale=1.5).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sample(model, tmp_path):
    def run(*flags: str, output: str = "out") -> int:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        with patch_environment(ACCELERATE_USE_CPU="true"):
            return main(["--model", model, "--output_dir", str(tmp_path / output), *FAST, *flags])

    return run


def sample_group(model: str, output: Path, *flags: str, setup: str | None = None) -> tuple[list[int], str]:
    """Sample in two real processes; return their exit codes and what they said."""
    environment = {"TEST_MAIN": "jit_accel.sample:main"} | ({"TEST_SETUP": setup} if setup else {})
    log = output.parent / f"log_{time.monotonic_ns()}.txt"
    group = Group(["--model", model, "--output_dir", str(output), *FAST, *flags], log, 2, environment)
    codes = group.wait()
    return codes, group.output()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


# --- which images


def test_the_number_of_an_image_does_not_depend_on_what_else_is_made():
    everything = plan_images(parse_args(["--model", "x", "--num_images", "25"]), 10, None)
    assert everything.ids() == [ImageId(n, n % 10) for n in range(25)]
    some = plan_images(parse_args(["--model", "x", "--classes", "7", "2", "--images_per_class", "2"]), 10, None)
    assert some.ids() == [(2, 2), (7, 7), (12, 2), (17, 7)]
    no_class = plan_images(parse_args(["--model", "x", "--classes", "none", "--num_images", "3"]), 10, None)
    assert no_class.ids() == [(0, 10), (1, 10), (2, 10)]
    assert sum(plan_images(parse_args(["--model", "x"]), 1000, None).counts) == 64


def test_classes_are_named_in_any_way_people_write_them():
    def chosen(*classes: str) -> tuple[int, ...]:
        return plan_images(parse_args(["--model", "x", "--classes", *classes]), 10, NAMES).labels

    assert chosen("CAT", "8", "none") == (5, 8, 10)
    assert chosen("3,1,3") == (1, 3)
    assert chosen("with, comma") == (9,)
    assert chosen("猫") == (3,)
    assert chosen("Cat") == (6,)


def test_a_class_may_be_called_none():
    def label(name: str, *names: str) -> int:
        return label_of(name, len(names), names)

    assert [label(name, "None", "b") for name in ("None", "NONE", "none")] == [0, 0, 2]
    assert [label(name, "none", "b") for name in ("none", "None")] == [0, 0]
    assert [label(name, "a", "b") for name in ("none", "None")] == [2, 2]


def test_a_network_without_classes_makes_images_of_no_class(sample, tmp_path, capsys):
    network = JiTTransformer2DModel(**load_golden("tiny").config | {"num_classes": 0, "depth": 2})
    pipe = JiTPipeline(network.eval(), JiTScheduler(), guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "free")
    assert sample("--model", str(tmp_path / "free"), "--num_images", "2", "--grid") == 0
    assert list(files(tmp_path / "out")) == ["grid.png", "none/000000.png", "none/000001.png"]
    ((_, images),) = generate_batches(pipe, [1], settings=SamplerSettings(2))
    made = np.asarray(Image.open(tmp_path / "out" / "none" / "000001.png")).astype(int)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - made).max() <= 1
    assert sample("--model", str(tmp_path / "free"), "--classes", "0", output="other") == 2
    assert "--classes 0: the model knows no classes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="knows no classes"):
        pipe(0)


def test_a_folder_with_a_scheduler_of_diffusers_is_sampled_by_it(sample, tmp_path, capsys):
    pipe = JiTPipeline(load_golden("tiny").model(), FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "flow")
    flags = ("--model", str(tmp_path / "flow"), "--num_images", "1")
    assert sample(*flags) == 0
    assert "2 FlowMatchEulerDiscreteScheduler steps" in capsys.readouterr().out
    ((_, images),) = generate_batches(pipe, [0], settings=SamplerSettings(2))
    made = np.asarray(Image.open(next((tmp_path / "out").rglob("0*.png")))).astype(int)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - made).max() <= 1
    refused = ("--method", "heun"), ("--time_shift", "2"), ("--trajectory",)
    for more in refused:
        assert sample(*flags, *more, output="other") == 2
        assert " ".join(more) in capsys.readouterr().err


def test_folders_of_classes_are_safe_and_distinct_and_in_the_order_of_the_labels():
    plan = SamplePlan(tuple(range(10)), (1,) * 10, 10, tuple(NAMES))
    folders = [plan.folder(label) for label in range(10)]
    assert folders == sorted(set(folders))
    assert all(len(folder) < 50 and not set("/\\. ,") & set(folder) for folder in folders)
    assert folders[:4] == ["000_T-shirt-top", "001_up", "002_crème-brûlée", "003_猫"]
    wide = SamplePlan(tuple(range(1001)), (1,) * 1001, 1000)
    assert [wide.folder(label) for label in (0, 999, 1000)] == ["000", "999", "none"]
    marks = SamplePlan((0, 1), (1, 1), 2, ("🏳\ufe0f\u200d🌈", "🐱 cat\ufe0f 🎉 \ufe0f"))
    assert [marks.folder(label) for label in (0, 1)] == ["000", "001_cat\ufe0f"]


# --- files


def test_files_are_what_the_pipeline_makes_of_the_same_numbers(sample, model, tmp_path, capsys):
    assert sample("--classes", "none", "5", "--images_per_class", "2", "--guidance_scale", "2", "--grid") == 0
    pipe = JiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for number, label, folder in ((0, None, "none"), (1, None, "none"), (5, 5, "005_cat"), (15, 5, "005_cat")):
        z = start_noise(pipe, 0, [number], 16, 16)
        (expected,) = pipe([label], 2, guidance_scale=2.0, latents=z, output_type="np").images
        made = np.asarray(Image.open(tmp_path / "out" / folder / f"{number:06d}.png"), np.float32) / 255
        assert np.abs(made - expected).max() <= 0.51 / 255 + 1e-5
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["num_images"], record["settings"]["guidance_scale"]) == (4, 2.0)
    assert [entry["folder"] for entry in record["classes"]] == ["005_cat", "none"]
    assert "Images:     4 of 2 classes, 4 of them now" in capsys.readouterr().out


def test_training_reads_the_folder_back_and_takes_no_picture_for_a_sample(sample, tmp_path):
    assert sample("--num_images", "20", "--grid", "--trajectory", "--animation", "gif") == 0
    source = open_images(str(tmp_path / "out"))
    assert (source.num_images, source.num_classes) == (20, 10)
    labels = source.images.dataset["label"]
    assert [int(Path(row["path"]).stem) % 10 for row in source.images.dataset["image"]] == list(labels)
    assert sample("--classes", "cat", "--num_images", "3", "--grid", output="one") == 0
    assert open_images(str(tmp_path / "one")).num_images == 3
    assert Image.open(tmp_path / "out" / "animation.gif").n_frames == 3


def test_images_of_another_shape(sample, tmp_path):
    assert sample("--num_images", "1", "--height", "24", "--width", "32", "--format", "webp", "--trajectory") == 0
    assert Image.open(tmp_path / "out" / "000_T-shirt-top" / "000000.webp").size == (32, 24)
    assert sample("--num_images", "1", "--height", "24", "--format", "webp", "--resume") == 2


@pytest.mark.multiprocess
def test_shifted_times_and_a_guide_are_the_pipelines_and_stand_in_the_record(sample, model, tmp_path, capsys):
    worse = JiTPipeline.from_pretrained(model)
    with torch.no_grad():
        for weights in worse.transformer.parameters():
            weights.mul_(0.9)
    worse.save_pretrained(tmp_path / "worse")
    flags = ("--num_images", "2", "--guidance_scale", "2", "--guidance_interval", "0", "1")
    assert sample(*flags, "--time_shift", "3", "--guide", str(tmp_path / "worse")) == 0
    assert "2 Heun steps, time shift 3, guidance 2" in capsys.readouterr().out
    pipe = JiTPipeline.from_pretrained(model)
    pipe.guide = worse
    settings = SamplerSettings(2, 2.0, (0.0, 1.0), "heun", 3.0)
    ((_, expected),) = generate_batches(pipe, [0, 1], settings=settings)
    made = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").rglob("*.png"), key=lambda p: p.name)]
    assert sorted(image.tobytes() for image in made) == sorted(
        image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in expected
    )
    again = (*flags, "--guide", str(tmp_path / "worse"), "--resume")
    assert sample(*again, "--time_shift", "3") == 0
    assert sample(*again) == 2
    assert "time_shift" in capsys.readouterr().err
    assert sample(*flags, "--time_shift", "3", "--resume") == 2
    assert "guide" in capsys.readouterr().err
    assert sample(*flags, "--guide", str(tmp_path / "nowhere"), output="new") == 2
    assert "--guide" in capsys.readouterr().err


def test_files_are_the_same_from_two_processes_and_at_any_batch_size(sample, model, tmp_path):
    assert sample("--num_images", "7", "--batch_size", "5") == 0
    codes, said = sample_group(model, tmp_path / "two", "--num_images", "7", "--batch_size", "3")
    assert codes == [0, 0], said
    assert "on 2 x cpu" in said
    assert said.count("Images:") == 1
    assert len(files(tmp_path / "out")) == 7
    assert files(tmp_path / "two") == files(tmp_path / "out")


def test_resume_makes_what_is_missing_or_broken_and_leaves_the_rest(sample, tmp_path, capsys):
    assert sample("--num_images", "6", "--batch_size", "4") == 0
    folder, before = tmp_path / "out", files(tmp_path / "out")
    gone, cut, scratched, *kept = (folder / name for name in before)
    gone.unlink()
    scratched.write_bytes(scratched.read_bytes()[:200] + b"scratched" + scratched.read_bytes()[209:])
    cut.write_bytes(cut.read_bytes()[:-7])
    (gone.parent / f".{gone.name}.{2**22 + 1}.tmp").write_bytes(b"half")  # no process has this number
    ages = [path.stat().st_mtime_ns for path in kept]
    assert sample("--num_images", "6", "--resume", "--batch_size", "1") == 0
    assert files(folder) == before
    assert [path.stat().st_mtime_ns for path in kept] == ages
    assert not list(folder.rglob("*.tmp"))
    assert "3 of them now" in capsys.readouterr().out
    assert sample("--num_images", "8", "--resume") == 0  # more of the same
    assert before.items() < files(folder).items()
    assert sample("--num_images", "8", "--resume") == 0
    assert "all of them before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"settings": []}, {"model": {"fingerprint": 1}}, {"classes": [{}]}, {"classes": 1}, {"version": 0}]
)
def test_a_record_that_is_broken_is_told(sample, tmp_path, capsys, change):
    assert sample("--num_images", "1") == 0
    record = tmp_path / "out" / "samples.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert sample("--num_images", "1", "--resume") == 2
    assert "samples.json is broken, or of another version" in capsys.readouterr().err


def test_an_image_that_breaks_on_the_way_is_named(sample, tmp_path, monkeypatch, capsys):
    flush = ImageFiles.flush

    def flush_and_spoil(self):
        flush(self)
        for path in self.folder.rglob("*.png"):
            path.write_bytes(b"spoilt")

    monkeypatch.setattr(ImageFiles, "flush", flush_and_spoil)
    assert sample("--num_images", "1", "--grid") == 2
    assert ".png: cannot be read" in capsys.readouterr().err


def test_resume_with_other_settings_is_refused(sample, tmp_path, capsys):
    differences = {
        ("--seed", "1"): "--seed was 0 and is 1 now",
        ("--guidance_scale", "3", "--method", "euler"): "--guidance_scale was 1.5 and is 3.0 now; --method was heun",
        ("--guidance_interval", "0", "0.5"): "--guidance_interval was 0.1 1.0 and is 0.0 0.5 now",
        ("--format", "npz"): "--format was png and is npz now",
        ("--num_images", "2"): "1 images of class crème brûlée belong to it and 0 are asked for now",
    }
    assert sample("--num_images", "4") == 0
    for flags, difference in differences.items():
        assert sample("--num_images", "4", "--resume", *flags) == 2
        assert difference in capsys.readouterr().err
    assert len(files(tmp_path / "out")) == 4


def test_a_copy_of_the_model_goes_on(sample, model, tmp_path):
    assert sample("--num_images", "1") == 0
    shutil.copytree(model, tmp_path / "copy")
    assert sample("--num_images", "1", "--resume", "--model", str(tmp_path / "copy")) == 0


def test_empty_folders_of_a_sampling_that_was_stopped_are_in_nobodys_way(sample, tmp_path):
    (tmp_path / "out" / "000_T-shirt-top").mkdir(parents=True)
    assert sample("--num_images", "1") == 0


def test_resume_with_other_weights_is_refused(sample, model, tmp_path, capsys):
    assert sample("--num_images", "1") == 0
    pipe = JiTPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn.proj.weight.add_(0.01)
    pipe.save_pretrained(tmp_path / "trained_on")
    assert sample("--num_images", "1", "--resume", "--model", str(tmp_path / "trained_on")) == 2
    assert "--model: the weights of" in capsys.readouterr().err


def test_a_png_is_whole_only_with_its_size_and_its_end(tmp_path):
    path = tmp_path / "image.png"
    assert not is_whole(path, (16, 24))
    Image.new("RGB", (24, 16)).save(path)
    assert is_whole(path, (16, 24))
    assert not is_whole(path, (24, 16))
    path.write_bytes(b"")
    assert not is_whole(path, (16, 24))


# --- npz


@pytest.mark.multiprocess
def test_an_npz_that_was_stopped_is_finished_by_two_processes(sample, model, tmp_path, capsys, monkeypatch):
    write = NpzFile.write
    monkeypatch.setattr(NpzFile, "write", lambda *args: (write(*args), os.kill(os.getpid(), signal.SIGTERM))[0])
    assert sample("--num_images", "7", "--batch_size", "4", "--format", "npz") == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / ".parts").rglob("*.png"))) == 4
    monkeypatch.undo()
    flags = ("--num_images", "7", "--batch_size", "1", "--format", "npz", "--resume")
    codes, said = sample_group(model, tmp_path / "out", *flags)
    assert codes == [0, 0], said
    assert "4 of them there already" in said
    assert sample("--num_images", "7", output="png") == 0
    assert sample("--num_images", "7", "--format", "npz", "--grid", output="once") == 0
    path = tmp_path / "out" / "samples.npz"
    assert path.read_bytes() == (tmp_path / "once" / "samples.npz").read_bytes()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["samples.json", "samples.npz"]
    with np.load(path) as arrays:
        assert (arrays["arr_0"].shape, arrays["arr_0"].dtype) == ((7, 16, 16, 3), np.uint8)
        assert arrays["arr_1"].tolist() == list(range(7))
        images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "png").rglob("*.png"))]
        assert np.array_equal(arrays["arr_0"], images)
        assert np.array_equal(open_array(path, "arr_0"), images)
    assert sample(*flags) == 0
    assert sample("--num_images", "9", "--format", "npz", "--resume") == 2
    assert "samples.npz holds 7 images, and not the 9" in capsys.readouterr().err
    assert sample(*flags) == 0  # what was refused has changed nothing


def test_a_part_that_is_cut_off_counts_for_nothing(tmp_path):
    plan = SamplePlan((0, 1), (2, 2), 2)
    store = NpzFile(tmp_path, plan, (4, 4))
    store.prepare()
    images = np.arange(4 * 48, dtype=np.uint8).reshape(4, 4, 4, 3)
    store.write(plan.ids()[2:], images[2:])
    store.write(plan.ids()[:2], images[:2])
    store.flush()
    part = store.path(plan.ids()[1])
    part.write_bytes(part.read_bytes()[:-1])
    again = NpzFile(tmp_path, plan, (4, 4))
    assert again.missing() == plan.ids()[1:2]
    again.write(plan.ids()[1:2], images[1:2])
    again.flush()
    again.finish()
    assert np.array_equal(open_array(again.npz, "arr_0"), images)
    assert struct.unpack("<I", again.npz.read_bytes()[:4]) == (0x04034B50,)


# --- what goes wrong


def fail_on_the_second_process():
    """A disk that is full for one of the processes."""

    def fail(self, item, image):
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "1":
        ImageFiles._write = fail


@pytest.mark.multiprocess
def test_a_full_disk_of_one_process_ends_all_with_a_message(model, tmp_path):
    flags = ("--num_images", "40", "--batch_size", "4")
    codes, said = sample_group(model, tmp_path / "out", *flags, setup="test_sample:fail_on_the_second_process")
    assert codes == [2, 2], said
    assert "process 1: --output_dir" in said
    assert said.count("the disk is full") == 1
    assert "Traceback" not in said
    assert 0 < len(files(tmp_path / "out")) < 40


def test_a_signal_in_the_middle_of_a_batch_keeps_what_is_whole(sample, tmp_path, monkeypatch, capsys):
    write = ImageFiles.write

    def write_and_interrupt(self, items, images):
        write(self, items, images)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ImageFiles, "write", write_and_interrupt)
    assert sample("--num_images", "8", "--batch_size", "4") == 128 + signal.SIGINT
    assert "--resume goes on" in capsys.readouterr().out
    assert len(files(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--classes", "Kat"), "--classes Kat: no such class; use 0 to 9, or a name: T-shirt/top"),
        (("--classes", "Kat"), "Did you mean 'cat'?"),
        (("--classes", "10"), "--classes 10: no such class; use 0 to 9"),
        (("--classes", ","), "--classes ,: names no class"),
        (("--classes", "", "--images_per_class", "2"), "--classes : names no class"),
        (("--num_images", "0"), "--num_images 0: must be at least 1"),
        (("--num_images", "1" + 20 * "0"), "must be at least 1 and at most 10,000,000"),
        (("--images_per_class", "2000000"), "20,000,000 images are more than 10,000,000"),
        (("--num_inference_steps", "1" + 20 * "0"), "must be at least 1 and at most 10,000"),
        (("--img_size", "4" + 20 * "0"), "must be at least 1 and at most 16,384"),
        (("--images_per_class", "2", "--num_images", "2"), "--images_per_class 2: contradicts --num_images 2"),
        (("--img_size", "30"), "--img_size 30: must be a multiple of the patch size, 4: use 28 or 32"),
        (("--width", "30"), "--width 30: must be a multiple"),
        (("--guidance_scale", "-1"), "--guidance_scale -1: must be at least 0"),
        (("--guidance_scale", "nan"), "--guidance_scale nan: must be at least 0"),
        (("--guidance_interval", "0.8", "0.2"), "--guidance_interval 0.8 0.2: must be LO HI with 0 <= LO <= HI <= 1"),
        (("--mixed_precision", "fp16"), "--mixed_precision fp16: needs a GPU"),
        (("--gridd",), "--gridd: no such flag. Did you mean '--grid'?"),
        (("--ema", "0.5"), "--ema 0.5"),
        (("--model", "/nowhere/at/all"), "--model /nowhere/at/all: holds no pipeline"),
    ],
)
def test_wrong_settings_are_answered_and_nothing_is_written(sample, tmp_path, capsys, flags, message):
    assert sample(*flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_is_left_alone(sample, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert sample("--resume") == 2
    assert "is not empty (thesis.tex)" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert sample(output="file") == 2
    assert "is a file" in capsys.readouterr().err
    assert sample("--num_images", "1", output="begun") == 0
    assert sample("--num_images", "1", output="begun") == 2
    assert "holds samples already: add --resume" in capsys.readouterr().err


# --- pictures


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_a_trajectory_shows_what_the_network_predicts_and_ends_in_the_image(prediction):
    pipe = JiTPipeline(load_golden("tiny").model(), JiTScheduler(prediction_type=prediction))
    pipe.set_progress_bar_config(disable=True)
    z = start_noise(pipe, 3, [1, 12], 16, 16)
    shown, predicted = [], []
    hook = pipe.transformer.register_forward_hook(lambda _, args, out: predicted.append((*args[:2], out[0])))
    step_done = denoising(
        z, [0, 0.25, 0.5, 0.75, 1], [0, 2, 4], lambda *what: shown.append(what), pipe.scheduler.config.t_eps
    )
    more = {"method": "euler", "guidance_scale": 1.0, "output_type": "latent"}
    final = pipe([1, 2], 4, latents=z, callback_on_step_end=step_done, **more).images
    hook.remove()
    assert [t for t, _, _ in shown] == [0.0, 0.5, 1.0]
    assert np.array_equal(shown[0][1], pixels(z))
    assert np.array_equal(shown[-1][2], pixels(final))
    for k, (_, _, x) in zip((0, 2), shown):
        state, t, out = predicted[k]
        expected = out if prediction == "x" else state + (1 - t) * out
        assert np.abs(x.astype(int) - pixels(expected)).max() <= 1


def test_a_strip_shows_as_many_classes_as_it_can():
    assert [image.label for image in strip_images(SamplePlan(tuple(range(10)), (3,) * 10, 10), 6)] == [0, 1, 3, 5, 6, 8]
    assert strip_images(SamplePlan((4,), (3,), 10), 6) == [(4, 4), (14, 4), (24, 4)]
    assert len(strip_images(SamplePlan((1, 4), (9, 9), 10), 5)) == 5


@pytest.fixture(scope="module")
def enlarger(tmp_path_factory) -> str:
    """A network that is shown a picture, and copies what it is shown at the first step."""
    folder = tmp_path_factory.mktemp("enlarger") / "pipeline"
    sizes = {name: size for name, size in load_golden("tiny").model().config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    network = JiTTransformer2DModel(**sizes | {"condition_channels": 3})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    JiTPipeline(network, JiTScheduler(), NAMES).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(["b", "a one", "c"]):
        pixels = np.full((24, 24, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
    return str(tmp_path / "pictures")


def test_an_image_is_made_of_each_picture_and_bears_its_name(sample, enlarger, pictures, tmp_path):
    assert sample("--model", enlarger, "--condition_path", pictures) == 0
    made = sorted((tmp_path / "out").glob("*/*.png"))
    assert [str(path.relative_to(tmp_path / "out")) for path in made] == [
        "none/000000_a-one.png",
        "none/000001_b.png",
        "none/000002_c.png",
    ]
    shown = torch.stack([torch.full((3, 16, 16), 40 * i / 255) for i in (1, 0, 2)])
    pipe = JiTPipeline.from_pretrained(enlarger)
    ((_, expected),) = generate_batches(
        pipe, range(3), labels=[None] * 3, conditions=shown, settings=SamplerSettings(2)
    )
    for path, image in zip(made, expected):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - image.permute(1, 2, 0).numpy()).max() <= 1
    assert sample("--model", enlarger, "--condition_path", pictures, "--resume", "--num_images", "5") == 0
    assert len(list((tmp_path / "out").glob("none/00000[34]_*.png"))) == 2  # they come round again
    Image.new("RGB", (24, 24)).save(tmp_path / "pictures" / "d.png")
    assert sample("--model", enlarger, "--condition_path", pictures, "--resume") == 2


def test_classes_may_be_named_beside_pictures(sample, enlarger, pictures, tmp_path):
    assert sample("--model", enlarger, "--condition_path", pictures, "--classes", "cat", "--images_per_class", "2") == 0
    assert [path.name for path in sorted((tmp_path / "out").glob("005_cat/*.png"))] == [
        "000005_a-one.png",
        "000015_b.png",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "was trained with conditions: add --condition_path"),
        (("--condition_path", "nowhere"), "--condition_path nowhere"),
        (("--model", "{two_channels}", "--condition_path", "{pictures}"), "are read from Python alone"),
    ],
)
def test_pictures_that_cannot_be_shown_are_refused(sample, enlarger, pictures, tmp_path, capsys, flags, message):
    if "{two_channels}" in flags:
        sizes = JiTPipeline.from_pretrained(enlarger).transformer.config
        sizes = {name: sizes[name] for name in sizes if not name.startswith("_")} | {"condition_channels": 2}
        JiTPipeline(JiTTransformer2DModel(**sizes), JiTScheduler()).save_pretrained(tmp_path / "two")
    places = {"pictures": pictures, "two_channels": tmp_path / "two"}
    assert sample("--model", enlarger, *(flag.format(**places) for flag in flags)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures_are_shown_in_the_shape_of_the_images(sample, enlarger, pictures, tmp_path):
    assert sample("--model", enlarger, "--condition_path", pictures, "--height", "16", "--width", "32") == 0
    assert {Image.open(path).size for path in (tmp_path / "out").glob("none/*.png")} == {(32, 16)}


def test_a_picture_that_cannot_be_read_is_named(sample, enlarger, pictures, tmp_path, capsys):
    (tmp_path / "pictures" / "b.png").write_bytes(b"broken")
    assert sample("--model", enlarger, "--condition_path", pictures) == 2
    assert "b.png" in capsys.readouterr().err


def test_a_model_without_conditions_is_shown_nothing(sample, pictures, capsys):
    assert sample("--condition_path", pictures) == 2
    assert "was trained without conditions: leave it out" in capsys.readouterr().err
