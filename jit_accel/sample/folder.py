"""The output folder: begun, continued, and never mixed with other images."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jit_accel.base.errors import UserError
from jit_accel.base.files import disk_errors, write_json
from jit_accel.data.formats.scan import SAMPLES_RECORD
from jit_accel.sample.files import GO_ON
from jit_accel.sample.plan import Plan

VERSION = 1


def record_of(settings: dict, model: dict, plan: Plan) -> dict:
    """What stands in samples.json.

    Args:
        settings: what the images follow from, by the names of the flags.
        model: what tells the weights, with its `fingerprint`.
    """
    record = {"version": VERSION, "settings": settings, "model": model, "num_images": sum(plan.counts)}
    return {**record, "classes": plan.classes()}


def open_folder(folder: Path, record: dict, resume: bool) -> None:
    """Make the folder, or make sure that it is for the images of `record`; what it holds stays as it is.

    Raises:
        UserError: it holds anything and `resume` is not set, it holds other images, or it cannot be written to.
    """
    path = folder / SAMPLES_RECORD
    with disk_errors("output_dir", folder, GO_ON):
        if folder.exists() and not folder.is_dir():
            raise UserError("is a file: give a new folder.", about="output_dir", value=folder)
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if not resume:
                raise UserError(
                    "holds samples already: add --resume to go on, or give another folder.",
                    about="output_dir",
                    value=folder,
                )
            _compare(_read(path, folder), record, folder)
        elif found := [name for name in sorted(os.listdir(folder)) if holds_files(folder / name)]:
            raise UserError(
                f"is not empty ({found[0]}) and holds no {SAMPLES_RECORD} of a sampling to go "
                "on with: give a new folder.",
                about="output_dir",
                value=folder,
            )


def write_record(folder: Path, record: dict) -> None:
    """Write samples.json, when nothing more can be against the images. Raises `OSError`."""
    write_json(folder / SAMPLES_RECORD, record)


def holds_files(path: Path) -> bool:
    """Whether something in a folder is more than empty folders, as a sampling that was stopped leaves them."""
    if path.name.startswith("."):
        return False
    return not path.is_dir() or any(not part.is_dir() for part in path.rglob("*"))


def _read(path: Path, folder: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = [(record, {"settings", "model", "classes"}), (record["model"], {"path", "ema", "fingerprint"})]
        parts += [(entry, {"label", "name", "num_images"}) for entry in record["classes"]]
        is_whole = all(needed <= part.keys() for part, needed in parts) and isinstance(record["settings"], dict)
        if is_whole and record["version"] == VERSION and all(type(e["num_images"]) is int for e in record["classes"]):
            return record
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"its {SAMPLES_RECORD} is broken, or of another version of this program: give a new folder.",
        about="output_dir",
        value=folder,
    )


def _compare(then: dict, now: dict, folder: Path) -> None:
    """Refuse differences; more images are none."""
    changed = [
        f"--{name} was {_shown(then['settings'].get(name))} and is {_shown(value)} now"
        for name, value in now["settings"].items()
        if then["settings"].get(name) != value
    ]
    if then["model"]["fingerprint"] != now["model"]["fingerprint"]:
        old, new = (
            f"{model['path']}{f' with --ema {e}' if (e := model['ema']) else ''}"
            for model in (then["model"], now["model"])
        )
        changed.append(f"--model: the weights of {new} are not those of {old} at that time")
    counts = {entry["label"]: entry["num_images"] for entry in now["classes"]}
    fewer = [entry for entry in then["classes"] if counts.get(entry["label"], 0) < entry["num_images"]]
    if fewer and not changed:
        label, name, num_images = (fewer[0][key] for key in ("label", "name", "num_images"))
        changed.append(
            f"{num_images} images of class {name} belong to it and {counts.get(label, 0)} are asked for now "
            "(--classes, --num_images, --images_per_class)"
        )
    if changed:
        raise UserError(
            f"was begun otherwise: {'; '.join(changed)}: use the same settings, or another folder.",
            about="output_dir",
            value=folder,
        )


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
