"""Where the weights of `--model` are, and where what is found out about them goes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from jit_accel.config.settings import UNAVERAGED
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.checkpoints import complete_checkpoints, is_complete
from jit_accel.model.loading import averages_of, find_checkpoint_in, pipeline_of_checkpoint

WEIGHTS = "diffusion_pytorch_model*.safetensors"


def weights_of(model: str, wants_average: bool) -> str:
    """What `--model` stands for now: a pipeline folder, a checkpoint, or, where it is neither, itself.

    A training that goes on makes others, so one process asks once.

    Args:
        wants_average: of a run the averages of its newest checkpoint are asked for.
    """
    folder = Path(model).expanduser()
    if not wants_average:
        for candidate in (folder, folder / "pipeline"):
            if (candidate / INDEX_FILE).is_file():
                return str(candidate)
    return str(find_checkpoint_in(folder) or model)


def checkpoint_at(weights: str) -> Path | None:
    """The folder that `weights_of` found, if it is a checkpoint."""
    folder = Path(weights).expanduser()
    return folder if is_complete(folder) else None


def run_folder_of(folder: Path) -> Path:
    """Of a run's checkpoint the run's folder: checkpoints are sealed. Any other folder itself."""
    place = folder.resolve()
    return folder.parent.parent if folder.parent.name == place.parent.name == "checkpoints" else folder


def pipeline_folder_of(model: str, weights: str) -> Path | None:
    """The pipeline folder that a result for these weights may change: itself, or `pipeline` in the run's folder.

    None for the Hub, and for a checkpoint that is not its run's newest, unless the folder was made of it.
    """
    folder, checkpoint = Path(model).expanduser(), checkpoint_at(weights)
    if (folder / INDEX_FILE).is_file():
        return folder
    run = run_folder_of(folder)
    pipeline = run / "pipeline"
    if not (run / "checkpoints").is_dir() and not pipeline.is_dir():
        return None
    if checkpoint is None or is_newest(checkpoint):
        return pipeline
    return pipeline if any(holds(pipeline, checkpoint, ema) for ema in (*averages_of(checkpoint), UNAVERAGED)) else None


def is_newest(checkpoint: Path) -> bool:
    """Whether its run has no later one."""
    return complete_checkpoints(checkpoint.parent)[-1].name == checkpoint.resolve().name


def holds(folder: Path, checkpoint: Path, ema: str) -> bool:
    """Whether a pipeline folder has exactly these weights of a checkpoint."""
    held = {}
    for file in sorted((folder / "transformer").glob(WEIGHTS)):
        held |= load_file(file)
    if not held:
        return False
    wanted = pipeline_of_checkpoint(checkpoint, ema).transformer.state_dict()
    return held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in wanted)
