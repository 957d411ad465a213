"""Training that is killed at any moment and goes on with other numbers of processes sees each image once an epoch."""

import json
import random
import time
from pathlib import Path

import datasets
import pytest
from data_samples import tar
from helpers import Group, images_seen, last_checkpoint, train_group

from jit_accel.prepare import main as prepare

NUM_IMAGES, STEPS = 44, 66
FLAGS = (
    *("--max_steps", str(STEPS), "--gradient_accumulation_steps", "1", "--save_every_steps", "1", "--resume", "auto"),
    *("--no_horizontal_flip", "--shuffle_buffer", "3"),
)


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory):
    """The same pictures in every kind of container."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    (folder / "parquet").mkdir()
    for shard in range(3):
        part = rows.shard(3, shard).cast_column("image", datasets.Image(decode=False))
        part = part.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
        part.to_parquet(folder / "parquet" / f"{shard}.parquet", batch_size=4)
    files = sorted(images.glob("*/*.png"))
    for shard in range(3):
        members = {f"{n:04d}.png": file.read_bytes() for n, file in enumerate(files) if n % 3 == shard}
        tar(folder / "tar" / f"{shard}.tar", members)
    assert prepare(["--data_path", str(images), "--output_dir", str(folder / "uint8"), "--img_size", "28"]) == 0
    return {"folder": images, **{kind: folder / kind for kind in ("parquet", "tar", "uint8")}}


def step_reached(output):
    return int(last_checkpoint(output).name.removeprefix("step_")) if list(output.glob("checkpoints/step_*")) else 0


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["folder", "parquet", "tar", "uint8"])
def test_killed_and_resumed_by_one_two_three_and_one_processes(tmp_path, sources, kind):
    output, notes, seen = tmp_path / "run", tmp_path / "notes", {}
    notes.mkdir()
    chance = random.Random(kind)
    environment = {"TEST_IMAGES_FOLDER": str(notes)}
    flags = (*FLAGS, "--data_path", str(sources[kind]), "--output_dir", str(output))
    for phase, (processes, batch_size, workers) in enumerate([(1, 6, 0), (2, 3, 2), (3, 2, 1)]):
        sizes = ("--batch_size", str(batch_size), "--num_workers", str(workers))
        group = Group((*flags, *sizes), tmp_path / f"log{phase}.txt", processes, environment)
        goal = step_reached(output) + 4
        while step_reached(output) < goal:
            assert all(process.is_alive() for process in group.processes), group.output()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        group.kill()
        seen |= images_seen(notes, step_reached(output))
        assert f"{processes} x cpu" in group.output()
    train_group(tmp_path, *flags, "--batch_size", "6", environment=environment)
    seen |= images_seen(notes, STEPS)
    assert sorted(seen) == list(range(STEPS * 6))
    starts = range(0, STEPS * 6 - NUM_IMAGES, NUM_IMAGES)
    epochs = [{seen[p] for p in range(start, start + NUM_IMAGES)} for start in starts]
    assert len(epochs) == 8
    assert all(len(epoch) == NUM_IMAGES for epoch in epochs)
    state = json.loads((last_checkpoint(output) / "state.json").read_text())
    assert len(json.dumps(state["feed"])) < 300  # whatever the history
