"""Two pictures of a store to look at: its first images, and how many each class has."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from jit_accel.base.image_rows import as_pictures, font_file, font_for, legible
from jit_accel.config.presets import sides_of
from jit_accel.data.formats.columns import PixelFormat
from jit_accel.data.formats.prepared import MAPPED, columns_of
from jit_accel.data.reading.decode import decode_row
from jit_accel.prepare.output import Layout

SHEET_SIDE = 8  # images
_MIN_CELL_PIXELS, _MAX_CELL_PIXELS = 96, 256
_MOST_NAMED_CLASSES = 60


def first_images(folder: Path, shards: list[dict], layout: Layout, count: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the first `count` images of a store, (channels, H, W), with the names of its classes, "" for none."""
    columns = columns_of(layout.encoding, layout.img_size, layout.is_labelled, layout.facts)
    for shard in shards:
        with pq.ParquetFile(folder / shard.get("table", shard)["file"]) as parquet:
            rows = next(parquet.iter_batches(count, use_threads=False)).to_pylist()
        if layout.encoding in MAPPED:
            images = np.load(folder / shard["file"], mmap_mode="r")
        else:
            images = (decode_row(row, columns, layout.img_size) for row in rows)
        for row, image in zip(rows, images):
            labels = layout.labels_of(row.get("label"))
            yield image, ", ".join(legible(layout.class_names[label], label) for label in labels)
        if (count := count - len(rows)) <= 0:
            return


def as_bytes(numbers: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Return numbers of a format as uint8, 0 to 255."""
    if pixels.value_range is None:
        return numbers
    low, high = pixels.value_range
    return np.rint((numbers.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def draw_sheet(folder: Path, shards: list[dict], layout: Layout) -> None:
    """Write `preview.png`: up to 8 x 8 images, each with its class below, and left of it its condition, if any."""
    images = list(first_images(folder, shards, layout, SHEET_SIDE**2))
    side, size, size_of_one = max(sides_of(layout.img_size)), layout.img_size, sides_of(layout.img_size)[1]
    cell = min(side * -(-_MIN_CELL_PIXELS // side), _MAX_CELL_PIXELS)
    height, width = (max(1, round(own * cell / side)) for own in sides_of(size))
    images = [(_as_picture(image, layout), name) for image, name in images]
    width = max(1, round(width * images[0][0].shape[1] / size_of_one))
    line, gap = 16, 4
    columns = min(SHEET_SIDE, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    method = Image.Resampling.NEAREST if cell >= side else Image.Resampling.BOX
    for i, (image, name) in enumerate(images):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + line + gap)
        sheet.paste(Image.fromarray(image).resize((width, height), method), (left, top))
        font = font_for(name, 12)
        draw.text((left, top + height), _shortened(name, font, width), fill="black", font=font)
    sheet.save(folder / "preview.png")


def _as_picture(image: np.ndarray, layout: Layout) -> np.ndarray:
    """Return an image as a picture, (H, W, 3), and left of it its condition, if any."""
    parts = np.split(as_bytes(image, layout.facts.pixels), [layout.facts.pixels.channels])
    pictures = [as_pictures(part.transpose(1, 2, 0)) for part in parts[:: -1 if layout.facts.has_pairs else 1]]
    return np.ascontiguousarray(np.concatenate(pictures[: 1 + layout.facts.has_pairs], axis=1))


def _shortened(name: str, font, width: int) -> str:
    name = shown = " ".join(name.split())
    while name and font.getlength(shown) > width:
        name = name[:-1]
        shown = name + "..."
    return shown


def draw_classes(folder: Path, counts: dict[str, int]) -> None:
    """Write `classes.png`: how many images each class has; many classes are sorted by size and not named."""
    from matplotlib.figure import Figure

    named = len(counts) <= _MOST_NAMED_CLASSES
    names, values = [legible(name, i) for i, name in enumerate(counts)], list(counts.values())
    figure = Figure((8, max(2.0, 0.22 * len(names) + 1) if named else 4), dpi=100)
    axes = figure.subplots()
    if named:
        short = [name if len(name) <= 30 else name[:29] + "…" for name in names]
        axes.barh(range(len(names)), values)
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in short])
        for text, name in zip(axes.get_yticklabels(), short):
            if file := font_file(name):
                text.set_fontproperties(Path(file))
        axes.invert_yaxis()
        axes.set_xlabel("images")
    else:
        axes.fill_between(range(len(values)), sorted(values, reverse=True), step="mid")
        axes.set(xlabel="classes, the largest first", ylabel="images", ylim=(0, None))
    axes.set_title(f"{sum(values):,} images in {len(values):,} classes")
    figure.tight_layout()
    figure.savefig(folder / "classes.png")
