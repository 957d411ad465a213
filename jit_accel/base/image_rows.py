"""Images in named rows, to look at."""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_CELL_PIXELS = 84
GAP_PIXELS = 2
_WIDEST_NAME = 28  # letters


def draw_rows(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], column_names: Sequence[str] = (), max_cell: int | None = None
) -> Image.Image:
    """Draw images, uint8 (H, W, 3) of one height, in named rows, which may differ in length and in width.

    Small images are magnified, those larger than `max_cell` pixels a side reduced to it.
    """
    height, width = rows[0][1][0].shape[0], max(images[0].shape[1] for _, images in rows)
    zoom = -(-MIN_CELL_PIXELS // width)
    if max_cell and max(height, width) * zoom > max_cell:
        zoom = max_cell / max(height, width)
    cell_width, cell_height = max(1, round(width * zoom)), max(1, round(height * zoom))
    widths = [max(1, round(images[0].shape[1] * zoom)) for _, images in rows]
    method = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    font_size = max(12, min(cell_width, cell_height) // 6)
    names = [_shortened(name) for name, _ in rows]
    left = max(int(font_for(name, font_size).getlength(name)) for name in names) + 16
    top = int(font_size * 1.5) if column_names else 0
    columns = max(len(images) for _, images in rows)
    step_x, step_y = cell_width + GAP_PIXELS, cell_height + GAP_PIXELS
    sheet = Image.new("RGB", (left + columns * step_x, top + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(column_names):
        place = (left + column * step_x + cell_width // 2, top // 2)
        draw.text(place, name, fill="black", font=font_for(name, font_size), anchor="mm")
    for row, (name, (_, images)) in enumerate(zip(names, rows)):
        y = top + row * step_y
        place = (left - 8, y + cell_height // 2)
        draw.text(place, name, fill="black", font=font_for(name, font_size), anchor="rm")
        for column, image in enumerate(images):
            picture = Image.fromarray(np.ascontiguousarray(image)).resize((widths[row], cell_height), method)
            sheet.paste(picture, (left + column * step_x, y))
    return sheet


def as_pictures(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 (..., H, W, C) as pictures (..., H, W, 3): one channel as grey, other counts as a row."""
    channels = pixels.shape[-1]
    if channels in (1, 3):
        return pixels if channels == 3 else np.repeat(pixels, 3, axis=-1)
    beside = np.moveaxis(pixels, -1, -2).reshape(*pixels.shape[:-2], channels * pixels.shape[-2])
    return np.repeat(beside[..., None], 3, axis=-1)


def without_paper(sheet: Image.Image) -> tuple[Image.Image, int]:
    """Make the paper see-through that `draw_rows` has put square images on, eight in each of at most ten rows.

    Returns the picture, and the width in pixels of the names at its left; another picture as it is, and 0.
    """
    pixels = np.asarray(sheet)
    height, width = pixels.shape[:2]
    y, x = np.ogrid[:height, :width]
    for cell in (height // rows for rows in range(1, 11) if height % rows == 0):
        left = width - 8 * cell
        is_gap = (x >= left) & ((y % cell >= cell - GAP_PIXELS) | ((x - left) % cell >= cell - GAP_PIXELS))
        if left >= 16 and (pixels[is_gap] == 255).all() and np.ptp(pixels[:, :left], axis=2).max() == 0:
            ink = np.where(x < left, 255 - pixels[..., 0], 255 * ~is_gap)
            return Image.fromarray(np.dstack([pixels * (x >= left)[..., None], ink]).astype(np.uint8)), left
    return sheet, 0


def legible(name: str, label: int) -> str:
    """Return the name of a class, in one line, where this system has a font with all its letters, else its number."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    return name if name.isprintable() and font_file(name) is not None else str(label)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font with the letters of `text`: Pillow's own where that has them."""
    file = font_file(text)
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@cache
def font_file(text: str) -> str | None:
    """Return a file of a font with the letters of `text`, "" for Pillow's own, which is enough for ASCII, else None."""
    letters = {ord(letter) for letter in text if not letter.isascii() and letter != "…"}
    return next((file for file in _fonts() if letters <= _letters_of(file)), None) if letters else ""


@cache
def _fonts() -> list[str]:
    from matplotlib import font_manager, get_data_path

    found = sorted(font_manager.findSystemFonts(), key=lambda file: ("Regular" not in file, file))
    return [f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", *found]


@cache
def _letters_of(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        return frozenset(font.get_charmap() if font.scalable else ())
    except (OSError, RuntimeError):  # no font that FreeType reads
        return frozenset()


def _shortened(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "…"
