"""Sequential data sets: read front to back, shuffled by blocks, resumed exactly by any number of processes.

Each process reads its share of an epoch in up to eight *lanes* (see `Partition`), a block of `shuffle_buffer` images at
a time, which it hands out in a shuffled order, a batch from each lane in turn. Workers share the lanes, so that
their number changes nothing. The place of a lane is told by a few numbers, without any content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import torch

from jit_accel.base.errors import UserError
from jit_accel.data.batches import order
from jit_accel.data.batches.batch import PixelBatch, check_labels, empty_batch
from jit_accel.data.batches.lanes import Chunk, Decoding, Lane, Lanes
from jit_accel.data.batches.partition import Partition, Place
from jit_accel.data.batches.spans import packed, unpacked
from jit_accel.data.batches.state import check_state
from jit_accel.data.batches.workers import make_loader
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.units import Stream

MAX_LANES = 8
STATE_VERSION = 2


class StreamLoader:
    """Batches merged from the lanes of one process, a chunk from each in turn; see `build_loader`."""

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
        self._source, self._decoding, self._rank = source, decoding, rank
        self._pin_memory, self._num_classes = pin_memory, num_classes
        stream: Stream = source.images
        units_each = stream.num_units // world_size
        # Lanes may begin inside a unit that tells its size, at the cost of reading its beginning in vain.
        num_lanes = min(MAX_LANES, max(1, units_each if stream.sizes is None else 4 * units_each))
        self._num_workers = min(num_workers, num_lanes)
        self._partition = Partition(
            decoding.seed, stream.num_units, stream.sizes, world_size, decoding.batch_size, num_lanes
        )
        self._places = [Place()] * num_lanes
        self._chunk: Chunk | None = None  # begun, of the lane whose turn it is
        self._position, self._turn = 0, 0
        self._images_this_epoch, self._idle_epochs = 0, 0
        self._workers: list[Iterator[Chunk]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next image, counted from 0; without known sizes processes may differ by a little."""
        if self._partition.num_images is not None:
            return self._position // self._partition.num_images
        return min(place.epoch for place in self._places)

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> PixelBatch:
        if self._workers is None:
            self._start()
        size = self._decoding.batch_size
        chunks, missing = [], size
        while missing:
            chunks.append(self._take(missing))
            missing -= len(chunks[-1].labels)
        labels = np.concatenate([chunk.labels for chunk in chunks])
        check_labels(labels, self._num_classes)
        images = [chunk.images for chunk in chunks if len(chunk.labels)]
        batch = PixelBatch(
            images[0] if len(images) == 1 else torch.cat(images, out=empty_batch((size, *images[0].shape[1:]))),
            torch.from_numpy(labels),
            order.batch_positions(self._position, self._rank, size),
            [reason for chunk in chunks for reason in chunk.bad_images.values()],
            np.concatenate([chunk.mirror for chunk in chunks]) if self._decoding.horizontal_flip else None,
        )
        self._position += self._partition.world_size * size
        return batch.pin_memory() if self._pin_memory else batch

    def _take(self, most: int) -> Chunk:
        """Up to `most` images of the lane whose turn it is; one that has ended its epoch waits for the others."""
        epoch = min(place.epoch for place in self._places)
        while self._places[self._turn].epoch > epoch:
            self._turn = (self._turn + 1) % len(self._places)
        lane = self._turn
        chunk, self._chunk = self._chunk or self._next_chunk(lane), None
        if len(chunk.labels) > most:
            chunk, self._chunk = chunk.split(most)
        self._places[lane] = chunk.after
        self._images_this_epoch += len(chunk.labels)
        if self._chunk:
            return chunk
        self._turn = (lane + 1) % len(self._places)
        if min(place.epoch for place in self._places) > epoch:
            self._turn = 0  # each epoch begins with the first lane, in the workers too
            self._refuse_idleness(epoch)
        return chunk

    def _next_chunk(self, lane: int) -> Chunk:
        chunk = next(self._workers[lane % len(self._workers)])
        if isinstance(chunk, UserError):
            raise chunk
        assert chunk.lane == lane, f"lane {chunk.lane} came where {lane} was due"
        return chunk

    def _refuse_idleness(self, epoch: int) -> None:
        """Where whole files are dealt, a process may be left with none; of a rest, that is as it should be."""
        is_idle = not self._images_this_epoch and epoch not in self._partition.left
        self._idle_epochs = self._idle_epochs + 1 if is_idle else 0
        self._images_this_epoch = 0
        if self._partition.sizes is None and self._idle_epochs == 2:  # the first may be the end of one with images
            raise UserError(
                f"process {self._rank} of {self._partition.world_size} found no image "
                f"in a whole epoch: there are {self._partition.num_units} files: use fewer processes, or write more "
                "and smaller files (python -m jit_accel.prepare).",
                about="data_path",
                value=self._source.name,
            )

    def _start(self) -> None:
        lanes = [
            Lane(self._source, self._decoding, self._partition, self._rank, number, place)
            for number, place in enumerate(self._places)
        ]
        count = max(1, self._num_workers)
        epoch = min(place.epoch for place in self._places)
        groups = [Lanes(lanes[worker::count], epoch, self._turn) for worker in range(count)]
        # a loader of one worker each: HF divides the shards among the workers that it sees
        self._workers = [iter(make_loader(group, num_workers=1) if self._num_workers else group) for group in groups]

    def _circumstances(self) -> dict:
        """What the order of the images depends on."""
        partition = self._partition
        return {
            "world_size": partition.world_size,
            "batch_size": partition.batch_size,
            "num_lanes": partition.num_lanes,
            "shuffle_buffer": self._decoding.shuffle_buffer,
        }

    def state_dict(self) -> dict:
        """What was handed out so far; each process has its own."""
        begun = min(place.epoch for place in self._places)
        return {
            "kind": "stream",
            "version": STATE_VERSION,
            "seed": self._decoding.seed,
            **self._circumstances(),
            "rank": self._rank,
            "position": self._position,
            "turn": self._turn,
            "origin": self._partition.origin,
            "left": [[epoch, packed(spans)] for epoch, spans in self._partition.left.items() if epoch >= begun],
            "places": [_plain(place) for place in self._places],
        }

    def load_state_dict(self, states: dict | list[dict]) -> None:
        """Continue where `states` were taken, those of all processes in the order of their ranks; before the first
        batch. Under the circumstances they were saved in the order goes on as well, otherwise what was left of the
        epoch is divided anew.

        Raises:
            UserError: they are of random access, or of another seed.
        """
        if self._workers is not None:
            raise RuntimeError("load_state_dict() after the first batch")
        states = states if isinstance(states, list) else [states]
        for state in states:
            check_state(state, {"kind": "stream", "seed": self._decoding.seed, "version": STATE_VERSION})
        mine = next((state for state in states if state["rank"] == self._rank), states[0])
        saved = replace(
            self._partition,
            **{name: mine[name] for name in ("world_size", "batch_size", "num_lanes", "origin")},
            # each process has those of the epochs it has not passed
            left={epoch: unpacked(spans) for state in states for epoch, spans in state["left"]},
            _parts={},
        )
        self._position = mine["position"]
        if all(mine[name] == value for name, value in self._circumstances().items()):
            assert mine["rank"] == self._rank, "the state is of another process"
            self._partition, self._turn = saved, mine["turn"]
            self._places = [_place(place) for place in mine["places"]]
            return
        assert len(states) == mine["world_size"], "to divide what is left needs the states of all processes"
        left = saved.remaining([[_place(place) for place in state["places"]] for state in states])
        begun = min(left) if self._partition.sizes is None else self.epoch  # what lies before it is empty
        left = {epoch: spans for epoch, spans in left.items() if epoch >= begun}
        self._partition = replace(self._partition, origin=self._position, left=left, _parts={})
        self._places = [Place(begun)] * self._partition.num_lanes

    def close(self) -> None:
        """End the workers."""
        self._workers = self._chunk = None


def _plain(place: Place) -> dict:
    return asdict(place) | {"block": [list(span) for span in place.block]}


def _place(plain: dict) -> Place:
    return Place(**plain | {"block": tuple(tuple(span) for span in plain["block"])})
