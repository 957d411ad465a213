"""Small sources for the tests of `jit_accel.prepare`, and how these call it."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_samples import tar
from PIL import Image

from jit_accel.data.formats.prepared import read_index
from jit_accel.data.reading.content import content_key
from jit_accel.prepare import main

SIZE = 16
CLASSES = ("ant", "bee", "cäsar")
COUNT = 60
BAD = {7: b"", 40: b"no picture"}
FORMATS = ("uint8", "raw", "jpeg", "png", "webp")


def picture(number: int) -> bytes:
    """A smooth picture of an odd size, JPEG or PNG."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((37 + number % 5, 41), Image.Resampling.BICUBIC).save(buffer, "PNG" if number % 2 else "JPEG")
    return buffer.getvalue()


def label_of(number: int) -> int:
    return number * len(CLASSES) // COUNT


ORIGINALS = {number: BAD.get(number) or picture(number) for number in range(COUNT)} | {7: b""}
GOOD = [number for number in range(COUNT) if number not in BAD]
BY_KEY = {content_key(ORIGINALS[number]): number for number in GOOD}


def make_sources(root: Path) -> dict[str, Path]:
    """The same images as a folder, as Parquet and as tars."""
    for number, data in ORIGINALS.items():
        path = root / "folder" / CLASSES[label_of(number)] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    schema = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    schema = schema.arrow_schema
    (root / "parquet").mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 3)):
        images = [{"bytes": ORIGINALS[n], "path": f"{n:03d}.jpg"} for n in numbers]
        columns = {"image": pa.array(images, schema.field("image").type), "label": [label_of(n) for n in numbers]}
        pq.write_table(pa.table(columns).cast(schema), root / "parquet" / f"{shard}.parquet", row_group_size=7)
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 2)):
        members = {}
        for n in numbers:
            members |= {f"{n:03d}.jpg": ORIGINALS[n], f"{n:03d}.cls": str(label_of(n)).encode()}
        tar(root / "tars" / f"{shard}.tar", members)
    return {name: root / name for name in ("folder", "parquet", "tars")}


def prepare(source, output: Path, *flags: str) -> dict:
    """Prepare in this process and its workers; the index."""
    sizes = ("--img_size", str(SIZE), "--shard_images", "9", "--num_workers", "2")
    assert main(["--data_path", str(source), "--output_dir", str(output), *sizes, *flags]) == 0
    return read_index(output)


class Prepared:
    """Sources that are prepared once each, by three workers, into folders that no test may change."""

    def __init__(self, sources: dict[str, Path], root: Path):
        self._sources, self._root, self._made = sources, root, {}

    def __call__(self, kind: str, format: str, *flags: str) -> Path:
        """Return the store of a source, in a folder whose name is the format."""
        key = (kind, format, *flags)
        if key not in self._made:
            self._made[key] = self._root / str(len(self._made)) / format
            prepare(self._sources[kind], self._made[key], "--format", format, "--num_workers", "3", *flags)
        return self._made[key]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
