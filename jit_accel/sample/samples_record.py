"""The output folder's `samples.json`: a folder is begun, continued, and never mixed with other images."""

import json
from pathlib import Path

from jit_accel.base.errors import UserError, changed_settings
from jit_accel.data.formats.scan import SAMPLES_RECORD

VERSION = 1


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
        problem = "holds samples already: add --resume to go on, or give another folder."
        if resume:
            problem = _difference(folder, record)
    elif found := [path.name for path in sorted(folder.glob("*")) if holds_files(path)]:
        problem = f"is not empty ({found[0]}) and holds no {SAMPLES_RECORD} of a sampling to go on with: "
        problem += "give a new folder."
    if problem:
        raise UserError(problem, about="output_dir", value=folder)
    folder.mkdir(parents=True, exist_ok=True)


def holds_files(path: Path) -> bool:
    """Return whether a path is more than empty folders, as a sampling that was stopped leaves them."""
    is_empty = path.is_dir() and all(part.is_dir() for part in path.rglob("*"))
    return not is_empty and not path.name.startswith(".")


def _difference(folder: Path, now: dict) -> str | None:
    """Return how the images in a folder differ from those that are asked for now; more of them are no difference."""
    try:
        then = json.loads((folder / SAMPLES_RECORD).read_text(encoding="utf-8"))
        changed = changed_settings(then["settings"], now["settings"])
        if then["model"]["fingerprint"] != now["model"]["fingerprint"]:
            old, new = map(_weights, (then["model"], now["model"]))
            changed.append(f"--model: the weights of {new} are not those of {old} at that time")
        changed += _fewer_images(then["classes"], now["classes"])[: not changed]
        if then["version"] != VERSION:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {SAMPLES_RECORD} is broken, or of another version of this program: give a new folder."
    return f"was begun otherwise: {'; '.join(changed)}: use the same settings, or another folder." if changed else None


def _weights(model: dict) -> str:
    return f"{model['path']} with --ema {model['ema']}" if model["ema"] else str(model["path"])


def _fewer_images(then: list[dict], now: list[dict]) -> list[str]:
    counts = {entry["label"]: entry["num_images"] for entry in now}
    return [
        f"{entry['num_images']} images of class {entry['name']} belong to it and {counts.get(entry['label'], 0)} are "
        "asked for now (--classes, --num_images, --images_per_class)"
        for entry in then
        if counts.get(entry["label"], 0) < entry["num_images"]
    ]
