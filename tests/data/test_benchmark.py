"""The benchmark of the data path runs on every kind of data and says what its figures mean."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import SIZE, image_folder, parquet, png, tar

from jit_accel.data import Source, open_images

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loader.py"
_spec = importlib.util.spec_from_file_location("loader_benchmark", SCRIPT)
benchmark = sys.modules["loader_benchmark"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)
main = benchmark.main

QUICK = ["--img_size", "8", "--batch_size", "4", "--model", "JiT-Ti/4", "--seconds", "0.05"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Squares:
    """A store of pixels, as `jit_accel.prepare` makes them."""

    is_encoded = False

    def __len__(self):
        return 9

    def read(self, indices, out):
        out[:] = indices[:, None, None, None]
        return np.zeros(len(indices), np.int64), {}


def data_of(kind, root):
    if kind == "folder":
        return image_folder(root, 6)
    if kind == "parquet":
        return parquet(root / "one.parquet", range(12))
    return tar(
        root / "one.tar", {f"{n}.{end}": png(n) if end == "png" else b"1" for n in range(6) for end in ("png", "cls")}
    )


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_every_stage_and_number_of_workers_is_printed(tmp_path, capsys, kind):
    path = data_of(kind, tmp_path / "data")
    report = tmp_path / "report.json"
    assert main(["--data_path", str(path), *QUICK, "--h100s", "8", "--json", str(report)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    figures = json.loads(report.read_text())
    names = ["read", "decode", "crop", "collate"]
    assert list(figures["stages_images_per_s"]) == names
    assert all(rate > 0 for rate in figures["stages_images_per_s"].values())
    printed = [line[0] for line in lines if len(line) > 1]
    assert [name for name in printed if name in names] == names
    counts = benchmark.worker_counts(figures["cores"])
    assert [run["num_workers"] for run in figures["loader"]] == counts
    assert {str(count) for count in counts} <= set(printed)
    assert figures["bytes_per_image"] == pytest.approx(len(png(0)), abs=10)
    text = " ".join(word for line in lines for word in line)
    assert "Memory of the largest of" in text
    assert "images/s on this CPU: an estimate by one of its blocks, tried here." in text
    assert "1 CPU needs" in text
    assert "8 H100s need" in text


def test_a_store_of_pixels_has_nothing_to_decode():
    source = Source("store", "prepared", Squares(), 9, ("a",), "", 0)
    found = benchmark.measure_stages(source, img_size=8, batch_size=4, device=CPU, seconds=0.02)
    assert list(found.rates) == ["read", "collate"]
    assert found.bytes_per_image == 3 * 8 * 8


def test_stages_add_up_in_time():
    assert benchmark.Stages({"read": 100, "decode": 50, "crop": 100}).together == pytest.approx(25)


def test_broken_images_are_left_out_unless_all_are(tmp_path):
    image_folder(tmp_path, 4, classes=1)
    (tmp_path / "c0" / "0000.png").write_bytes(b"broken")
    how = {"img_size": SIZE, "batch_size": 2, "device": CPU, "seconds": 0.05}
    found = benchmark.measure_stages(open_images(tmp_path), **how)
    assert found.bad_images >= 1  # the sample repeats a small folder
    assert list(found.rates) == ["read", "decode", "crop", "collate"]
    for path in (tmp_path / "c0").iterdir():
        path.write_bytes(b"broken")
    assert main(["--data_path", str(tmp_path), *QUICK]) == 2


def test_the_decoded_squares_are_those_of_training(tmp_path):
    from PIL import Image

    from jit_accel.data.reading.decode import decode_image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 21, 3), np.uint8)).save(buffer, "PNG")
    assert (benchmark._crop(benchmark._decode(buffer.getvalue()), 8) == decode_image(buffer.getvalue(), 8)).all()


def test_what_a_gpu_elsewhere_needs_follows_the_arithmetic():
    assert benchmark.images_per_s_of_h100("JiT-B/16", 256) == 2600
    assert benchmark.images_per_s_of_h100("JiT-L/16", 256) == pytest.approx(2600 * 25.2 / 87.9, rel=0.01)
    assert benchmark.images_per_s_of_h100("JiT-B/32", 512) == pytest.approx(2600 * 25.2 / 26, rel=0.02)


def loaders(rates):
    return [benchmark.EndToEnd(workers, rate, 100, None, None) for workers, rate in rates.items()]


@pytest.mark.parametrize(
    ("gpus", "rates", "words", "suffices"),
    [
        (1, {0: 200, 1: 180, 4: 700, 8: 1300}, "--num_workers 8 suffices", True),
        (1, {0: 1500, 1: 900}, "--num_workers 0 suffices", True),
        (8, {0: 500, 16: 8000, 32: 8100}, "--num_workers 2 suffices", True),
        (8, {0: 200, 2: 400}, "reaches 400 and limits the training to 5%; about 40 cores would do", False),
    ],
)
def test_the_verdict_counts_the_workers_of_each_process(gpus, rates, words, suffices):
    text, is_enough = benchmark.verdict(gpus, 1000, loaders(rates), cores=4, name="GPU")
    assert words in text
    assert is_enough is suffices


def test_worker_counts_end_with_all_cores():
    assert benchmark.worker_counts(1) == [0, 1]
    assert benchmark.worker_counts(6) == [0, 1, 2, 4, 6]
    assert benchmark.worker_counts(8) == [0, 1, 2, 4, 8]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_path", "/nowhere/at/all"], "no such file or folder"),
        (["--model", "JiT-Q/4"], "JiT-Q"),
        (["--img_size", "10"], "--img_size 10: must be a multiple of the patch size 4"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--num_workers", "-1"], "--num_workers -1"),
        (["--seconds", "0"], "--seconds 0"),
        (["--h100s", "0"], "--h100s 0: must be at least 1"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: cannot be written"),
    ],
)
def test_bad_flags_are_answered(tmp_path, capsys, flags, words):
    assert main(["--data_path", str(tmp_path), *QUICK, *flags]) == 2
    assert words in capsys.readouterr().err


def test_unknown_flags_exit_with_2():
    with pytest.raises(SystemExit) as exit:
        benchmark.parse_args(["--data_path", "x", "--worker", "3"])
    assert exit.value.code == 2
