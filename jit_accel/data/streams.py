"""Sequential data sets: exactly resumable, block-shuffled sub-streams, one a worker, merged into batches.

Sub-stream number s of S = processes x max(1, workers) reads every S-th shard of the epoch's shuffled shards from
front to back, `shuffle_buffer` images at a time, and decodes each such block in a shuffled order. So its place is
told by (epoch, HF's own state at the block's start, images of the block already decoded), without any content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from jit_accel import rng
from jit_accel.data import order
from jit_accel.data.batch import Batch, check_labels, decode_row
from jit_accel.data.decode import BadImage
from jit_accel.data.source import Source
from jit_accel.data.state import check_state
from jit_accel.data.tables import shuffle_shards
from jit_accel.data.workers import make_loader
from jit_accel.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a sub-stream stands: `offset` rows into block number `block` of `epoch`.

    `hf` is the state of the HF data set at the block's start, None at an epoch's start.
    """

    epoch: int = 0
    block: int = 0
    offset: int = 0
    hf: dict | None = None


@dataclass
class Chunk:
    """Decoded images that come next in a sub-stream, and the place after them.

    images: uint8 (k, 3, H, W), k <= chunk_size, 0 where all were bad or an epoch ends. labels: int64 (k,).
    """

    images: torch.Tensor
    labels: np.ndarray
    bad_images: list[str]
    after: Place


@dataclass(frozen=True)
class Decoding:
    """What the sub-streams of a loader have in common."""

    img_size: int
    chunk_size: int
    seed: int
    shuffle_buffer: int
    horizontal_flip: bool


class SubStream(torch.utils.data.IterableDataset):
    """The endless chunks of sub-stream `index` of `count`, from `place` on."""

    def __init__(self, source: Source, decoding: Decoding, index: int, count: int, place: Place):
        self.dataset, self.columns, self.decoding = source.dataset, source.columns, decoding
        self.index, self.count, self.place = index, count, place

    def __iter__(self) -> Iterator[Chunk]:
        place = self.place
        while True:
            for chunk in self._epoch(place):
                place = chunk.after
                yield chunk

    def _shards(self, epoch: int):
        """This sub-stream's part of the epoch.

        A data set of its own for each epoch: HF's `set_epoch` would have to come before `load_state_dict`, and the
        loaded state would have to be cleared after the first epoch.
        """
        shuffled = shuffle_shards(self.dataset, int(rng.hash64(self.decoding.seed, "shards", epoch) >> np.uint64(1)))
        if shuffled.num_shards >= self.count:
            return shuffled.shard(num_shards=self.count, index=self.index, contiguous=False)
        return split_dataset_by_node(shuffled, rank=self.index, world_size=self.count)  # every count-th image

    def _epoch(self, place: Place) -> Iterator[Chunk]:
        """From `place` to the end of its epoch."""
        shards = self._shards(place.epoch)
        if place.hf is not None:
            shards.load_state_dict(place.hf)
        rows, end = iter(shards), object()
        first = next(rows, end)
        while True:
            block = [] if first is end else [first, *islice(rows, self.decoding.shuffle_buffer - 1)]
            after = Place(place.epoch, place.block + 1, 0, shards.state_dict())
            first = next(rows, end)  # only now, as the state must lie before it
            if first is end:
                yield from self._block(block, place, Place(place.epoch + 1))
                return
            yield from self._block(block, place, after)
            place = after

    def _block(self, block: list[dict], place: Place, after: Place) -> Iterator[Chunk]:
        """Decode the rest of a block in its shuffled order; an empty block gives one empty chunk."""
        seed, where = self.decoding.seed, f"{self.index}/{place.epoch}"
        numbers = place.block * self.decoding.shuffle_buffer + np.arange(len(block))
        shuffled = np.argsort(rng.hash64(seed, f"block/{where}", numbers), kind="stable")
        mirrored = order.flips(seed, numbers, f"flip/{where}") & self.decoding.horizontal_flip
        offset, done = place.offset, False
        while not done:
            images, labels, bad_images = [], [], []
            while offset < len(block) and len(images) < self.decoding.chunk_size:
                k = shuffled[offset]
                try:
                    pixels = self._decode(block[k], f"image {numbers[k]} of sub-stream {where}")
                    images.append(pixels[..., ::-1] if mirrored[k] else pixels)
                    labels.append(self.columns.label_of(block[k].get(self.columns.label)))
                except BadImage as error:
                    bad_images.append(str(error))
                offset += 1
            done = offset >= len(block)
            yield self._chunk(images, labels, bad_images, after if done else replace(place, offset=offset))

    def _decode(self, row: dict, name: str) -> np.ndarray:
        return decode_row(row[self.columns.image], self.columns, self.decoding.img_size, name)

    def _chunk(self, images: list, labels: list, bad_images: list[str], after: Place) -> Chunk:
        size = self.decoding.img_size
        stacked = np.stack(images) if images else np.empty((0, 3, size, size), np.uint8)
        return Chunk(torch.from_numpy(stacked), np.array(labels, np.int64), bad_images, after)


class _Reader:
    """The caller's end of a sub-stream: its place is that of what was handed out, not of what was prefetched."""

    def __init__(self) -> None:
        self.place, self.taken = Place(), 0  # `taken` images after `place` were handed out
        self.chunk: Chunk | None = None
        self.chunks: Iterator[Chunk] | None = None

    def load(self, state: dict) -> None:
        self.place, self.taken = Place(**state["place"]), state["taken"]

    def state(self) -> dict:
        return {"place": asdict(self.place), "taken": self.taken}

    def take(self, most: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
        """Up to `most` of the images of one chunk, perhaps none, and the bad ones met on the way."""
        bad_images: list[str] = []
        if self.chunk is None:
            self.chunk = next(self.chunks)
            if self.taken == 0:  # else we resume inside it, and they are reported already
                bad_images = self.chunk.bad_images
        size = len(self.chunk.labels)
        start = min(self.taken, size)  # chunks are smaller after a resume with a smaller batch_size
        stop = min(start + most, size)
        images, labels = self.chunk.images[start:stop], self.chunk.labels[start:stop]
        if stop == size:
            self.place, self.taken, self.chunk = self.chunk.after, max(0, self.taken - size), None
        else:
            self.taken = stop
        return images, labels, bad_images


class StreamLoader:
    """Batches merged from the sub-streams of one process, a chunk from each in turn; see `build_loader`."""

    def __init__(
        self,
        source: Source,
        decoding: Decoding,
        *,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        num_classes: int | None,
    ):
        self._source, self._decoding = source, decoding
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers
        self._pin_memory, self._num_classes = pin_memory, num_classes
        self._readers = [_Reader() for _ in range(max(1, num_workers))]
        self._position, self._turn, self._epochs_without_images = 0, 0, 0
        self._started = False

    @property
    def epoch(self) -> int:
        """The epoch in which the next image is looked for, counted from 0; processes may differ by a little."""
        return min(reader.place.epoch for reader in self._readers)

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> Batch:
        if not self._started:
            self._start()
        size = self._decoding.chunk_size
        images, labels, bad_images, missing = [], [], [], size
        while missing:
            more_images, more_labels, more_bad = self._take(missing)
            images.append(more_images)
            labels.append(more_labels)
            bad_images += more_bad
            missing -= len(more_labels)
        labels = np.concatenate(labels)
        check_labels(labels, self._num_classes)
        positions = order.batch_positions(self._position, self._rank, size)
        self._position += self._world_size * size
        whole = next((part for part in images if len(part) == size), None)
        batch = Batch(torch.cat(images) if whole is None else whole, torch.from_numpy(labels), positions, bad_images)
        return batch.pin_memory() if self._pin_memory else batch

    def _take(self, most: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
        """From the sub-stream whose turn it is; one that has ended its epoch waits for the others."""
        epoch = self.epoch
        while self._readers[self._turn].place.epoch > epoch:
            self._turn = (self._turn + 1) % len(self._readers)
        reader = self._readers[self._turn]
        images, labels, bad_images = reader.take(most)
        if reader.chunk is None:
            self._turn = (self._turn + 1) % len(self._readers)
        if len(labels):
            self._epochs_without_images = 0
        elif self.epoch > epoch:
            self._epochs_without_images += 1
            if self._epochs_without_images == 2:  # the first may be the end of one that had images
                raise UserError(
                    f"--data_path {self._source.name}: process {self._rank} found no readable image in a whole epoch"
                    f"{' (' + bad_images[-1] + ')' if bad_images else ''}: repair the data, or use fewer processes "
                    "and --num_workers if there are fewer images than these."
                )
        return images, labels, bad_images

    def _start(self) -> None:
        self._started = True
        count = self._world_size * len(self._readers)
        for number, reader in enumerate(self._readers):
            index = self._rank * len(self._readers) + number
            stream = SubStream(self._source, self._decoding, index, count, reader.place)
            # a loader of one worker each: HF divides the shards among the workers that it sees
            reader.chunks = iter(make_loader(stream, num_workers=1) if self._num_workers else stream)

    def _identity(self) -> dict:
        return {
            "kind": "stream",
            "seed": self._decoding.seed,
            "world_size": self._world_size,
            "rank": self._rank,
            "num_workers": self._num_workers,
            "shuffle_buffer": self._decoding.shuffle_buffer,
        }

    def state_dict(self) -> dict:
        """What was handed out so far; each rank has its own."""
        return {
            **self._identity(),
            "position": self._position,
            "turn": self._turn,
            "sub_streams": [reader.state() for reader in self._readers],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken; before the first batch.

        Raises:
            UserError: the state is of random access, or of other processes, workers, seed or shuffle buffer.
        """
        if self._started:
            raise RuntimeError("load_state_dict() after the first batch")
        check_state(state, self._identity())
        self._position, self._turn = state["position"], state["turn"]
        for reader, saved in zip(self._readers, state["sub_streams"]):
            reader.load(saved)

    def close(self) -> None:
        """End the workers."""
        for reader in self._readers:
            reader.chunks = reader.chunk = None
