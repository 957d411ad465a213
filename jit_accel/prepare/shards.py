"""Writing the shards of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value

from jit_accel.base.files import atomic_file, write_json
from jit_accel.data.formats.index import sha256_of
from jit_accel.prepare.encode import Encoded

ROW_GROUP_IMAGES = 256  # small, because streams shuffle row groups
ROW_GROUP_BYTES = 2**24


@dataclass(frozen=True)
class Layout:
    """What the shards of one store have in common."""

    encoding: str
    img_size: int
    class_names: tuple[str, ...]
    is_labelled: bool

    def features(self) -> Features:
        """The columns of the tables, as HF datasets describes them."""
        image = {} if self.encoding == "uint8" else {"image": Value("binary") if self.encoding == "raw" else Image()}
        label = {"label": ClassLabel(names=list(self.class_names))} if self.is_labelled else {}
        name = {"name": Value("string")} if self.encoding in ("uint8", "raw") else {}
        return Features({**image, **label, "key": Value("uint64"), **name})


def write_shard(folder: Path, number: int, images: Iterable[Encoded], layout: Layout) -> None:
    """Write shard `number` and, when all of it is on the disk, `shard-NNNNN.json`, which says what is in it."""
    skipped: list[dict] = []
    counts: Counter = Counter()
    stem = f"shard-{number:05d}"
    writer = _write_pixels if layout.encoding == "uint8" else _write_table
    entry = writer(folder, stem, _kept(images, skipped, counts), layout)
    write_json(
        folder / f"{stem}.json",
        {"shard": entry, "labels": {str(k): counts[k] for k in sorted(counts)}, "skipped": skipped},
    )


def _kept(images: Iterable[Encoded], skipped: list[dict], counts: Counter) -> Iterator[Encoded]:
    for image in images:
        if image.data is None:
            skipped.append({"name": image.name, "reason": image.reason})
        else:
            counts[image.label] += 1
            yield image


def _write_pixels(folder: Path, stem: str, images: Iterator[Encoded], layout: Layout) -> dict:
    rows: list[tuple] = []
    size = layout.img_size

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            _write_header(file, 0, size)
            for image in images:
                file.write(image.data)
                rows.append((image.label, image.key, image.name))
            file.seek(0)
            _write_header(file, len(rows), size)

    array = _write_file(folder / f"{stem}.npy", write)
    table = _table([Encoded(b"", name, label, key) for label, key, name in rows], layout)
    described = _write_file(folder / f"{stem}.parquet", lambda path: pq.write_table(table, path))
    return {"file": array["file"], "images": len(rows), **array, "table": described}


def _write_header(file, num_images: int, size: int) -> None:
    """NumPy leaves room for the first number to grow, so that the header keeps its length."""
    description = {"descr": "|u1", "fortran_order": False, "shape": (num_images, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, description)


def _write_table(folder: Path, stem: str, images: Iterator[Encoded], layout: Layout) -> dict:
    groups: list[int] = []

    def write(path: Path) -> None:
        # Encoded images do not shrink, and statistics of them are of no use.
        others = [name for name in layout.features() if name != "image"]
        with pq.ParquetWriter(
            path, layout.features().arrow_schema, compression="none", use_dictionary=False, write_statistics=others
        ) as parquet:
            for group in _groups(images):
                parquet.write_table(_table(group, layout), row_group_size=len(group))
                groups.append(len(group))

    described = _write_file(folder / f"{stem}.parquet", write)
    return {"file": described["file"], "images": sum(groups), **described, "row_groups": groups}


def _groups(images: Iterator[Encoded]) -> Iterator[list[Encoded]]:
    group, num_bytes = [], 0
    for image in images:
        if group and (len(group) == ROW_GROUP_IMAGES or num_bytes + len(image.data) > ROW_GROUP_BYTES):
            yield group
            group, num_bytes = [], 0
        group.append(image)
        num_bytes += len(image.data)
    if group:
        yield group


def _table(images: list[Encoded], layout: Layout) -> pa.Table:
    features = layout.features()
    schema = features.arrow_schema
    columns = {"label": [image.label for image in images], "key": [image.key for image in images]}
    columns["name"] = [image.name for image in images]
    if layout.encoding == "raw":
        columns["image"] = [image.data for image in images]
    elif layout.encoding != "uint8":
        columns["image"] = [{"bytes": image.data, "path": image.name} for image in images]
    return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def _write_file(path: Path, write: Callable[[Path], None]) -> dict:
    """Write a file under another name, make it durable, and name it: its name, size and checksum."""
    with atomic_file(path) as temporary:
        write(temporary)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
