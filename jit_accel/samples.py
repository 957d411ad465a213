"""Sheets of samples: a few classes, fixed noise, made by all processes together."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jit_accel import rng

SAMPLES_PER_CLASS = 8
MAX_CLASSES = 10
MIN_CELL_PIXELS = 84


def sampled_classes(num_classes: int) -> list[int]:
    """Up to ten classes, spread evenly."""
    count = min(num_classes, MAX_CLASSES)
    return [i * num_classes // count for i in range(count)]


def sample_classes(
    pipeline, accelerator, *, num_classes: int, batch_size: int, num_inference_steps: int, seed: int
) -> tuple[Tensor, list[int]]:
    """Draw eight images of each of a few classes; the noise of the n-th follows from (seed, n).

    Returns:
        Images uint8 (classes * 8, 3, H, W) on the CPU, class after class, on every process; and the classes.
    """
    classes = sampled_classes(num_classes)
    labels = [label for label in classes for _ in range(SAMPLES_PER_CLASS)]
    share = -(-len(labels) // accelerator.num_processes)  # padded: every process makes equally many
    mine = [(accelerator.process_index * share + i) % len(labels) for i in range(share)]
    size = max(batch_size, SAMPLES_PER_CLASS)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            [labels[i] for i in part],
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(key >> 1) for key in rng.hash64(seed, "sample", part).tolist()],
            output_type="pt",
        ).images
        for part in (mine[start : start + size] for start in range(0, share, size))
    ]
    mine = (torch.cat(images) * 255).round().to(accelerator.device, torch.uint8)
    return accelerator.gather(mine)[: len(labels)].cpu(), classes


def save_sheet(images: Tensor, row_names: list[str], path: Path) -> None:
    """Write images (rows * n, 3, H, W), uint8, as a PNG with a named row for each class."""
    columns = len(images) // len(row_names)
    side = images.shape[-1]
    zoom = -(-MIN_CELL_PIXELS // side)
    cell, gap = side * zoom, 2
    font = ImageFont.load_default(max(12, cell // 6))
    margin = max(int(font.getlength(name)) for name in row_names) + 16
    sheet = Image.new("RGB", (margin + columns * (cell + gap), len(row_names) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (margin + column * (cell + gap), row * (cell + gap)))
    for row, name in enumerate(row_names):
        draw.text((margin - 8, row * (cell + gap) + cell // 2), name, fill="black", font=font, anchor="rm")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
