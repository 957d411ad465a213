"""Endless batches of decoded images for one process of the run, with exactly resumable state."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from jit_accel.base import rng
from jit_accel.base.errors import UserError
from jit_accel.data.batches import order
from jit_accel.data.batches.batch import MAX_SUBSTITUTES, PixelBatch, check_labels, empty_batch
from jit_accel.data.batches.lanes import BatchPart, BatchPartReader, images_in_a_window
from jit_accel.data.batches.workers import make_loader
from jit_accel.data.formats.source import Source

log = logging.getLogger(__name__)
STREAM_VERSION = 3  # of the order, and of the state that goes with it


def build_loader(
    source: Source,
    *,
    img_size: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    horizontal_flip: bool = True,
    shuffle_buffer: int = 1024,
    lanes: int | None = None,
    num_classes: int | None = None,
    pin_memory: bool = False,
) -> "Loader":
    """Return an endless iterator of `PixelBatch`es of `batch_size` images for process `rank` of `world_size`.

    Each image comes exactly once an epoch, in an order that follows from the seed and the data (of a stream also from
    `lanes` and `shuffle_buffer`), and not from the numbers of processes and workers.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        shuffle_buffer: images of a lane of a stream that are shuffled together; fewer where they are large.
        lanes: of a stream; None for about eight a process.
        num_classes: labels from here on are refused with a `UserError` when they are met.
        pin_memory: merge what workers decode of a stream in page-locked memory.

    Raises:
        UserError: the images were prepared smaller than `img_size`.
    """
    if source.img_size is not None and img_size > source.img_size:
        raise UserError(
            f"the images of {source.name} were prepared with {source.img_size} px, and would "
            f"have to be enlarged: prepare them again with --img_size {img_size}, or train at {source.img_size}.",
            about="img_size",
            value=img_size,
        )
    task = ReadingTask(source, img_size, batch_size, seed, rank, world_size, num_workers, horizontal_flip, pin_memory)
    reader = StreamReader(task, shuffle_buffer, lanes) if source.streaming else RandomAccessReader(task)
    return Loader(task, reader, num_classes)


@dataclass(frozen=True)
class ReadingTask:
    """The arguments of `build_loader` that all readers need."""

    source: Source
    img_size: int
    batch_size: int
    seed: int
    rank: int
    world_size: int
    num_workers: int
    horizontal_flip: bool
    pin_memory: bool

    @property
    def step_images(self) -> int:
        """Images of one micro-batch of all processes."""
        return self.world_size * self.batch_size

    @property
    def num_images(self) -> int:
        images = self.source.images
        return int(images.sizes.sum()) if self.source.streaming else len(images)

    def batch(self, images: torch.Tensor, labels: np.ndarray, positions: np.ndarray, bad: list[str]) -> PixelBatch:
        """Return a batch with the mirroring that follows from the positions."""
        mirror = order.flips(self.seed, positions) if self.horizontal_flip else None
        return PixelBatch(images, torch.from_numpy(labels), positions, bad, mirror)


class Loader:
    """Batches of one process, from a position that is the same on all of them; see `build_loader`."""

    def __init__(self, task: ReadingTask, reader: "RandomAccessReader | StreamReader", num_classes: int | None):
        self._task, self._reader, self._num_classes = task, reader, num_classes
        self._position = 0
        self._batches: Iterator[PixelBatch | UserError] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next image, counted from 0."""
        return self._position // self._task.num_images

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> PixelBatch:
        if self._batches is None:
            self._batches = self._reader.batches(self._position)
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise batch
        check_labels(batch.labels.numpy(), self._num_classes)
        self._position += self._task.step_images
        return batch

    def state_dict(self) -> dict:
        """Return the place of the next batch, and what the order depends on; equal on all processes, JSON."""
        return {**self._reader.circumstances(), "seed": self._task.seed, "position": self._position}

    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Continue where `state` (or the states of all processes) was taken; before the first batch.

        The numbers of processes and workers and the batch size may be others. Lanes and windows stay as they were.
        Raises `UserError` for a state of another way of reading, or of another seed.
        """
        if self._batches is not None:
            raise RuntimeError("load_state_dict() after the first batch")
        state = state[0] if isinstance(state, list) else state
        for name, now, remedy in (
            ("kind", self._reader.kind, "use the same --streaming as then"),
            ("seed", self._task.seed, f"the order of the images follows from the seed: use {state.get('seed')} again"),
        ):
            if state.get(name) != now:
                raise UserError(
                    f"the checkpoint was saved with the {name} {state.get(name)}, and it is {now} now; {remedy}, or "
                    "start anew with --resume none.",
                    about="resume",
                )
        self._position = self._reader.resumed(state)

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None


class RandomAccessReader(torch.utils.data.Dataset):
    """Item `base` is the batch of this rank when the run stands at position `base`."""

    kind = "random_access"

    def __init__(self, task: ReadingTask):
        self._task, self._images, self._num_images = task, task.source.images, task.num_images

    def circumstances(self) -> dict:
        """Return what the order depends on besides the seed."""
        return {"kind": self.kind}

    def resumed(self, state: dict) -> int:
        """Return the position to go on from."""
        return state["position"]

    def batches(self, position: int) -> Iterator[PixelBatch | UserError]:
        """Yield the batches from `position` on."""
        bases = itertools.count(position, self._task.step_images)
        yield from make_loader(self, num_workers=self._task.num_workers, sampler=bases)

    def __getitem__(self, base: int) -> PixelBatch | UserError:
        """Return a UserError instead of raising it: torch would bury its message under a worker's traceback."""
        task = self._task
        positions = order.batch_positions(base, task.rank, task.batch_size)
        pixels = empty_batch((task.batch_size, 3, task.img_size, task.img_size))
        images = pixels.numpy()
        labels, bad = self._images.read(order.image_indices(task.seed, positions, self._num_images), images)
        for place, reason in bad.items():
            label = self._substitute(int(positions[place]), images[place : place + 1])
            if label is None:
                return UserError(
                    f"an image and {MAX_SUBSTITUTES} substitutes drawn for it cannot be decoded "
                    f"({reason}): repair the data.",
                    about="data_path",
                )
            labels[place] = label
        return task.batch(pixels, labels, positions, list(bad.values()))

    def _substitute(self, position: int, out: np.ndarray) -> int | None:
        """Read another image for a position whose own is bad, so that batches keep their shape: a pure function too."""
        draws = position * MAX_SUBSTITUTES + np.arange(MAX_SUBSTITUTES)
        for index in rng.hash64(self._task.seed, "substitute", draws) % np.uint64(self._num_images):
            labels, bad = self._images.read(np.array([index], np.int64), out)
            if not bad:  # one that is bad as well is named at its own turn
                return int(labels[0])
        return None


class StreamReader:
    """Batches in the order of `StreamOrder`, each merged from the parts that the workers decode."""

    kind = "stream"

    def __init__(self, task: ReadingTask, shuffle_buffer: int, lanes: int | None):
        self._task, self._shuffle_buffer, self._lanes = task, shuffle_buffer, lanes

    @cached_property
    def _order(self) -> order.StreamOrder:
        task, stream = self._task, self._task.source.images
        default = order.default_lanes(int(np.count_nonzero(stream.sizes)), task.world_size, task.batch_size)
        window = images_in_a_window(stream, task.seed, self._shuffle_buffer)
        return order.StreamOrder(task.seed, stream.sizes, self._lanes or default, window)

    def circumstances(self) -> dict:
        """Return what the order depends on besides the seed."""
        now = self._order
        buffer = {"shuffle_buffer": self._shuffle_buffer, "window": now.window}
        return {"kind": self.kind, "version": STREAM_VERSION, "lanes": now.lanes, **buffer}

    def resumed(self, state: dict) -> int:
        """Return the position to go on from, with the lanes and windows of `state`."""
        if state["version"] != STREAM_VERSION:
            epoch = state["position"] // self._task.num_images
            log.warning(
                "the checkpoint is of a version that read data of this kind in another order: epoch %d, in which it "
                "was saved, begins anew",
                epoch + 1,
            )
            return epoch * self._task.num_images
        for name, now in (("lanes", self._lanes), ("shuffle_buffer", self._shuffle_buffer)):
            if now not in (None, state[name]):
                log.warning("--%s %d: the run began with %d, which stay", name, now, state[name])
        self._lanes, self._shuffle_buffer = state["lanes"], state["shuffle_buffer"]
        sizes = self._task.source.images.sizes
        self._order = order.StreamOrder(self._task.seed, sizes, state["lanes"], state["window"])
        return state["position"]

    def batches(self, position: int) -> Iterator[PixelBatch | UserError]:
        """Yield the batches from `position` on."""
        task, count = self._task, max(1, self._task.num_workers)
        # A message is a part of as many batches as there are workers, and so about as large as a batch.
        groups = partial(_batch_groups, task, self._order, position, count)
        readers = [BatchPartReader(task.source, self._order, task.img_size, groups, n, count) for n in range(count)]
        if task.num_workers:  # a loader of one worker each: HF divides the shards among the workers that it sees
            readers = [make_loader(reader, num_workers=1) for reader in readers]
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
            return task.batch(parts[0].images, parts[0].labels, positions, reasons)
        shape = (task.batch_size, 3, task.img_size, task.img_size)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if task.pin_memory else empty_batch(shape)
        labels = np.empty(task.batch_size, np.int64)
        for part in parts:
            here = slice(*np.searchsorted(part.places, [first, end]))
            places = part.places[here] - first
            images.numpy()[places], labels[places] = part.images.numpy()[here], part.labels[here]
        return task.batch(images, labels, positions[first:end], reasons)


def _batch_groups(task: ReadingTask, stream: order.StreamOrder, start: int, size: int) -> Iterator[np.ndarray]:
    """Yield the positions of a rank's batches from `start` on, `size` batches at a time: int64 (size * batch_size,)."""
    bases = itertools.count(start, task.step_images)
    batches = (stream.positions_of(base, task.rank, task.world_size, task.batch_size) for base in bases)
    while True:
        yield np.concatenate(list(itertools.islice(batches, size)))
