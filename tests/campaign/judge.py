"""What must hold after each fault, and at the end: nothing is lost, damaged or there twice."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from campaign.kinds import GLOBAL_BATCH, SAMPLE_EVERY, STEPS
from helpers import rows, state
from safetensors.torch import load_file

from jit_accel.model.checkpoints import step_folders, step_of
from jit_accel.model.manifest import damage_of
from jit_accel.monitor.log import FAILED_FILE, INTERRUPTED_FILE, read_metrics
from jit_accel.monitor.metric_table import EMA_VAL_LOSS

CLOSE = 1e-6  # of weights, averages and moments, where the number of processes changed
CLOSE_METRICS = 1e-3
RESUMED = re.compile(r"Resumed from \S+ at step ([\d,]+)")
STOPPED = re.compile(r"Stopped by a signal at step ([\d,]+)")
OF_INTERVAL = ("train/loss_by_t/", "ema/")
Images = dict[int, str]  # by position in the run


class Broken(AssertionError):
    """A promise that a training did not keep."""


def check(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


def step_in(pattern: re.Pattern, printed: str) -> int | None:
    found = pattern.search(printed)
    return int(found[1].replace(",", "")) if found else None


def newest_sound(output: Path) -> int:
    """Return the step of the newest checkpoint that is as it was written, 0 where there is none."""
    return max((step_of(path) for path in step_folders(output / "checkpoints") if damage_of(path) is None), default=0)


def check_folder(output: Path, flipped: Sequence[Path]) -> None:
    """Check what lies in a run's folder while nobody trains; only checkpoints of `flipped` files may be damaged."""
    for path in step_folders(output / "checkpoints"):
        damage = damage_of(path)
        check(damage is None or any(path in file.parents for file in flipped), f"{path.name}: {damage}")
    steps = [row["step"] for row in read_metrics(output)]
    check(steps == list(range(1, len(steps) + 1)), f"rows of the steps {steps}")


def read_notes(folder: Path) -> Images:
    """Return the images that the processes of one start took, by position; each must have been taken once."""
    seen: Images = {}
    for file in sorted(folder.glob("images_*.jsonl")):
        for line in file.read_text().splitlines():
            note = json.loads(line)
            for position, image in note["images"].items():
                check(int(position) not in seen, f"position {position} was taken twice in one start")
                check(int(position) // GLOBAL_BATCH == note["step"], f"position {position} was in step {note['step']}")
                seen[int(position)] = image
    return seen


def steps_noted(folder: Path) -> int:
    """Return how many steps the processes of a start have begun, by their notes."""
    counts = [file.read_bytes().count(b"\n") for file in folder.glob("images_*.jsonl")]
    return max(counts, default=0)


def check_end(output: Path, seen: Images, reference: Path, is_same: bool, flipped: Sequence[Path]) -> None:
    """Hold a finished training against an undisturbed one: bit for bit, or closely where the layout changed.

    Of `flipped` files sample sheets may be others: a sheet that is there is not drawn again.
    """
    _check_images(seen, read_notes(reference / "notes"))
    expected = reference / "run"
    _check_tensors(state(output), state(expected), is_same)
    weights = [load_file(next(run.glob("pipeline/transformer/*.safetensors"))) for run in (output, expected)]
    _check_tensors(*weights, is_same)
    _check_rows(rows(output), rows(expected), is_same)
    for step in range(SAMPLE_EVERY, STEPS + 1, SAMPLE_EVERY):
        name = f"step_{step:08d}.png"
        sheets = [run / "samples" / name for run in (output, expected)]
        check(sheets[0].exists(), f"the sheet {name} is missing")
        may_differ = not is_same or sheets[0] in flipped
        check(may_differ or sheets[0].read_bytes() == sheets[1].read_bytes(), f"the sheet {name} is another")
    left = {path.name for path in output.rglob("*")} & {FAILED_FILE, INTERRUPTED_FILE, ".lock", ".holder.json"}
    left |= {path.name for path in output.rglob("*") if re.match(r"tmp_|\..*\.tmp$", path.name)}
    check(not left, f"left behind: {sorted(left)}")


def _check_images(seen: Images, expected: Images) -> None:
    check(sorted(seen) == list(range(STEPS * GLOBAL_BATCH)), "positions were left out, or came twice")
    check(seen == expected, "other images were taken than in an undisturbed training")
    size = len(set(expected.values()))
    for start in range(0, len(seen) - size + 1, size):
        epoch = {seen[position] for position in range(start, start + size)}
        check(len(epoch) == size, f"the epoch that begins at {start} has {len(epoch)} of {size} images")


def _check_tensors(found: Mapping, expected: Mapping, is_same: bool) -> None:
    check(found.keys() == expected.keys(), f"other tensors: {sorted(found.keys() ^ expected.keys())}")
    for name, tensor in found.items():
        if is_same:
            check(torch.equal(tensor, expected[name]), f"{name} is not bit for bit what it would have been")
        else:
            far = (tensor.double() - expected[name].double()).abs().max().item()
            check(far <= CLOSE, f"{name} is {far:.3g} from what it would have been")


def _of_steps(row: dict) -> dict:
    """Return the metrics of a row that are not of an interval of the log, which a stop ends early."""
    return {key: value for key, value in row.items() if key == EMA_VAL_LOSS or not key.startswith(OF_INTERVAL)}


def _check_rows(found: list[dict], expected: list[dict], is_same: bool) -> None:
    check([row["step"] for row in found] == list(range(1, STEPS + 1)), "rows are missing, or there twice")
    for row, other in zip(map(_of_steps, found), map(_of_steps, expected)):
        check(row.keys() == other.keys(), f"step {row['step']} has other metrics: {sorted(row.keys() ^ other.keys())}")
        for key, value in row.items():
            far = abs(value - other[key]) / max(1.0, abs(other[key])) if value != other[key] else 0.0
            check(far <= (0 if is_same else CLOSE_METRICS), f"{key} of step {row['step']} is {value}, not {other[key]}")
