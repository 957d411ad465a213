"""Endless batches for one process of the run, with exactly resumable state."""

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import gt
from typing import Any

import numpy as np
import torch

from jit_accel.base import rng
from jit_accel.base.errors import UserError, lookup, shown
from jit_accel.config.presets import Size, in_pixels, sides_of
from jit_accel.data import undecodable
from jit_accel.data.batches import order
from jit_accel.data.batches.batch import (
    MAX_SUBSTITUTES,
    PixelBatch,
    check_labels,
    empty_batch,
    labels_in,
    vectors_in,
)
from jit_accel.data.batches.lanes import BatchPart, BatchPartReader, images_in_a_window
from jit_accel.data.batches.workers import from_workers
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.images import KeptImages, Read, check_crops

log = logging.getLogger(__name__)
MOST_KEPT_BYTES = 2**26  # pixels of all images, which each worker then keeps
STREAM_VERSION = 3  # of the order, and of the state that goes with it


@dataclass(frozen=True, kw_only=True)
class ReadingTask:
    """One process's share of the endless batches of a data set."""

    source: Source
    img_size: Size  # in pixels, to which images are cropped
    batch_size: int  # images a batch, of this process, which is `rank` of `world_size`
    seed: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0  # processes that decode; 0 decodes in this one
    horizontal_flip: bool = True
    crop: str = "center"  # or "random": where it lies follows from the position in the run
    shuffle_buffer: int = 1024  # images of a lane of a stream that are shuffled together; fewer where they are large
    lanes: int | None = None  # of a stream; None for about eight a process
    num_classes: int | None = None  # labels from here on are refused with a `UserError` when they are met
    order_kind: str | None = None  # of random access; None for the one that suits the number of images
    pin_memory: bool = False  # merge what workers decode of a stream in page-locked memory

    @property
    def step_images(self) -> int:
        """Images of one micro-batch of all processes."""
        return self.world_size * self.batch_size

    def crops(self, positions: np.ndarray) -> np.ndarray | None:
        """Return where the images at these positions are cropped; see `Images.read`."""
        return order.CROPS[self.crop](self.seed, positions)

    def batch(self, images: torch.Tensor, facts: np.ndarray, positions: np.ndarray, bad: list[str]) -> PixelBatch:
        """Return a batch with the mirroring that follows from the positions; see `Images.read` for the facts."""
        mirror = order.flips(self.seed, positions) if self.horizontal_flip else None
        vectors = vectors_in(facts, self.source.vectors)
        return PixelBatch(images, labels_in(facts), positions, bad, mirror, vectors, self.source.pixels)


def build_loader(source: Source, **how) -> "Loader":
    """Return an endless iterator of `PixelBatch`es; `how` are the fields of `ReadingTask`.

    Each image comes exactly once an epoch, in an order that follows from the seed and the data (of a stream also from
    `lanes` and `shuffle_buffer`), and not from the numbers of processes and workers. UserError if the images were
    prepared smaller than `img_size`, or leave random crops nothing to choose.
    """
    task = ReadingTask(source=source, **how)
    lookup(order.CROPS, task.crop, "crop")
    if source.img_size is not None and any(map(gt, sides_of(task.img_size), sides_of(source.img_size))):
        stored, wanted = in_pixels(source.img_size), shown(task.img_size)
        rule = f"the images of {source.name} were prepared with {stored} px, and would have to be enlarged: prepare "
        rule += f"them again with --img_size {wanted}, or train at {shown(source.img_size)}."
        raise UserError(rule, about="img_size", value=wanted)
    if task.crop != "center":
        check_crops(source.images, source.img_size, task.img_size, of=source.name)
    return StreamLoader(task) if source.streaming else Loader(task)


class Loader:
    """Batches of one process by random access, from a position that is the same on all of them."""

    kind = "random_access"

    def __init__(self, task: ReadingTask):
        kind = task.order_kind or order.default_kind(task.source.num_images)
        self._task, self._position = replace(task, order_kind=kind), 0
        self._batches: Iterator[PixelBatch | UserError] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next image, counted from 0."""
        return self._position // self._task.source.num_images

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> PixelBatch:
        if self._batches is None:
            self._batches = self._read(self._position)
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise batch
        check_labels(batch.labels.numpy(), self._task.num_classes)
        self._position += self._task.step_images
        return batch

    def state_dict(self) -> dict:
        """Return the place of the next batch, and what the order depends on; equal on all processes, JSON."""
        return {"kind": self.kind, **self._circumstances(), "seed": self._task.seed, "position": self._position}

    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Continue where `state` (or the states of all processes) was taken; before the first batch.

        The numbers of processes and workers and the batch size may be others. Lanes and windows stay as they were.
        UserError for a state of another way of reading, or of another seed.
        """
        if self._batches is not None:
            raise RuntimeError("load_state_dict() after the first batch")
        state = state[0] if isinstance(state, list) else state
        for name, now, remedy in (
            ("kind", self.kind, "use the same --streaming as then"),
            ("seed", self._task.seed, f"the order of the images follows from the seed: use {state.get('seed')} again"),
        ):
            if state.get(name) != now:
                rule = f"the checkpoint was saved with the {name} {state.get(name)}, and it is {now} now; {remedy}, or "
                raise UserError(rule + "start anew with --resume none.", about="resume")
        self._position = self._resumed(state)

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def _circumstances(self) -> dict:
        """Return what the order depends on besides the seed."""
        return {"order": self._task.order_kind}

    def _resumed(self, state: dict) -> int:
        """Return the position to go on from, in the order in which the run began."""
        kind = state.get("order", order.SORTED)
        if kind not in order.KINDS:
            rule = f"the checkpoint reads its images in an order ({kind}) that this version does not know: use the "
            raise UserError(rule + "version that saved it, or a newer one.", about="resume")
        self._task = replace(self._task, order_kind=kind)
        return state["position"]

    def _read(self, position: int) -> Iterator[PixelBatch | UserError]:
        """Yield the batches from `position` on."""
        bases = itertools.count(position, self._task.step_images)
        yield from from_workers(RandomAccessBatches(self._task), num_workers=self._task.num_workers, sampler=bases)


class RandomAccessBatches(torch.utils.data.Dataset):
    """Item `base` is the batch of this rank when the run stands at position `base`."""

    def __init__(self, task: ReadingTask):
        self._task, self._images, self._num_images = task, task.source.images, task.source.num_images
        dtype = task.source.pixels.dtype
        num_bytes = task.source.channels * self._num_images * math.prod(sides_of(task.img_size)) * dtype.itemsize
        if task.crop == "center" and task.source.is_encoded and num_bytes <= MOST_KEPT_BYTES:
            self._images = KeptImages(self._images, task.source.channels, task.img_size, dtype)

    def __getitem__(self, base: int) -> PixelBatch | UserError:
        """Return a UserError instead of raising it: torch would bury its message under a worker's traceback."""
        task = self._task
        positions = order.batch_positions(base, task.rank, task.batch_size)
        shape = (task.batch_size, task.source.channels, *sides_of(task.img_size))
        pixels = empty_batch(shape, task.source.pixels.dtype)
        images = pixels.numpy()
        indices = order.image_indices(task.seed, positions, self._num_images, task.order_kind)
        facts, bad = self._read(indices, images, positions)
        for place, reason in bad.items():
            substituted = self._substitute(int(positions[place]), images[place : place + 1])
            if substituted is None:
                which = f"an image and {MAX_SUBSTITUTES} substitutes drawn for it cannot be decoded"
                return undecodable(task.source.name, which, reason)
            facts[place] = substituted
        return task.batch(pixels, facts, positions, list(bad.values()))

    def _substitute(self, position: int, out: np.ndarray) -> Any:
        """Read another image for a position whose own is bad, so that batches keep their shape: a pure function too."""
        draws = position * MAX_SUBSTITUTES + np.arange(MAX_SUBSTITUTES)
        for index in rng.hash64(self._task.seed, "substitute", draws) % np.uint64(self._num_images):
            facts, bad = self._read(np.array([index], np.int64), out, np.array([position]))
            if not bad:  # one that is bad as well is named at its own turn
                return facts[0]
        return None

    def _read(self, indices: np.ndarray, out: np.ndarray, positions: np.ndarray) -> Read:
        at = self._task.crops(positions)
        return self._images.read(indices, out) if at is None else self._images.read(indices, out, at)


class StreamLoader(Loader):
    """Batches in the order of `StreamOrder`, each merged from the parts that the workers decode."""

    kind = "stream"

    @cached_property
    def _order(self) -> order.StreamOrder:
        task, stream = self._task, self._task.source.images
        default = order.default_lanes(int(np.count_nonzero(stream.sizes)), task.world_size, task.batch_size)
        window = images_in_a_window(stream, task.seed, task.shuffle_buffer)
        return order.StreamOrder(task.seed, stream.sizes, task.lanes or default, window)

    def _circumstances(self) -> dict:
        now, buffer = self._order, self._task.shuffle_buffer
        return {"version": STREAM_VERSION, "lanes": now.lanes, "shuffle_buffer": buffer, "window": now.window}

    def _resumed(self, state: dict) -> int:
        task = self._task
        if state["version"] != STREAM_VERSION:
            epoch = state["position"] // task.source.num_images
            rule = "the checkpoint is of a version that read data of this kind in another order: epoch %d, in which it "
            log.warning(rule + "was saved, begins anew", epoch + 1)
            return epoch * task.source.num_images
        for name, now in (("lanes", task.lanes), ("shuffle_buffer", task.shuffle_buffer)):
            if now not in (None, state[name]):
                log.warning("--%s %d: the run began with %d, which stay", name, now, state[name])
        self._task = replace(task, lanes=state["lanes"], shuffle_buffer=state["shuffle_buffer"])
        self._order = order.StreamOrder(task.seed, task.source.images.sizes, state["lanes"], state["window"])
        return state["position"]

    def _read(self, position: int) -> Iterator[PixelBatch | UserError]:
        task, count = self._task, max(1, self._task.num_workers)
        # A message is a part of as many batches as there are workers, and so about as large as a batch.
        groups = partial(_batch_groups, task, self._order, position, count)
        what = (task.source, self._order, task.img_size, groups, task.crops)
        readers = [BatchPartReader(*what, number, count) for number in range(count)]
        if task.num_workers:  # a loader of one worker each: HF divides the shards among the workers that it sees
            readers = [from_workers(reader, num_workers=1) for reader in readers]
        for positions, *parts in zip(groups(), *readers):
            if errors := [part for part in parts if isinstance(part, UserError)]:
                yield errors[0]
                return
            for first in range(0, len(positions), task.batch_size):
                yield self._merged(parts, positions, first)

    def _merged(self, parts: list[BatchPart], positions: np.ndarray, first: int) -> PixelBatch:
        """Return the batch whose first image has the place `first` in `parts`."""
        task, end = self._task, first + self._task.batch_size
        bad = {place: reason for part in parts for place, reason in part.bad_images.items() if first <= place < end}
        reasons = [bad[place] for place in sorted(bad)]
        if len(parts) == 1:
            return task.batch(parts[0].images, parts[0].facts, positions, reasons)
        shape = (task.batch_size, task.source.channels, *sides_of(task.img_size))
        dtype = parts[0].images.dtype
        pinned = torch.empty(shape, dtype=dtype, pin_memory=True) if task.pin_memory else None
        images = empty_batch(shape, task.source.pixels.dtype) if pinned is None else pinned
        facts = np.empty(task.batch_size, parts[0].facts.dtype)
        for part in parts:
            here = slice(*np.searchsorted(part.places, [first, end]))
            places = part.places[here] - first
            images.numpy()[places], facts[places] = part.images.numpy()[here], part.facts[here]
        return task.batch(images, facts, positions[first:end], reasons)


def _batch_groups(task: ReadingTask, stream: order.StreamOrder, start: int, size: int) -> Iterator[np.ndarray]:
    """Yield the positions of a rank's batches from `start` on, `size` batches at a time: int64 (size * batch_size,)."""
    bases = itertools.count(start, task.step_images)
    batches = (stream.positions_of(base, task.rank, task.world_size, task.batch_size) for base in bases)
    while True:
        yield np.concatenate(list(itertools.islice(batches, size)))
