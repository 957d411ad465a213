"""`problems.csv`: files of the source that are no images, that are left out, or copies of others."""

import csv
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file
from jit_accel.data.formats.scan import scan_folder, scan_of_splits
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.splits import ALL
from jit_accel.prepare.encode import open_source
from jit_accel.prepare.settings import PrepareConfig


def write_problems(
    folder: Path, shards: list[dict], config: PrepareConfig, source: Source, skipped: list[dict]
) -> None:
    """Write `problems.csv`: files that are no images, that are left out, or copies of others."""
    found = [(image["name"], image["reason"]) for image in skipped] + list(_copies(folder, shards))
    if source.format == "folder":
        found += _left_out(config, source)
    if found:
        path = folder / "problems.csv"
        with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("file", "problem"), *sorted(found)])
        print(f"{len(found):,} files are no images, left out, or copies of others: see {path}.")


def _left_out(config: PrepareConfig, source: Source) -> Iterator[tuple[str, str]]:
    """Yield the files of a folder that are not prepared, each with the reason."""
    scan, root = scan_folder(source.name), os.path.join(os.path.abspath(source.name), "")
    yield from ((name, "no image, by its ending") for name in scan.others)
    for text in scan.unreadable:
        path, _, reason = text.rpartition(" (")
        yield path.removeprefix(os.path.join(source.name, "")), reason[:-1]
    used = _paths_of(source)
    if len(used) < len(scan.images):
        logging.disable(logging.WARNING)  # which were said before
        try:
            others = set(scan_of_splits(scan, config.split, source.name).left_out)
            listed = set(_paths_of(open_source(replace(config, split=ALL))).to_pylist()) if scan.metadata else ()
        except UserError:  # in metadata of another split
            listed = ()
        finally:
            logging.disable(logging.NOTSET)
        unused = pc.binary_join_element_wise(root, scan.images, "")
        for path in unused.filter(pc.invert(pc.is_in(unused, value_set=used))).to_pylist():
            name = path.removeprefix(root)
            is_of_another = path in listed or os.path.join(os.path.dirname(name), "") in others
            missing = "not listed in the metadata" if scan.metadata else "in no class folder, as others are"
            yield name, "of another split" if is_of_another else missing


def _paths_of(source: Source) -> pa.Array:
    return source.images.dataset.data.column("image").combine_chunks().field("path")


def _copies(folder: Path, shards: list[dict]) -> Iterator[tuple[str, str]]:
    """Yield the names of images that are stored twice or more, all but the first, which is named with them."""
    names, keys, first = [], [], {}
    for shard in shards:
        with pq.ParquetFile(folder / shard.get("table", shard)["file"]) as parquet:
            table = parquet.read(["key", "name", "image.path"], use_threads=False).flatten()
        keys.append(table["key"].to_numpy())
        names.append(table["image.path" if "image.path" in table.column_names else "name"])
    keys, names = np.concatenate(keys), pa.chunked_array([chunk for some in names for chunk in some.chunks])
    _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
    is_repeated = counts[which] > 1
    for name, key in sorted(zip(names.filter(pa.array(is_repeated)).to_pylist(), keys[is_repeated].tolist())):
        if key in first:
            other = "another image of this name" if first[key] == name else first[key]
            yield name, f"a copy of {other} (the same size, beginning and end); both are stored"
        first.setdefault(key, name)
