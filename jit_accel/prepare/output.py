"""The output folder of a preparation (begun, continued, finished, verified) and its files: shards and two pictures."""

import contextlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, List, Value
from filelock import FileLock, Timeout
from tqdm import tqdm

from jit_accel.base.errors import UserError, changed_settings
from jit_accel.base.files import atomic_file, disk_errors, move, sync, write_json
from jit_accel.config.presets import Size, sides_of
from jit_accel.data.formats.prepared import (
    INDEX,
    MAPPED,
    STORE_VERSION,
    UNFINISHED,
    StoreFacts,
    files_of,
    number_columns,
    read_index,
    sha256_of,
)
from jit_accel.prepare.encode import Encoded, batched

ROW_GROUP_IMAGES = 256  # small, because streams shuffle row groups
ROW_GROUP_BYTES = 2**24
_LOCK_PATIENCE_S = 5  # workers of a killed run leave within a second
_MOST_TRIES = 100  # where no folder can be made, as below /proc, each fails


class OutputFolder:
    """`output_dir`, with the shards of an unfinished preparation in its hidden folder `work`."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir).expanduser()
        self.work = self.path / UNFINISHED

    def check_place(self, data_path: str) -> None:
        """Refuse a folder inside the source, where the next run would take the shards for images."""
        source, target = Path(data_path).resolve(), self.path.resolve()
        if source.is_dir() and source in (target, *target.parents):
            raise self._refusal(f"lies inside --data_path {data_path}: choose a folder elsewhere.")

    def finished(self, recorded: dict) -> dict | None:
        """Return the index of such a preparation that is there; `UserError` where other settings or files are."""
        if not self.path.is_dir():
            if self.path.exists():
                raise self._refusal("is a file: choose a new folder.")
            return None
        found = [entry for entry in os.listdir(self.path) if entry != UNFINISHED]
        if INDEX in found:
            index = read_index(self.path, "output_dir")
            self._compare(index["settings"], recorded, "holds images that were prepared otherwise", "")
            shutil.rmtree(self.work, ignore_errors=True)
            return index
        if found and not (self.work / "plan.json").is_file():
            raise self._refusal(f"is not empty ({sorted(found)[0]}, ...): choose a new folder.")
        return None

    @contextlib.contextmanager
    def begun(self, recorded: dict) -> Iterator[dict | None]:
        """Own the folder while the block runs; a preparation that was interrupted here is continued.

        Yields the index where another process has just finished it. Raises `UserError` for a folder that is not
        writable, in use, or begun with other settings, and for a full disk.
        """
        with disk_errors("output_dir", self.path, "run the same command again"), self._lock():
            index = self.finished(recorded)
            if index is None:
                self._record_plan({"version": STORE_VERSION, **recorded})
            yield index
            if (self.path / INDEX).is_file():  # which whoever gets the lock next looks for
                shutil.rmtree(self.work, ignore_errors=True)

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot be finished."""
        free = shutil.disk_usage(self.work).free
        there = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        if num_bytes > free + there:
            rule = f"needs {num_bytes / 2**30:,.1f} GiB, and the disk has {free / 2**30:,.1f} GiB left: "
            raise self._refusal(rule + "make room, choose another disk, a smaller --img_size or --format jpeg.")

    def entry(self, number: int) -> dict | None:
        """Return what is known of shard `number`, if it is finished."""
        path = shard_file(self.work, number, "json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def publish(self, names: list[str]) -> None:
        """Move finished files to where they belong; those that were moved before an interruption are there."""
        for name in names:
            if (self.work / name).exists():
                move(self.work / name, self.path / name)
        sync(self.path)

    def _record_plan(self, recorded: dict) -> None:
        path = self.work / "plan.json"
        if not path.is_file():
            return write_json(path, recorded)
        remedy = f", or remove {self.work} to begin anew"
        self._compare(json.loads(path.read_text(encoding="utf-8")), recorded, "was begun otherwise", remedy)

    def _compare(self, then: dict, now: dict, problem: str, remedy: str) -> None:
        images = {
            "source_fingerprint": "the images of --data_path changed",
            "class_names": "folders that are numbers were sorted as text, and are now sorted as numbers",
        }
        if changed := changed_settings(then, now, images):
            remedy = f"use the same settings, or another --output_dir{remedy}."
            raise self._refusal(f"{problem}: {'; '.join(changed)}: {remedy}")

    def _refusal(self, rule: str) -> UserError:
        return UserError(rule, about="output_dir", value=self.path)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.work / "lock", timeout=_LOCK_PATIENCE_S)
        try:
            for tries in itertools.count(1):
                try:
                    self.work.mkdir(parents=True, exist_ok=True)
                    lock.acquire()
                    break
                except (FileNotFoundError, FileExistsError):  # a process that finished has just removed the folder
                    if tries == _MOST_TRIES or (self.work.exists() and not self.work.is_dir()):
                        raise
            yield
        except Timeout:
            rule = "another process is preparing images there: wait for it, or choose another folder."
            raise self._refusal(rule) from None
        finally:
            lock.release()


def verify(folder: str) -> int:
    """Read every file of a store; return the exit code, 0. Raises `UserError` where files are missing or damaged."""
    index = read_index(folder, "verify")
    files, damaged = files_of(index), []
    with tqdm(total=index["num_bytes"], unit="B", unit_scale=True, desc="checksums", disable=None) as bar:
        for file in files:
            try:
                if sha256_of(Path(folder) / file["file"]) != file["sha256"]:
                    damaged.append(file["file"])
            except OSError as error:
                damaged.append(f"{file['file']} ({error.strerror})")
            bar.update(file["bytes"])
    if damaged:
        named = ", ".join([*damaged[:5], *(["..."] if len(damaged) > 5 else [])])
        rule = f"{len(damaged)} of {len(files)} files are not what was written: {named}:"
        raise UserError(rule, about="verify", value=folder, remedy="copy them again, or prepare the images again.")
    print(f"{folder}: {len(files)} files, {index['num_images']:,} images, all as they were written.")
    return 0


@dataclass(frozen=True)
class Layout:
    """The columns and sizes that the shards of one store have in common."""

    encoding: str
    img_size: Size
    class_names: tuple[str, ...]
    is_labelled: bool
    facts: StoreFacts

    @property
    def pictures(self) -> dict[str, str]:
        """Return the columns of pictures, and the fields of `Encoded` that are in them."""
        found = {"image": "data"} | ({"condition": "condition"} if self.facts.has_pairs else {})
        return {} if self.encoding in MAPPED else found

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the tables, as HF datasets describes them."""
        columns: dict = {}
        for name in self.pictures:
            columns[name] = Value("binary") if self.encoding == "raw" else datasets.Image()
        if self.is_labelled:
            kind = ClassLabel(names=list(self.class_names))
            columns["label"] = kind if self.facts.most_labels is None else List(kind)
        columns["key"] = Value("uint64")
        if self.encoding in (*MAPPED, "raw"):
            columns["name"] = Value("string")
        for name, size in self._numbers:
            columns[name] = Value("float64") if size == 1 else List(Value("float64"))
        return Features(columns).arrow_schema

    @property
    def _numbers(self) -> list[tuple[str, int]]:
        """Return the columns of numbers, and how many each has."""
        vectors = self.facts.vectors
        return list(zip(number_columns(vectors.names), vectors.sizes)) if vectors else []

    def labels_of(self, label: int | list[int] | None) -> list[int]:
        """Return the classes of an image."""
        return label if isinstance(label, list) else [label] if self.is_labelled else []

    def table(self, images: list[Encoded]) -> pa.Table:
        columns = {name: [getattr(image, name) for image in images] for name in ("label", "key", "name")}
        for name, field in self.pictures.items():
            columns[name] = [getattr(image, field) for image in images]
            if self.encoding != "raw":
                columns[name] = [{"bytes": data, "path": image.name} for data, image in zip(columns[name], images)]
        start = 0
        for name, size in self._numbers:
            values = [image.vectors[start : start + size] for image in images]
            columns[name], start = [value[0] for value in values] if size == 1 else values, start + size
        return pa.Table.from_pydict(columns, schema=self.schema)


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
                counts.update(image.label if isinstance(image.label, list) else [image.label])
                yield image

    table = shard_file(folder, number, "parquet")
    if layout.encoding in MAPPED:
        entry = _write_pixels(shard_file(folder, number, "npy"), table, kept(), layout)
    else:
        entry = _write_table(table, kept(), layout)
    labels = {str(label): counts[label] for label in sorted(counts)}
    write_json(shard_file(folder, number, "json"), {"shard": entry, "labels": labels, "skipped": skipped})


def _write_pixels(path: Path, table: Path, images: Iterator[Encoded], layout: Layout) -> dict:
    rows: list[Encoded] = []
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        _write_header(file, 0, layout)
        for image in images:
            file.write(image.data)
            rows.append(image._replace(data=b""))
        file.seek(0)
        _write_header(file, len(rows), layout)
    with atomic_file(table) as temporary:
        pq.write_table(layout.table(rows), temporary)
    return {"file": path.name, "images": len(rows), **_described(path), "table": _described(table)}


def _write_header(file, num_images: int, layout: Layout) -> None:
    """Write the head of a .npy, in which NumPy leaves room for the first number to grow: it keeps its length."""
    shape = (num_images, layout.facts.channels, *sides_of(layout.img_size))
    description = {"descr": np.dtype(layout.encoding).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


def _write_table(path: Path, images: Iterator[Encoded], layout: Layout) -> dict:
    groups: list[int] = []
    # Encoded images do not shrink, and statistics of them are of no use.
    others = [name for name in layout.schema.names if name not in layout.pictures]
    how = {"compression": "none", "use_dictionary": False, "write_statistics": others}
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, layout.schema, **how) as parquet:
        for group in batched(images, ROW_GROUP_IMAGES, ROW_GROUP_BYTES):
            parquet.write_table(layout.table(group), row_group_size=len(group))
            groups.append(len(group))
    return {"file": path.name, "images": sum(groups), **_described(path), "row_groups": groups}


def _described(path: Path) -> dict:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
