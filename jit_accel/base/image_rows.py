"""Images in named rows, to look at."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_CELL_PIXELS = 84
GAP_PIXELS = 2
_WIDEST_NAME = 28  # letters


def draw_rows(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], column_names: Sequence[str] = (), max_cell: int | None = None
) -> Image.Image:
    """Draw images, uint8 (H, W, 3) of one size, in named rows, which may differ in length.

    Small images are magnified, those larger than `max_cell` pixels a side reduced to it.
    """
    height, width = rows[0][1][0].shape[:2]
    zoom = -(-MIN_CELL_PIXELS // width)
    if max_cell and max(height, width) * zoom > max_cell:
        zoom = max_cell / max(height, width)
    cell_width, cell_height = max(1, round(width * zoom)), max(1, round(height * zoom))
    method = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    font = ImageFont.load_default(max(12, min(cell_width, cell_height) // 6))
    names = [_shortened(name) for name, _ in rows]
    left = max(int(font.getlength(name)) for name in names) + 16
    top = int(font.size * 1.5) if column_names else 0
    columns = max(len(images) for _, images in rows)
    step_x, step_y = cell_width + GAP_PIXELS, cell_height + GAP_PIXELS
    sheet = Image.new("RGB", (left + columns * step_x, top + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        draw.text((left + column * step_x + cell_width // 2, top // 2), name, fill="black", font=font, anchor="mm")
    for row, (name, (_, images)) in enumerate(zip(names, rows)):
        y = top + row * step_y
        draw.text((left - 8, y + cell_height // 2), name, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            picture = Image.fromarray(np.ascontiguousarray(image)).resize((cell_width, cell_height), method)
            sheet.paste(picture, (left + column * step_x, y))
    return sheet


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "…"
