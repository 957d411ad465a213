"""The setting that won a sweep becomes the default of the pipeline folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from jit_accel.base.console import warn
from jit_accel.base.files import atomic_folder, restore_folder, write_text
from jit_accel.config.settings import UNAVERAGED
from jit_accel.evaluate.candidate import run_folder_of
from jit_accel.evaluate.sweep import Outcome
from jit_accel.model.card import CARD_FILE, refresh_card
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.checkpoints import complete_checkpoints
from jit_accel.model.defaults import write_defaults
from jit_accel.model.loading import averages_of, pipeline_of_checkpoint

WEIGHTS = "diffusion_pytorch_model*.safetensors"
BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"
# The card's sentence about the weights; the picture stays, and with it whose it is.
WEIGHTS_SENTENCE = re.compile(
    r"Weights: (?:moving average with decay `(?P<now>[^`]+)`|those of the last step)\."
    r"(?P<space>\s+)The samples above(?: are of decay `(?P<first>[^`]+)`)?: "
)


def pipeline_folder_of(model: str, checkpoint: Path | None) -> Path | None:
    """Return the pipeline folder that a result for this model may change: itself, or `pipeline` in the run's folder.

    None for the Hub, and for a checkpoint that is not its run's newest, unless the folder was made of it.
    """
    folder = Path(model).expanduser()
    if (folder / INDEX_FILE).is_file():
        return folder
    run = run_folder_of(folder)
    pipeline = run / "pipeline"
    if not (run / "checkpoints").is_dir() and not pipeline.is_dir():
        return None
    if checkpoint is None or complete_checkpoints(checkpoint.parent)[-1].name == checkpoint.resolve().name:
        return pipeline
    return pipeline if any(holds(pipeline, checkpoint, ema) for ema in (*averages_of(checkpoint), UNAVERAGED)) else None


def holds(folder: Path, checkpoint: Path, ema: str) -> bool:
    """Return True where a pipeline folder has exactly these weights of a checkpoint."""
    held = {}
    for file in sorted((folder / "transformer").glob(WEIGHTS)):
        held |= load_file(file)
    if not held:
        return False
    wanted = pipeline_of_checkpoint(checkpoint, ema).transformer.state_dict()
    return held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in wanted)


def write_winner(checkpoint: Path | None, folder: Path, outcome: Outcome) -> str:
    """Make the winner the default of this pipeline folder, weights included, and return what was done in words.

    The averages that were compared are the checkpoint's; None: the folder's own weights. Raises `OSError`.
    """
    restore_folder(folder)
    setting, is_new = outcome.best.setting, not (folder / INDEX_FILE).is_file()
    comes_from_there = checkpoint is not None and setting.ema is not None
    replaces = comes_from_there and (is_new or not holds(folder, checkpoint, setting.ema))

    def write_settings(into: Path) -> None:
        given = {name: value for name, value in setting.sampling.items() if value is not None}
        write_defaults(into, **given)
        update_card(into / CARD_FILE, outcome, replaces and not is_new)

    if replaces:
        with atomic_folder(folder) as temporary:
            pipeline_of_checkpoint(checkpoint, setting.ema).save_pretrained(temporary, safe_serialization=True)
            for path in folder.iterdir() if folder.exists() else ():  # what else the folder held stays in it
                if not (temporary / path.name).exists():
                    (shutil.copytree if path.is_dir() else shutil.copy2)(path, temporary / path.name)
            write_settings(temporary)
    else:
        write_settings(folder)
    weights = f", with the weights {setting.ema}" if replaces else ""
    return f"Pipeline:  {folder} {'made' if is_new else 'has new defaults'}{weights}"


def update_card(card: Path, outcome: Outcome, is_other_average: bool) -> None:
    """Write the weights in the folder, its defaults, and how they were chosen on the model card, if there is one."""
    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
        if is_other_average:
            text = with_average(text, outcome.best.setting.ema)
        write_text(card, with_defaults(text, outcome))
    except (OSError, UnicodeDecodeError) as error:
        warn(f"{card} cannot be brought up to date ({error}).")


def show_on_card(folder: Path) -> None:
    """Bring the results on a pipeline folder's model card up to date, if it has one."""
    if (folder / CARD_FILE).is_file():
        try:
            refresh_card(folder)
        except (OSError, ValueError) as error:
            warn(f"{folder / CARD_FILE} cannot be brought up to date ({error}).")


def with_average(text: str, ema: str) -> str:
    """Return the card with its sentence about the weights changed."""
    weights = "those of the last step" if ema == UNAVERAGED else f"moving average with decay `{ema}`"

    def replaced(match: re.Match) -> str:
        of = match["first"] or match["now"]
        whose = f" are of decay `{of}`" if of and of != ema else ""
        return f"Weights: {weights}.{match['space']}The samples above{whose}: "

    return WEIGHTS_SENTENCE.sub(replaced, text)


def with_defaults(text: str, outcome: Outcome) -> str:
    """Return the card with a paragraph on the defaults, in place of an earlier sweep's."""
    best, unguided, select = outcome.best, outcome.best_unguided, outcome.select
    without = f", {unguided.values[select]:.4g} without guidance" if unguided and unguided is not best else ""
    block = (
        f"{BEGIN}\nDefaults: {best.setting}. They won a sweep by {select} over {best.num_images:,} images: "
        f"{best.values[select]:.4g}{without}.\n{END}"
    )
    marked = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    if marked.search(text):
        return marked.sub(lambda _: block, text)
    heading = re.search(r"^## (Training|Origin)$", text, re.MULTILINE)
    at = heading.start() if heading else len(text)
    return f"{text[:at].rstrip()}\n\n{block}\n\n{text[at:]}".rstrip() + "\n"
