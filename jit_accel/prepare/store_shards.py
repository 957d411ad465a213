"""The shards of a store: memory-mapped pixels with a table beside them, or Parquet alone."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value

from jit_accel.base.files import atomic_file, write_json
from jit_accel.data.formats.index import sha256_of
from jit_accel.prepare.encode import Encoded
from jit_accel.prepare.spool import batched

ROW_GROUP_IMAGES = 256  # small, because streams shuffle row groups
ROW_GROUP_BYTES = 2**24


@dataclass(frozen=True)
class Layout:
    """The columns and sizes that the shards of one store have in common."""

    encoding: str
    img_size: int
    class_names: tuple[str, ...]
    is_labelled: bool

    def features(self) -> Features:
        """Return the columns of the tables, as HF datasets describes them."""
        image = {} if self.encoding == "uint8" else {"image": Value("binary") if self.encoding == "raw" else Image()}
        label = {"label": ClassLabel(names=list(self.class_names))} if self.is_labelled else {}
        name = {"name": Value("string")} if self.encoding in ("uint8", "raw") else {}
        return Features({**image, **label, "key": Value("uint64"), **name})

    def table(self, images: list[Encoded]) -> pa.Table:
        schema = self.features().arrow_schema
        columns = {name: [getattr(image, name) for image in images] for name in ("label", "key", "name")}
        if self.encoding == "raw":
            columns["image"] = [image.data for image in images]
        elif self.encoding != "uint8":
            columns["image"] = [{"bytes": image.data, "path": image.name} for image in images]
        return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def shard_file(folder: Path, number: int, ending: str) -> Path:
    return folder / f"shard-{number:05d}.{ending}"


def write_shard(folder: Path, number: int, images: Iterable[Encoded], layout: Layout) -> None:
    """Write shard `number` and, when all of it is on the disk, `shard-NNNNN.json`, which says what is in it."""
    skipped: list[dict] = []
    counts: Counter = Counter()

    def kept() -> Iterator[Encoded]:
        for image in images:
            if image.data is None:
                skipped.append({"name": image.name, "reason": image.reason})
            else:
                counts[image.label] += 1
                yield image

    table = shard_file(folder, number, "parquet")
    if layout.encoding == "uint8":
        entry = _write_pixels(shard_file(folder, number, "npy"), table, kept(), layout)
    else:
        entry = _write_table(table, kept(), layout)
    labels = {str(label): counts[label] for label in sorted(counts)}
    write_json(shard_file(folder, number, "json"), {"shard": entry, "labels": labels, "skipped": skipped})


def _write_pixels(path: Path, table: Path, images: Iterator[Encoded], layout: Layout) -> dict:
    rows: list[Encoded] = []
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        _write_header(file, 0, layout.img_size)
        for image in images:
            file.write(image.data)
            rows.append(image._replace(data=b""))
        file.seek(0)
        _write_header(file, len(rows), layout.img_size)
    with atomic_file(table) as temporary:
        pq.write_table(layout.table(rows), temporary)
    return {"file": path.name, "images": len(rows), **_described(path), "table": _described(table)}


def _write_header(file, num_images: int, size: int) -> None:
    """Write the head of a .npy, in which NumPy leaves room for the first number to grow: it keeps its length."""
    description = {"descr": "|u1", "fortran_order": False, "shape": (num_images, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, description)


def _write_table(path: Path, images: Iterator[Encoded], layout: Layout) -> dict:
    groups: list[int] = []
    schema = layout.features().arrow_schema
    # Encoded images do not shrink, and statistics of them are of no use.
    others = [name for name in schema.names if name != "image"]
    how = {"compression": "none", "use_dictionary": False, "write_statistics": others}
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, **how) as parquet:
        for group in batched(images, ROW_GROUP_IMAGES, ROW_GROUP_BYTES):
            parquet.write_table(layout.table(group), row_group_size=len(group))
            groups.append(len(group))
    return {"file": path.name, "images": sum(groups), **_described(path), "row_groups": groups}


def _described(path: Path) -> dict:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
