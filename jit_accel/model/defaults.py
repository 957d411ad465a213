"""The defaults of a saved pipeline for calls that do not say: steps, solver and guidance, in `model_index.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jit_accel.base.errors import UserError, lookup
from jit_accel.base.files import write_text
from jit_accel.model.carried_code import INDEX_FILE, json_text
from jit_accel.model.guidance import checked_count, checked_interval, checked_scale
from jit_accel.model.scheduler import checked_method

# How a value is checked, and what it is where the pipeline does not say.
DEFAULTS: dict[str, tuple[Callable, Any]] = {
    "guidance_scale": (checked_scale, 1.0),
    "guidance_interval": (lambda interval: list(checked_interval(interval)), [0.1, 1.0]),
    "num_inference_steps": (lambda steps: checked_count("num_inference_steps", steps), None),
    "method": (checked_method, None),
}


def write_defaults(folder: str | os.PathLike, **settings) -> None:
    """Write what calls of a saved pipeline use that do not say otherwise, whole or not at all.

    Args:
        settings: of guidance_scale, guidance_interval, num_inference_steps and method; None: as if never written.

    Raises:
        UserError: the folder is no pipeline, there is no such setting, or its value makes no sense.

    Example:
        >>> write_defaults("output/pipeline", guidance_scale=2.4, guidance_interval=(0.1, 1.0))
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"{folder}: holds no {INDEX_FILE}: give the folder of a saved pipeline.")
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    for name, value in settings.items():
        check, otherwise = lookup(DEFAULTS, name, "settings")
        try:
            index[name] = otherwise if value is None else check(value)
        except ValueError as error:
            raise UserError(str(error)) from None
    write_text(folder / INDEX_FILE, json_text(index))
