"""Models of numbers, and of several labels, measured with those of the reference's images."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import png
from helpers import in_fresh_accelerate
from PIL import Image

import jit_accel as jit
from jit_accel import JiTPipeline, JiTScheduler, JiTTransformer2DModel
from jit_accel.evaluate import evaluator as evaluators
from jit_accel.evaluate import main

COUNT = 10
SIZES = {"img_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "bottleneck_dim": 4}
SIZES |= {"in_context_len": 2, "in_context_start": 1, "num_classes": 3}
NAMES = ["cat", "dog", "wet"]
COLUMNS = {"names": ["age", "pose"], "sizes": [1, 2], "mean": [4.0, 0.0, 0.0], "std": [2.0, 1.0, 9.0]}


def build(**settings):
    torch.manual_seed(0)
    own = {"vectors": COLUMNS} if "vector_sizes" in settings else {}
    pipe = JiTPipeline(JiTTransformer2DModel(**SIZES, **settings).eval(), JiTScheduler(), NAMES, **own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tags(n):
    return [name for bit, name in enumerate(NAMES) if n >> bit & 1] or ["cat", "wet"]


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    given = {
        "image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(COUNT)],
        "label": [NAMES[2 - n % 3] for n in range(COUNT)],
        "tags": [tags(n) for n in range(COUNT)],
        "age": list(range(COUNT)),
        "pose": [[n, -n] for n in range(COUNT)],
    }
    for name, rows in (("a", slice(0, 6)), ("b", slice(6, COUNT))):
        part = pa.table({column: values[rows] for column, values in given.items()})
        pq.write_table(part, tmp_path / "photos" / f"{name}.parquet", row_group_size=2)
    return str(tmp_path / "photos")


@pytest.fixture
def asked(monkeypatch):
    """What the network is asked for: {number: (label, numbers)}."""
    found, generate = {}, evaluators.generate_batches

    def noted(pipeline, numbers, labels=None, vectors=None, **how):
        for place, number in enumerate(numbers):
            found[number] = labels and labels[place], vectors and vectors[place]
        return generate(pipeline, numbers, labels=labels, vectors=vectors, **how)

    monkeypatch.setattr(evaluators, "generate_batches", noted)
    return found


def evaluate(pipe, photos, tmp_path, *flags):
    pipe.save_pretrained(tmp_path / "model")
    how = ("--model", str(tmp_path / "model"), "--reference", photos, "--features", "tiny")
    how = (*how, "--num_images", str(2 * COUNT), "--num_inference_steps", "1")
    with in_fresh_accelerate():
        return main([*how, "--output", str(tmp_path / "found.json"), *flags])


def test_each_image_of_the_reference_lends_its_numbers_and_its_label(photos, tmp_path, asked, capsys, tiny):
    assert evaluate(build(vector_sizes=[1, 2]), photos, tmp_path) == 0
    said = capsys.readouterr()
    assert "have the labels and numbers of the reference's images" in said.out
    assert "have none" not in said.err
    assert sorted(asked) == list(range(2 * COUNT))
    lent = [(2 - int(age) % 3, [age, *pose]) for age, *pose in ([n, n, -n] for n in map(float, range(COUNT)))]
    for epoch in (range(COUNT), range(COUNT, 2 * COUNT)):
        assert sorted(asked[number] for number in epoch) == sorted(lent)
    first = dict(asked)
    assert [first[number][1][0] for number in range(COUNT)] != sorted(first[number][1][0] for number in range(COUNT))
    found = jit.measure(build(vector_sizes=[1, 2]), photos, num_images=12, features="tiny", num_inference_steps=1)
    assert np.isfinite(list(found.values())).all()
    assert {number: asked[number] for number in range(12)} == {number: first[number] for number in range(12)}


def test_several_labels_are_lent_where_their_column_is_named(photos, tmp_path, asked, capsys, tiny):
    pipe = build(has_several_labels=True)
    assert evaluate(pipe, photos, tmp_path) == 0
    assert all(lent == (None, None) for lent in asked.values())
    assert evaluate(pipe, photos, tmp_path, "--label_column", "tags") == 0
    assert "have the labels of the reference's images" in capsys.readouterr().out
    wanted = sorted([NAMES.index(name) for name in tags(n)] for n in range(COUNT))
    assert sorted(sorted(asked[number][0]) for number in range(COUNT)) == wanted


def test_cells_of_several_labels_are_taken_apart(tmp_path, asked, tiny):
    root = tmp_path / "cells"
    root.mkdir()
    for n in range(COUNT):
        (root / f"{n}.png").write_bytes(png(n))
    lines = [f"{n}.png,{';'.join(tags(n))}" for n in range(COUNT)]
    (root / "metadata.csv").write_text("\n".join(["file_name,tags", *lines]))
    how = "--label_column", "tags", "--label_separator", ";"
    assert evaluate(build(has_several_labels=True), str(root), tmp_path, *how) == 0
    wanted = sorted([NAMES.index(name) for name in tags(n)] for n in range(COUNT))
    assert sorted(sorted(asked[number][0]) for number in range(COUNT)) == wanted


def test_bare_bytes_are_read_as_the_same_pictures(photos, tmp_path, asked, tiny):
    pixels = [np.asarray(Image.open(io.BytesIO(png(n))).convert("RGB").resize((8, 8))) for n in range(COUNT)]
    files = []
    for one in pixels:
        Image.fromarray(one).save(file := io.BytesIO(), "png")
        files.append(file.getvalue())
    table = pa.table({"scan": [one.tobytes() for one in pixels], "image": files, "age": list(range(COUNT))})
    table = table.append_column("pose", pa.array([[n, -n] for n in range(COUNT)]))
    pq.write_table(table, tmp_path / "a.parquet")
    found, flags = [], ("--image_column", "scan", "--raw_shape", "8", "8", "3", "--raw_dtype", "uint8")
    for given in ((), flags):
        assert evaluate(build(vector_sizes=[1, 2]), str(tmp_path / "a.parquet"), tmp_path, *given) == 0
        found.append([record["metrics"] for record in json.loads((tmp_path / "found.json").read_text())])
        (tmp_path / "found.json").unlink()
        assert sorted(asked[number][1][0] for number in range(COUNT)) == list(range(COUNT))
    assert found[0] == found[1]


def test_a_reference_without_the_numbers_lends_nothing(photos, tmp_path, asked, capsys, tiny):
    pipe = build(vector_sizes=[1, 2])
    pipe.register_to_config(vectors=COLUMNS | {"names": ["age", "size"]})
    assert evaluate(pipe, photos, tmp_path) == 0
    assert "these images have none: name images with such columns" in capsys.readouterr().err
    assert all(lent == (None, None) for lent in asked.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "m", "--reference", "a.npz"), "has no columns: leave it out"),
        (("--images", "m", "--reference", "a"), "there is none: leave it out"),
    ],
)
def test_a_label_column_needs_a_model_and_images(flags, message, capsys):
    assert main([*flags, "--label_column", "tags"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--label_separator", ";"), "--label_separator ;: says what is in the cells of a column"),
        (("--raw_shape", "8", "8"), "--raw_shape 8 8: needs the type of the numbers"),
        (("--raw_shape", "8", "8", "--raw_dtype", "uint8"), "--raw_shape 8 8: a file as --reference has no columns"),
    ],
)
def test_how_data_are_read_is_checked_at_once(flags, message, capsys):
    assert main(["--model", "m", "--reference", "a.npz", *flags]) == 2
    assert message in capsys.readouterr().err
