"""What a run leaves: the diffusers pipeline folder with its model card, and the loss curve."""

from __future__ import annotations

import filecmp
import os
import shutil
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from jit_accel.config import HealthConfig, HubConfig, TrackingConfig
from jit_accel.pipeline import DEFAULTS, JiTPipeline

CARD_PICTURE = "samples.png"
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [jit, pixel-space-diffusion, diffusion, jit_accel]
---

# {title}

A JiT pixel-space diffusion transformer ([arXiv 2511.13720](https://arxiv.org/abs/2511.13720)), trained with
jit_accel on {images} images of {classes} for {steps:,} steps.

![samples](samples.png)

```python
import torch
from jit_accel import JiTPipeline

pipe = JiTPipeline.from_pretrained("path/to/this/folder")
image = pipe({example}, generator=torch.Generator().manual_seed(0)).images[0]
image.save("sample.png")
```

Classes: {names}.

## Training

Weights: moving average with decay `{decay}`. The samples above: guidance {guidance_scale}, Heun,
{num_inference_steps} steps.

| setting | value |
| --- | --- |
{settings}
"""


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
    temporary = folder.with_name(f"tmp_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    JiTPipeline(network, **pipeline_settings(pipeline)).save_pretrained(temporary, safe_serialization=True)
    shutil.copy(sheet, temporary / CARD_PICTURE)
    (temporary / "README.md").write_text(model_card(pipeline, record, decay), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)


def is_export_of(folder: Path, sheet: Path) -> bool:
    """Whether `folder` is a whole pipeline folder, exported together with this sheet of samples."""
    copy = folder / CARD_PICTURE
    return sheet.exists() and copy.exists() and filecmp.cmp(copy, sheet, shallow=False)


def pipeline_settings(pipeline: JiTPipeline) -> dict:
    """What the pipeline was built with, besides the network."""
    return {"scheduler": pipeline.scheduler} | {name: pipeline.config[name] for name in ("class_names", *DEFAULTS)}


# Paths and names of the machine or the team are nobody's business once the folder is shared.
# How a run was watched says nothing about its weights.
LEFT_OUT = (
    *("data_path", "output_dir", "resume", "init_from"),
    *(field.name for group in (TrackingConfig, HealthConfig) for field in fields(group)),
)


def model_card(pipeline: JiTPipeline, record: dict, decay: str) -> str:
    names = pipeline.config.class_names or []
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    images = f"{record['num_images']:,}" if record["num_images"] else "streamed"
    data = str(record["data_path"]).rstrip("/").rpartition("/")[2]
    return CARD.format(
        title=f"{record['model']}, {record['img_size']} px",
        images=images,
        classes=f"`{data}`",
        steps=record["total_steps"],
        example=f'["{names[0]}"]' if names else "[0]",
        names=shown or "none",
        decay=decay,
        guidance_scale=record["guidance_scale"],
        num_inference_steps=record["num_inference_steps"],
        settings="\n".join(f"| {k} | {v} |" for k, v in record.items() if k not in LEFT_OUT and v is not None),
    )


def draw_loss_curve(rows: list[dict], path: Path) -> None:
    """Plot `train/loss` over the steps, raw and smoothed, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(row["step"], row["train/loss"]) for row in rows if isinstance(row.get("train/loss"), float)]
    steps = [step for step, _ in points]
    losses = [loss for _, loss in points]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(steps, smoothed(losses), color="#08519c", linewidth=1.8, label="smoothed")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title="train/loss")
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
