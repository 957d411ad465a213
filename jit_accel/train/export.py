"""What a run leaves: the diffusers pipeline folder with its model card, and the loss curve."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from torch import Tensor

from jit_accel.base.files import atomic_folder
from jit_accel.model.card import CARD_FILE, CARD_PICTURE, training_card
from jit_accel.model.defaults import DEFAULTS
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.monitor.metric_table import TRAIN_LOSS


def export_pipeline(
    pipeline: JiTPipeline, weights: dict[str, Tensor], folder: Path, sheet: Path, record: dict, decay: str
) -> None:
    """Write a pipeline folder (safetensors only) with these weights, whole or not at all.

    Args:
        pipeline: gives the configuration; its own network is left as it is.
        weights: float32 tensors by the network's parameter names.
        folder: where to; replaced if it exists.
        sheet: PNG of samples for the model card.
        record: the run's settings and facts, for the model card.
        decay: name of the moving average that `weights` are.
    """
    network = type(pipeline.transformer).from_config(pipeline.transformer.config)
    network.load_state_dict(weights, strict=True)
    with atomic_folder(folder) as temporary:
        JiTPipeline(network, **pipeline_settings(pipeline)).save_pretrained(temporary, safe_serialization=True)
        shutil.copy(sheet, temporary / CARD_PICTURE)
        (temporary / CARD_FILE).write_text(training_card(pipeline, record, decay), encoding="utf-8")


def is_export_of(folder: Path, sheet: Path) -> bool:
    """Whether `folder` is a whole pipeline folder, exported together with this sheet of samples."""
    copy = folder / CARD_PICTURE
    return sheet.exists() and copy.exists() and filecmp.cmp(copy, sheet, shallow=False)


def pipeline_settings(pipeline: JiTPipeline) -> dict:
    """What the pipeline was built with, besides the network."""
    return {"scheduler": pipeline.scheduler} | {name: pipeline.config[name] for name in ("class_names", *DEFAULTS)}


def draw_loss_curve(rows: list[dict], path: Path) -> None:
    """Plot the loss over the steps, raw and smoothed, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(row["step"], row[TRAIN_LOSS]) for row in rows if isinstance(row.get(TRAIN_LOSS), float)]
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(steps, smoothed(losses), color="#08519c", linewidth=1.8, label="smoothed")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title=TRAIN_LOSS)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def smoothed(values: list[float], memory_share: float = 0.02) -> list[float]:
    """Running mean with a memory of this share of the points, without the bias of its start."""
    decay = 1 - 1 / max(1.0, memory_share * len(values))
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(average / weight)
    return out
