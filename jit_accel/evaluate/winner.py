"""The setting that won a sweep becomes the default of the pipeline folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from jit_accel.base.console import warn
from jit_accel.base.files import atomic_folder, restore_folder, write_text
from jit_accel.config.settings import UNAVERAGED
from jit_accel.evaluate.grid import Setting
from jit_accel.evaluate.place import holds
from jit_accel.evaluate.sweep import Outcome
from jit_accel.model.card import CARD_FILE, refresh_card
from jit_accel.model.carried_code import INDEX_FILE
from jit_accel.model.defaults import write_defaults
from jit_accel.model.loading import pipeline_of_checkpoint
from jit_accel.model.pipeline import JiTPipeline

BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"


def write_winner(checkpoint: Path | None, folder: Path, outcome: Outcome) -> str:
    """Make the winner the default of this pipeline folder, weights included, and say what was done.

    Args:
        checkpoint: where the averages that were compared come from; None: they are the folder's own weights.

    Raises:
        OSError: the folder cannot be written.
    """
    restore_folder(folder)
    setting, is_new = outcome.best.setting, not (folder / INDEX_FILE).is_file()
    comes_from_there = checkpoint is not None and setting.ema is not None
    replaces = comes_from_there and (is_new or not holds(folder, checkpoint, setting.ema))

    def write_settings(into: Path) -> None:
        interval = setting.guidance_interval
        write_defaults(
            into,
            guidance_scale=setting.guidance_scale,
            **({} if interval is None else {"guidance_interval": interval}),
            num_inference_steps=setting.num_inference_steps,
            method=setting.method,
        )
        update_card(into / CARD_FILE, setting, outcome, replaces and not is_new)

    if replaces:
        export_average(pipeline_of_checkpoint(checkpoint, setting.ema), folder, write_settings)
    else:
        write_settings(folder)
    weights = f", with the weights {setting.ema}" if replaces else ""
    return f"Pipeline:  {folder} {'made' if is_new else 'has new defaults'}{weights}"


def export_average(pipeline: JiTPipeline, folder: Path, complete: Callable[[Path], None]) -> None:
    """Write the pipeline into the folder's place, whole or not at all; what else the folder held stays in it.

    Args:
        complete: writes what else changes with the weights, before they take their place.
    """
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_dir() and not (temporary / path.name).exists():
                shutil.copytree(path, temporary / path.name)
            elif path.is_file() and not (temporary / path.name).exists():
                shutil.copy2(path, temporary / path.name)
        complete(temporary)


def update_card(card: Path, setting: Setting, outcome: Outcome, is_other_average: bool) -> None:
    """Let the model card say which weights are in the folder and what its defaults are, and how they were chosen."""
    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
        if is_other_average:
            text = with_average(text, setting.ema)
        text = with_defaults(text, setting, outcome)
        write_text(card, text)
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
    weights = "those of the last step" if ema == UNAVERAGED else f"moving average with decay `{ema}`"

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
