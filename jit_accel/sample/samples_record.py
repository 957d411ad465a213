"""The output folder's `samples.json`: a folder is begun, continued, and never mixed with other images."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jit_accel.base.errors import UserError, changed_settings
from jit_accel.data.formats.scan import SAMPLES_RECORD
from jit_accel.sample.image_plan import SamplePlan

VERSION = 1


def record_of(settings: dict, model: dict, plan: SamplePlan) -> dict:
    """Return what stands in samples.json.

    Args:
        settings: what the images follow from, by the names of the flags.
        model: what identifies the weights, with its `fingerprint`.
    """
    record = {"version": VERSION, "settings": settings, "model": model, "num_images": plan.num_images}
    return {**record, "classes": plan.classes()}


def open_folder(folder: Path, record: dict, resume: bool) -> None:
    """Make the folder, or make sure that it is for the images of `record`; what it holds stays as it is.

    Raises:
        UserError: it holds anything and `resume` is not set, or it holds other images.
        OSError: it cannot be written to.
    """
    problem = None
    if folder.exists() and not folder.is_dir():
        problem = "is a file: give a new folder."
    elif (folder / SAMPLES_RECORD).is_file():
        if resume:
            problem = _difference(folder, record)
        else:
            problem = "holds samples already: add --resume to go on, or give another folder."
    elif found := [name for name in sorted(_names(folder)) if holds_files(folder / name)]:
        problem = f"is not empty ({found[0]}) and holds no {SAMPLES_RECORD} of a sampling to go on with: "
        problem += "give a new folder."
    if problem:
        raise UserError(problem, about="output_dir", value=folder)
    folder.mkdir(parents=True, exist_ok=True)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def holds_files(path: Path) -> bool:
    """Return whether a path is more than empty folders, as a sampling that was stopped leaves them."""
    if path.name.startswith("."):
        return False
    return not path.is_dir() or any(not part.is_dir() for part in path.rglob("*"))


def _difference(folder: Path, now: dict) -> str | None:
    """Return how the images in a folder differ from those that are asked for now; more of them are no difference."""
    try:
        then = json.loads((folder / SAMPLES_RECORD).read_text(encoding="utf-8"))
        changed = changed_settings(then["settings"], now["settings"])
        changed += _changed_model(then["model"], now["model"])
        changed += _fewer_images(then["classes"], now["classes"])[: not changed]
        if then["version"] != VERSION:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {SAMPLES_RECORD} is broken, or of another version of this program: give a new folder."
    return f"was begun otherwise: {'; '.join(changed)}: use the same settings, or another folder." if changed else None


def _changed_model(then: dict, now: dict) -> list[str]:
    old, new = (f"{model['path']}{f' with --ema {e}' if (e := model['ema']) else ''}" for model in (then, now))
    is_same = then["fingerprint"] == now["fingerprint"]
    return [] if is_same else [f"--model: the weights of {new} are not those of {old} at that time"]


def _fewer_images(then: list[dict], now: list[dict]) -> list[str]:
    counts = {entry["label"]: entry["num_images"] for entry in now}
    return [
        f"{entry['num_images']} images of class {entry['name']} belong to it and {counts.get(entry['label'], 0)} are "
        "asked for now (--classes, --num_images, --images_per_class)"
        for entry in then
        if counts.get(entry["label"], 0) < entry["num_images"]
    ]
