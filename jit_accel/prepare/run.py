"""From settings to a finished store.

A source with random access is read in the shuffled order, a shard at a time. A stream can only be read in its own
order: it is decoded, cropped and encoded into a spool first, from which the shards are then put together.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from jit_accel.base import rng
from jit_accel.base.console import redacted
from jit_accel.base.errors import Stopped, StopRequest, UserError
from jit_accel.base.files import write_json
from jit_accel.data.batches.workers import num_cores
from jit_accel.data.formats.columns import int_labels
from jit_accel.data.formats.index import INDEX, STORE_FORMAT, STORE_VERSION, files_of
from jit_accel.data.formats.source import Source
from jit_accel.data.formats.sources import open_images
from jit_accel.prepare import preview
from jit_accel.prepare.encode import Encoded, Original, encode, originals_at, originals_of
from jit_accel.prepare.jobs import counted, run_jobs
from jit_accel.prepare.output import OutputFolder, verify
from jit_accel.prepare.settings import PrepareConfig
from jit_accel.prepare.spool import Piece, Spool, part_path, parts_of, write_part
from jit_accel.prepare.store_shards import Layout, write_shard


@dataclass(frozen=True)
class Work:
    """Common values of the jobs of a preparation. `layout` is None while the spool of a stream is filled."""

    config: PrepareConfig
    source: Source
    folder: Path
    layout: Layout | None = None
    spool: Spool | None = None

    @property
    def root(self) -> str:
        """The part that all names of files begin with."""
        return os.path.join(os.path.abspath(self.source.name), "") if self.source.format == "folder" else ""

    @property
    def spool_folder(self) -> Path:
        return self.folder / "spool"

    def with_layout(self, class_names: tuple[str, ...]) -> "Work":
        layout = Layout(self.config.format, self.config.img_size, class_names, self.source.is_labelled)
        return replace(self, layout=layout)

    @property
    def num_workers(self) -> int:
        return self.config.num_workers or num_cores()


def prepare(config: PrepareConfig) -> int:
    """Prepare the images, or go on where it was interrupted; return the exit code. Raises `UserError`."""
    if config.verify is not None:
        return verify(config.verify)
    output = OutputFolder(config.output_dir)
    output.check_place(os.path.expanduser(config.data_path))
    how = {name: getattr(config, name) for name in ("data_format", "image_column", "label_column")}
    source = open_images(config.data_path, **how)
    recorded = config.recorded(_fingerprint(source))
    started, num_made = time.monotonic(), None
    index = output.finished(recorded)
    if index is None:
        with StopRequest() as stop:
            try:
                with output.begun(recorded) as index:
                    if index is None:
                        index, num_made = _make(config, source, output, recorded, stop)
            except Stopped as stopped:
                print(f"Stopped. What is finished is kept in {output.work}: the same command goes on from there.")
                return 128 + stopped.number
    if num_made is None:
        print(
            f"{config.output_dir} is finished already: {_summary(index)}. To make it anew, remove it or choose another "
            "--output_dir."
        )
    else:
        rate = num_made / max(time.monotonic() - started, 1e-9)
        print(f"Prepared {_summary(index)}, {rate:,.0f} images/s.")
    return 0


def _fingerprint(source: Source) -> str:
    """Return the source's fingerprint; of a folder, whose own is of the names alone, with the sizes of the files."""
    if source.format != "folder":
        return source.fingerprint
    images = source.images.dataset.data.column(source.images.columns.image)
    paths = (path for chunk in images.chunks for path in chunk.field("path").to_pylist())
    sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
    return hashlib.sha256(source.fingerprint.encode() + np.array(sizes, np.int64).tobytes()).hexdigest()[:16]


def _summary(index: dict) -> str:
    labelled = f"{len(index['class_names']):,} classes" if index["is_labelled"] else "no classes"
    skipped = f"{index['num_skipped']:,} skipped" + (f" (see {INDEX})" if index["num_skipped"] else "")
    return (
        f"{index['num_images']:,} images of {index['img_size']} px, {labelled}, {index['num_bytes'] / 1e6:,.1f} MB as "
        f"{index['encoding']}, {skipped}"
    )


def _make(
    config: PrepareConfig, source: Source, output: OutputFolder, recorded: dict, stop: StopRequest
) -> tuple[dict, int]:
    """Make the store; return its index, and how many images were read."""
    if config.format in ("uint8", "raw"):  # the size is known beforehand: the pixels, twice with a spool
        output.check_space(source.num_images * 3 * config.img_size**2 * (2 if source.streaming else 1))
    work, num_read = Work(config, source, output.work), None
    if source.streaming:
        work, num_read = _fill_spool(work, stop)
    else:
        work = work.with_layout(source.class_names)
    shards = _plan(work)
    missing = [(number, numbers) for number, numbers in enumerate(shards) if output.entry(number) is None]
    total = sum(map(len, shards))
    done = total - sum(len(numbers) for _, numbers in missing)
    num_made = run_jobs(make_shard, missing, work, work.num_workers, stop, desc="shards", total=total, initial=done)
    return _finish(work, output, len(shards), recorded), num_made if num_read is None else num_read


def _fill_spool(work: Work, stop: StopRequest) -> tuple[Work, int]:
    """Read a stream to its end; return what the next stage needs, and the number of images that were read."""
    parts = parts_of(work.source.images)
    work.spool_folder.mkdir(exist_ok=True)
    missing = [(n, part) for n, part in enumerate(parts) if not part_path(work.spool_folder, n).is_file()]
    total = work.source.num_images
    done = total * (len(parts) - len(missing)) // len(parts)  # for the bar: about
    made = run_jobs(fill_part, missing, work, work.num_workers, stop, desc="reading", total=total, initial=done)
    spool = Spool(work.spool_folder, len(parts))
    largest = max(spool.table["label"].unique().to_pylist(), default=-1)
    names = work.source.class_names or int_labels(largest).names or ("image",)
    return replace(work.with_layout(names), spool=spool), made


def _plan(work: Work) -> list[np.ndarray]:
    """Return the images of each shard by their numbers: pieces of one shuffled order."""
    num_images = len(work.source.images if work.spool is None else work.spool)
    # Sorting hashes, as order.epoch_permutation does, but for another purpose than an epoch of the training.
    order = np.argsort(rng.hash64(work.config.seed, "prepare", np.arange(num_images)), kind="stable")
    size = work.config.images_a_shard(num_images) or 1
    return [order[start : start + size] for start in range(0, num_images, size)]


def fill_part(work: Work, number: int, pieces: list[Piece]) -> None:
    """In a worker: part `number` of the spool."""
    originals = (original for piece in pieces for original in originals_of(work.source, *piece))
    write_part(part_path(work.spool_folder, number), counted(_encoded(work, originals)))


def make_shard(work: Work, number: int, numbers: np.ndarray) -> None:
    """In a worker: shard `number`, of the images with these numbers."""
    from_spool = work.spool is not None
    images = work.spool.images_at(numbers) if from_spool else _encoded(work, originals_at(work.source, numbers))
    write_shard(work.folder, number, counted(images), work.layout)


def _encoded(work: Work, originals: Iterable[Original]) -> Iterator[Encoded]:
    originals = iter(originals)
    while True:
        try:
            original = next(originals, None)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"cannot be read ({error}). What is finished is kept: repair it and run the same command again.",
                about="data_path",
                value=work.config.data_path,
            ) from error
        if original is None:
            return
        yield encode(original, work.config, work.root)


def _finish(work: Work, output: OutputFolder, num_shards: int, recorded: dict) -> dict:
    """Publish the shards, and at the very end the index that makes a store of them."""
    entries = [output.entry(number) for number in range(num_shards)]
    skipped = [image for entry in entries for image in entry["skipped"]] + (work.spool.skipped() if work.spool else [])
    index = _index(work, entries, skipped, recorded)
    shards, layout = index["shards"], work.layout
    if not shards:
        example = f" ({skipped[0]['name']}: {skipped[0]['reason']})" if skipped else ""
        raise UserError(
            f"none of its images can be decoded{example}: choose other data.",
            about="data_path",
            value=work.config.data_path,
        )
    output.publish([file["file"] for file in files_of(index)])
    preview.draw(output.path, shards, layout, index["class_counts"])
    if layout.encoding != "uint8":
        (output.path / "README.md").write_text(_card(index), encoding="utf-8")
    write_json(output.path / INDEX, index)
    return index


def _index(work: Work, entries: list[dict], skipped: list[dict], recorded: dict) -> dict:
    layout, counts = work.layout, Counter()
    for entry in entries:
        counts.update({layout.class_names[int(label)]: count for label, count in entry["labels"].items()})
    shards = [entry["shard"] for entry in entries if entry["shard"]["images"]]
    source = work.source
    return {
        "format": STORE_FORMAT,
        "version": STORE_VERSION,
        "encoding": layout.encoding,
        "img_size": layout.img_size,
        "num_images": sum(shard["images"] for shard in shards),
        "num_bytes": sum(file["bytes"] for file in files_of({"shards": shards})),
        "num_skipped": len(skipped),
        "is_labelled": layout.is_labelled,
        "class_names": list(layout.class_names),
        "class_counts": {name: counts[name] for name in layout.class_names},
        "source": {"name": redacted(source.name), "format": source.format, "fingerprint": source.fingerprint},
        "settings": recorded,
        "shards": shards,
        "skipped": sorted(skipped, key=lambda image: image["name"]),
    }


def _card(index: dict) -> str:
    """Return a README that makes HF datasets and the Hub take the shards, and not the pictures, for the data."""
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: shard-*.parquet\n---\n\n"
        f"{index['num_images']:,} images of {index['img_size']} px in a shuffled order, made by `jit_accel.prepare`.\n"
        "`index.json` has the classes, the checksums and the settings.\n"
    )
