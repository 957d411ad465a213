"""Pictures of a store to look at: a sheet of the first images, and a chart of how many each class has."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from jit_accel.data.batches.batch import decode_row
from jit_accel.data.formats.columns import Columns
from jit_accel.prepare.store_shards import Layout

SHEET_SIDE = 8  # images
_MIN_CELL_PIXELS, _MAX_CELL_PIXELS = 96, 256
_MOST_NAMED_CLASSES = 60


def draw(folder: Path, shards: list[dict], layout: Layout, class_counts: dict[str, int]) -> None:
    """Write `preview.png` and `classes.png` into the folder of a store."""
    images, names = first_images(folder, shards, layout, SHEET_SIDE**2)
    draw_sheet(images, names if layout.is_labelled else [""] * len(images), folder / "preview.png")
    draw_classes(class_counts, folder / "classes.png")


def first_images(folder: Path, shards: list[dict], layout: Layout, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Return the first `count` images of a store, uint8 (3, S, S) each, and the names of their classes."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    columns = Columns("image", raw_size=layout.img_size if layout.encoding == "raw" else None)
    for shard in shards:
        missing = count - len(images)
        if missing <= 0:
            break
        with pq.ParquetFile(folder / shard.get("table", shard)["file"]) as parquet:
            rows = next(parquet.iter_batches(missing, use_threads=False)).to_pylist()
        if layout.encoding == "uint8":
            images += [np.array(square) for square in np.load(folder / shard["file"], mmap_mode="r")[:missing]]
        else:
            images += [decode_row(row["image"], columns, layout.img_size) for row in rows]
        labels += [row.get("label", 0) for row in rows]
    return images, [layout.class_names[label] for label in labels]


def draw_sheet(images: list[np.ndarray], names: list[str], path: Path) -> None:
    """Write up to 8 x 8 images, uint8 (3, S, S), as a PNG, each with its class below."""
    size = images[0].shape[-1]
    cell = min(size * -(-_MIN_CELL_PIXELS // size), _MAX_CELL_PIXELS)
    font, line, gap = ImageFont.load_default(12), 16, 4
    columns = min(SHEET_SIDE, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    method = Image.Resampling.NEAREST if cell >= size else Image.Resampling.BOX
    for i, (image, name) in enumerate(zip(images, names)):
        left, top = gap + i % columns * (cell + gap), gap + i // columns * (cell + line + gap)
        sheet.paste(
            Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((cell, cell), method), (left, top)
        )
        draw.text((left, top + cell), _shortened(name, font, cell), fill="black", font=font)
    sheet.save(path)


def _shortened(name: str, font, width: int) -> str:
    name = shown = " ".join(name.split())
    while name and font.getlength(shown) > width:
        name = name[:-1]
        shown = name + "..."
    return shown


def draw_classes(counts: dict[str, int], path: Path) -> None:
    """Write a PNG of how many images each class has; many classes are sorted by size and not named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    named = len(counts) <= _MOST_NAMED_CLASSES
    names, values = list(counts), list(counts.values())
    figure, axes = pyplot.subplots(figsize=(8, max(2.0, 0.22 * len(names) + 1) if named else 4), dpi=100)
    if named:
        short = [name if len(name) <= 30 else name[:29] + "…" for name in names]
        axes.barh(range(len(names)), values)
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in short])
        axes.invert_yaxis()
        axes.set_xlabel("images")
    else:
        axes.fill_between(range(len(values)), sorted(values, reverse=True), step="mid")
        axes.set(xlabel="classes, the largest first", ylabel="images", ylim=(0, None))
    axes.set_title(f"{sum(values):,} images in {len(values):,} classes")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
