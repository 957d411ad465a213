"""Sample sheets over the run, small enough to be part of a page."""

import base64
import io
import re
from pathlib import Path

MAX_SHEETS = 24
MAX_SHEETS_ON_PAGE = 72
MIN_SHEETS = 4
# A page of 15 MB less plotly's 5, in base64.
BYTES_ON_PAGE = 6_500_000
SIZES = ((1600, 82), (1280, 78), (960, 75), (720, 70), (480, 60), (320, 40))  # longest side in pixels, WebP quality
NAME = re.compile(r"step_(\d{1,15})\.png")


def find_sheets(folder: Path) -> dict[int, Path]:
    """Return the sheets of a run's folder by step, in order."""
    matches = ((NAME.fullmatch(path.name), path) for path in (folder / "samples").glob("*.png"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match and path.is_file()))


def load_sheets(folder: Path, num_runs: int = 1) -> list[dict]:
    """Load some sheets of a run, evenly spaced in time, with the first and the newest that can be read.

    Returns the `step`, `src` (a data URI of WebP), `width` and `height` in pixels of each, in order; fewer and smaller
    ones where several runs share the page.
    """
    count = max(MIN_SHEETS, min(MAX_SHEETS, MAX_SHEETS_ON_PAGE // num_runs))
    max_bytes = BYTES_ON_PAGE // (count * num_runs)
    paths, loaded = find_sheets(folder), {}
    for step in evenly_spaced(list(paths), count):
        nearest = sorted((other for other in paths if other not in loaded), key=lambda other: abs(other - step))
        for candidate in nearest[:MIN_SHEETS]:  # the next one for a sheet that is broken or being written
            if sheet := encode(paths.pop(candidate), max_bytes):
                loaded[candidate] = {"step": candidate, **sheet}
                break
    return [loaded[step] for step in sorted(loaded)]


def evenly_spaced(steps: list[int], count: int) -> list[int]:
    """Return the steps nearest to `count` points evenly spaced between the first and the last."""
    if len(steps) <= count:
        return steps
    first, last = steps[0], steps[-1]
    points = [first + i * (last - first) / (count - 1) for i in range(count)]
    return sorted({min(steps, key=lambda step: abs(step - point)) for point in points})


def encode(path: Path, max_bytes: int) -> dict | None:
    """Return a sheet as a data URI of about `max_bytes` before base64 at most; None where it cannot be read."""
    from PIL import Image

    try:
        data = path.read_bytes()
        Image.open(io.BytesIO(data)).verify()  # decoding a PNG looks at no checksum
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    bytes_per_pixel = 0.0
    for side, quality in SIZES:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        is_hopeless = bytes_per_pixel * small.width * small.height > 2 * max_bytes
        if is_hopeless and side != SIZES[-1][0]:
            continue
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality, method=2)
        if file.tell() <= max_bytes:
            break
        bytes_per_pixel = file.tell() / (small.width * small.height)
    src = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"src": src, "width": small.width, "height": small.height}
