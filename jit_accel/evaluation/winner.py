"""The setting that won a sweep becomes the default of the pipeline folder."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from jit_accel.card import CARD_FILE, refresh_card
from jit_accel.carried import INDEX_FILE
from jit_accel.console import warn
from jit_accel.evaluation.grid import MODEL, Setting
from jit_accel.evaluation.sweep import Outcome
from jit_accel.loading import find_checkpoint_in, pipeline_of_checkpoint
from jit_accel.pipeline import JiTPipeline, write_defaults

WEIGHTS = "diffusion_pytorch_model*.safetensors"
BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"


def pipeline_folder_of(model: str) -> Path | None:
    """Where the pipeline of `--model` is, or would be: itself, or `pipeline` in the run's folder; None for the Hub."""
    folder = Path(model).expanduser()
    if (folder / INDEX_FILE).is_file():
        return folder
    if not folder.is_dir():
        return None
    if folder.parent.name == "checkpoints":  # a checkpoint of a run
        return folder.parent.parent / "pipeline"
    return folder / "pipeline" if (folder / "checkpoints").is_dir() or (folder / "pipeline").is_dir() else None


def write_winner(model: str, folder: Path, outcome: Outcome) -> str:
    """Make the winner the default of this pipeline folder, weights included, and say what was done.

    Raises:
        OSError: the folder cannot be written.
    """
    setting = outcome.best.setting
    checkpoint = find_checkpoint_in(Path(model).expanduser()) if setting.ema else None
    is_new = not (folder / INDEX_FILE).is_file()
    replaces = checkpoint is not None and (is_new or not holds(folder, checkpoint, setting.ema))
    if replaces:
        export_average(pipeline_of_checkpoint(checkpoint, setting.ema), folder)
    interval = setting.guidance_interval
    write_defaults(
        folder,
        guidance_scale=setting.guidance_scale,
        **({} if interval is None else {"guidance_interval": interval}),
        num_inference_steps=setting.num_inference_steps,
        method=setting.method,
    )
    update_card(folder / CARD_FILE, setting, outcome, replaces and not is_new)
    weights = f", with the weights {setting.ema}" if replaces else ""
    return f"Pipeline:  {folder} {'made' if is_new else 'has new defaults'}{weights}"


def holds(folder: Path, checkpoint: Path, ema: str) -> bool:
    """Whether a pipeline folder has exactly these weights of a checkpoint."""
    wanted = pipeline_of_checkpoint(checkpoint, ema).transformer.state_dict()
    held = {}
    for file in sorted((folder / "transformer").glob(WEIGHTS)):
        held |= load_file(file)
    return held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in wanted)


def export_average(pipeline: JiTPipeline, folder: Path) -> None:
    """Write the pipeline into the folder's place, whole or not at all; what else the folder held stays in it."""
    temporary, old = folder.with_name(f"tmp_{folder.name}"), folder.with_name(f"old_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not folder.exists():  # stopped between the two renamings
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    if folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not (temporary / path.name).exists():
                shutil.copytree(path, temporary / path.name)
            elif path.is_file() and not (temporary / path.name).exists():
                shutil.copy2(path, temporary / path.name)
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def update_card(card: Path, setting: Setting, outcome: Outcome, is_other_average: bool) -> None:
    """Let the model card say which weights are in the folder and what its defaults are, and how they were chosen."""
    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
        if is_other_average:
            text = with_average(text, setting.ema)
        text = with_defaults(text, setting, outcome)
        temporary = card.with_name(f"tmp_{card.name}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, card)
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
    """The card's sentence about the weights; the picture stays, and with it whose it is."""
    sentence = re.compile(
        r"Weights: (?:moving average with decay `(?P<now>[^`]+)`|those of the last step)\."
        r"(?P<space>\s+)The samples above(?: are of decay `(?P<first>[^`]+)`)?: "
    )
    weights = "those of the last step" if ema == MODEL else f"moving average with decay `{ema}`"

    def replaced(match: re.Match) -> str:
        of = match["first"] or match["now"]
        whose = f" are of decay `{of}`" if of and of != ema else ""
        return f"Weights: {weights}.{match['space']}The samples above{whose}: "

    return sentence.sub(replaced, text)


def with_defaults(text: str, setting: Setting, outcome: Outcome) -> str:
    """The card with a paragraph on the defaults, in place of an earlier sweep's."""
    best, unguided, select = outcome.best, outcome.best_unguided, outcome.select
    without = f", {unguided.values[select]:.4g} without guidance" if unguided and unguided is not best else ""
    block = (
        f"{BEGIN}\nDefaults: {setting}. They won a sweep by {select} over {best.num_images:,} images: "
        f"{best.values[select]:.4g}{without}.\n{END}"
    )
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if marked.search(text):
        return marked.sub(lambda _: block, text)
    heading = re.search(r"^## (Training|Origin)$", text, re.MULTILINE)
    at = heading.start() if heading else len(text)
    return f"{text[:at].rstrip()}\n\n{block}\n\n{text[at:]}".rstrip() + "\n"
