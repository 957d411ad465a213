"""The defaults of a saved pipeline for calls that do not say: steps, solver and guidance, in `model_index.json`."""

import json
import os
from pathlib import Path

from jit_accel.base.errors import UserError, lookup
from jit_accel.base.files import write_text
from jit_accel.model.carried_code import INDEX_FILE, json_text
from jit_accel.model.guidance import DEFAULTS, checked_default


def write_defaults(folder: str | os.PathLike, **settings) -> None:
    """Write what calls of a saved pipeline use that do not say otherwise, whole or not at all.

    Args:
        settings: of guidance_scale, guidance_interval, num_inference_steps and method; None: as if never written.

    Raises:
        UserError: the folder is no pipeline, there is no such setting, or its value makes no sense.

    Example:
        >>> write_defaults("output/pipeline", guidance_scale=2.4, guidance_interval=(0.1, 1.0))
    """
    file = Path(folder) / INDEX_FILE
    if not file.is_file():
        raise UserError(f"{folder}: holds no {INDEX_FILE}: give the folder of a saved pipeline.")
    index = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        lookup(DEFAULTS, name, "settings")
        try:
            index[name] = checked_default(name, value)
        except ValueError as error:
            raise UserError(str(error)) from None
    write_text(file, json_text(index))
