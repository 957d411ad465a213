"""From settings to a finished store, by processes that stop when they are asked to, or when their parent is gone.

A source with random access is read in the shuffled order, a shard at a time. A stream can only be read in its own
order: it is decoded, cropped and encoded into a spool first, from which the shards are then put together.
"""

import hashlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from jit_accel.base import rng
from jit_accel.base.console import redacted
from jit_accel.base.errors import Stopped, StopRequest, UserError
from jit_accel.base.files import write_json
from jit_accel.config.presets import in_pixels, sides_of
from jit_accel.data.batches.workers import num_cores
from jit_accel.data.formats.columns import numbered_classes
from jit_accel.data.formats.prepared import INDEX, MAPPED, STORE_FORMAT, StoreFacts, files_of
from jit_accel.data.formats.source import Source
from jit_accel.prepare.encode import (
    Encoded,
    Spool,
    encode_all,
    open_source,
    originals_at,
    originals_of,
    parts_of,
    with_format,
    write_part,
)
from jit_accel.prepare.output import Layout, OutputFolder, verify, write_shard
from jit_accel.prepare.preview import draw_classes, draw_sheet
from jit_accel.prepare.problems import write_problems
from jit_accel.prepare.settings import PrepareConfig

_POLL_S = 0.2
_worker: tuple | None = None  # in a worker: the work that jobs are of, the counter of images, the request to stop


@dataclass(frozen=True)
class Work:
    """Common values of the jobs. `layout` is None while the spool of a stream is filled."""

    config: PrepareConfig
    source: Source
    folder: Path
    layout: Layout | None = None
    spool: Spool | None = None


def prepare(config: PrepareConfig) -> int:
    """Prepare the images, or go on where it was interrupted; return the exit code. Raises `UserError`."""
    if config.verify is not None:
        return verify(config.verify)
    output = OutputFolder(config.output_dir)
    output.check_place(os.path.expanduser(config.data_path))
    source = open_source(config)
    config = with_format(config, source)
    recorded = config.recorded(_fingerprint(source))
    if source.format == "folder" and list(source.class_names) != sorted(source.class_names):
        recorded["class_names"] = list(source.class_names)  # which earlier versions sorted as text
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
        there = f"{config.output_dir} is finished already: {_summary(index)}."
        print(f"{there} To make it anew, remove it or choose another --output_dir.")
    else:
        rate = num_made / max(time.monotonic() - started, 1e-9)
        print(f"Prepared {_summary(index)}, {rate:,.0f} images/s.")
    return 0


def _fingerprint(source: Source) -> str:
    """Return the source's fingerprint; of a folder, whose own is of the names alone, with the sizes of the files."""
    if source.format != "folder":
        return source.fingerprint
    columns = (source.images.dataset.data.column(name) for name in source.images.columns.pictures)
    paths = (path for column in columns for chunk in column.chunks for path in chunk.field("path").to_pylist())
    sizes = [os.path.getsize(path) if path and os.path.exists(path) else -1 for path in paths]
    return hashlib.sha256(source.fingerprint.encode() + np.array(sizes, np.int64).tobytes()).hexdigest()[:16]


def _summary(index: dict) -> str:
    labelled = f"{len(index['class_names']):,} classes" if index["is_labelled"] else "no classes"
    skipped = f"{index['num_skipped']:,} skipped" + (f" (see {INDEX})" if index["num_skipped"] else "")
    return (
        f"{index['num_images']:,} images of {in_pixels(index['img_size'])} px, {labelled}, "
        f"{index['num_bytes'] / 1e6:,.1f} MB as {index['encoding']}, {skipped}"
    )


def _make(
    config: PrepareConfig, source: Source, output: OutputFolder, recorded: dict, stop: StopRequest
) -> tuple[dict, int]:
    """Make the store; return its index, and how many images were read."""
    number_bytes = source.pixels.dtype.itemsize
    if config.format in (*MAPPED, "raw"):  # the size is known beforehand: the pixels, twice with a spool
        stored = number_bytes if config.format == "raw" else np.dtype(config.format).itemsize
        num_bytes = source.num_images * source.channels * math.prod(sides_of(config.img_size)) * stored
        output.check_space(num_bytes * (2 if source.streaming else 1))
    work, names, num_read = Work(config, source, output.work), source.class_names, None
    if source.streaming:
        spool, num_read = _fill_spool(work, stop)
        found = spool.table["label"]
        found = found if source.most_labels is None else pc.list_flatten(found)
        largest = max(found.unique().to_pylist(), default=-1)
        names = names or numbered_classes(largest + 1) or ("image",)
        work = replace(work, spool=spool)
    facts = StoreFacts(source.pixels, source.condition_channels > 0, source.vectors, source.most_labels)
    layout = Layout(config.format, config.img_size, names, source.is_labelled, facts)
    work = replace(work, layout=layout)
    num_images = len(source.images if work.spool is None else work.spool)
    # Sorting hashes, as order.epoch_permutation does, but for another purpose than an epoch of the training.
    order = np.argsort(rng.hash64(config.seed, "prepare", np.arange(num_images)), kind="stable")
    size = config.images_a_shard(num_images, source.channels, number_bytes) or 1
    shards = [order[start : start + size] for start in range(0, num_images, size)]
    missing = [(number, numbers) for number, numbers in enumerate(shards) if output.entry(number) is None]
    done = num_images - sum(len(numbers) for _, numbers in missing)
    num_made = _run_jobs(make_shard, missing, work, stop, desc="shards", total=num_images, initial=done)
    return _finish(work, output, len(shards), recorded), num_made if num_read is None else num_read


def _fill_spool(work: Work, stop: StopRequest) -> tuple[Spool, int]:
    """Read a stream to its end; return what it was read into, and the number of images that were read."""
    folder, total = work.folder / "spool", work.source.num_images
    folder.mkdir(exist_ok=True)
    parts = {folder / f"part-{n:03d}.arrow": pieces for n, pieces in enumerate(parts_of(work.source.images))}
    missing = [part for part in parts.items() if not part[0].is_file()]
    done = total * (len(parts) - len(missing)) // len(parts)  # for the bar: about
    return Spool(list(parts)), _run_jobs(fill_part, missing, work, stop, desc="reading", total=total, initial=done)


def _run_jobs(function: Callable, jobs: list[tuple], work: Work, stop: StopRequest, **bar: str | int) -> int:
    """Call `function(work, *job)` for all jobs in processes; return the number of images they counted.

    `bar` is of the progress bar: `desc`, `total`, all images, and `initial`, those of jobs that were done before.
    Raises `Stopped` once a signal came; the jobs that were under way are lost.
    """
    if not jobs:
        return 0
    # Spawning would import torch again: seconds a worker.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    counter, halt = context.Value("q", 0), context.Value("b", 0)
    num_workers = min(work.config.num_workers or num_cores(), len(jobs))
    pool = ProcessPoolExecutor(num_workers, context, _init_worker, (os.getpid(), work, counter, halt))
    try:
        pending = {pool.submit(_call, function, job) for job in jobs}
        with tqdm(unit=" images", disable=None, **bar) as shown:
            while pending:
                done, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
                shown.update(counter.value + bar["initial"] - shown.n)
                stop.raise_if_asked()
                for future in done:
                    future.result()
        return counter.value
    except BrokenProcessPool:
        time.sleep(_POLL_S)  # a signal to the whole group ends workers before it is noticed here
        stop.raise_if_asked()
        rule = "a process was killed, most likely because the memory was full. What is finished is kept:"
        remedy = "run the same command with a smaller --num_workers."
        raise UserError(rule, about="num_workers", remedy=remedy) from None
    finally:
        halt.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def _init_worker(parent_pid: int, work: Work, counter, halt) -> None:
    global _worker
    _worker = work, counter, halt
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    # Ctrl-C reaches the whole process group; the main process asks us to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave_with_parent() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _call(function: Callable, job: tuple) -> None:
    function(_worker[0], *job)


def fill_part(work: Work, path: Path, pieces: list[tuple]) -> None:
    """In a worker: a part of the spool."""
    originals = (original for piece in pieces for original in originals_of(work.source, *piece))
    images = _counted(encode_all(originals, work.config, work.source))
    write_part(path, images, work.source.most_labels)


def make_shard(work: Work, number: int, numbers: np.ndarray) -> None:
    """In a worker: shard `number`, of the images with these numbers."""
    if work.spool is None:
        images = encode_all(originals_at(work.source, numbers), work.config, work.source)
    else:
        images = work.spool.images_at(numbers)
    write_shard(work.folder, number, _counted(images), work.layout)


def _counted(images: Iterable[Encoded]) -> Iterator[Encoded]:
    """Pass the images of a job on, counting them, until the program is to stop."""
    _, counter, halt = _worker
    for image in images:
        if halt.value:
            raise Stopped(0)
        with counter.get_lock():
            counter.value += 1
        yield image


def _finish(work: Work, output: OutputFolder, num_shards: int, recorded: dict) -> dict:
    """Publish the shards, and at the very end the index that makes a store of them."""
    entries = [output.entry(number) for number in range(num_shards)]
    skipped = [image for entry in entries for image in entry["skipped"]] + (work.spool.skipped() if work.spool else [])
    index = _index(work, entries, skipped, recorded)
    shards, layout = index["shards"], work.layout
    if not shards:
        example = f" ({skipped[0]['name']}: {skipped[0]['reason']})" if skipped else ""
        rule = f"none of its images can be decoded{example}: choose other data."
        raise UserError(rule, about="data_path", value=work.config.data_path)
    output.publish([file["file"] for file in files_of(index)])
    draw_sheet(output.path, shards, layout)
    draw_classes(output.path, index["class_counts"])
    if layout.encoding not in MAPPED:
        (output.path / "README.md").write_text(_card(index), encoding="utf-8")
    write_problems(output.path, shards, work.config, work.source, skipped)
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
        "version": layout.facts.version,
        "encoding": layout.encoding,
        "img_size": layout.img_size,
        **layout.facts.record(layout.encoding),
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
        f"{index['num_images']:,} images of {in_pixels(index['img_size'])} px in a shuffled order, made by "
        "`jit_accel.prepare`.\n"
        "`index.json` has the classes, the checksums and the settings.\n"
    )
