"""Endless batches of decoded images for one process of the run, with exactly resumable state."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from jit_accel import rng
from jit_accel.data import order
from jit_accel.data.batch import Batch, check_labels, decode_row
from jit_accel.data.decode import BadImage
from jit_accel.data.source import Source
from jit_accel.data.state import check_state
from jit_accel.data.streams import Decoding, StreamLoader
from jit_accel.data.workers import make_loader
from jit_accel.errors import UserError

__all__ = ["Batch", "RandomAccessLoader", "StreamLoader", "build_loader"]

MAX_SUBSTITUTES = 100


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
    pin_memory: bool = False,
    shuffle_buffer: int = 2048,
    num_classes: int | None = None,
) -> RandomAccessLoader | StreamLoader:
    """An endless iterator of `Batch`es of `batch_size` images for process `rank` of `world_size`.

    It has `state_dict()` (small, JSON, describing what was handed out and not what was prefetched),
    `load_state_dict(state)` (before the first batch), `epoch` and `close()`. Random access gives each image exactly
    once an epoch in an order that does not depend on `world_size`, `batch_size` or `num_workers`, and a state may be
    resumed with other values of them. A stream gives each image once an epoch as well, in an order that depends on
    them, and is resumed with the same values only.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        shuffle_buffer: images a stream shuffles together; held undecoded, by each worker.
        num_classes: labels from here on are refused with a `UserError` when they are met.
    """
    how = {"world_size": world_size, "num_workers": num_workers, "pin_memory": pin_memory, "num_classes": num_classes}
    if source.streaming:
        decoding = Decoding(img_size, batch_size, seed, shuffle_buffer, horizontal_flip)
        return StreamLoader(source, decoding, rank=rank, **how)
    return RandomAccessLoader(_BatchView(source, img_size, batch_size, seed, rank, horizontal_flip), **how)


class _BatchView(torch.utils.data.Dataset):
    """Item `base` is the batch of this rank when the run stands at position `base`."""

    def __init__(self, source: Source, img_size: int, batch_size: int, seed: int, rank: int, horizontal_flip: bool):
        self.dataset, self.columns, self.num_images = source.dataset, source.columns, len(source.dataset)
        self.img_size, self.batch_size, self.seed, self.rank = img_size, batch_size, seed, rank
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, base: int) -> Batch | UserError:
        """A UserError is returned, not raised: torch would bury its message under a worker's traceback."""
        positions = order.batch_positions(base, self.rank, self.batch_size)
        indices = order.image_indices(self.seed, positions, self.num_images)
        rows = self.dataset[indices.tolist()]
        images = np.empty((self.batch_size, 3, self.img_size, self.img_size), np.uint8)
        labels = np.zeros(self.batch_size, np.int64)
        label_values = rows[self.columns.label] if self.columns.label else itertools.repeat(None)
        bad_images: list[str] = []
        for i, (value, label) in enumerate(zip(rows[self.columns.image], label_values)):
            try:
                images[i] = decode_row(value, self.columns, self.img_size, f"image {indices[i]}")
                labels[i] = self.columns.label_of(label)
            except BadImage as error:
                bad_images.append(str(error))
                substitute = self._substitute(int(positions[i]), bad_images)
                if isinstance(substitute, UserError):
                    return substitute
                images[i], labels[i] = substitute
        if self.horizontal_flip:
            mirrored = order.flips(self.seed, positions)
            images[mirrored] = images[mirrored, ..., ::-1]
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), positions, bad_images)

    def _substitute(self, position: int, bad_images: list[str]) -> tuple[np.ndarray, int] | UserError:
        """Another image for a position whose own is bad, so that batches keep their shape: a pure function too."""
        draws = position * MAX_SUBSTITUTES + np.arange(MAX_SUBSTITUTES)
        for index in rng.hash64(self.seed, "substitute", draws) % np.uint64(self.num_images):
            row = self.dataset[int(index)]
            try:
                pixels = decode_row(row[self.columns.image], self.columns, self.img_size, f"image {index}")
            except BadImage:  # it is named at its own turn
                continue
            return pixels, self.columns.label_of(row[self.columns.label] if self.columns.label else None)
        return UserError(
            f"--data_path: an image and {MAX_SUBSTITUTES} substitutes drawn for it cannot be decoded "
            f"({bad_images[-1]}): repair the data."
        )


class RandomAccessLoader:
    """Batches of a data set with random access: the state is one position, whatever the number of processes."""

    def __init__(
        self, view: _BatchView, *, world_size: int, num_workers: int, pin_memory: bool, num_classes: int | None
    ):
        self._view, self._world_size = view, world_size
        self._num_workers, self._pin_memory, self._num_classes = num_workers, pin_memory, num_classes
        self._position = 0
        self._batches = None

    @property
    def epoch(self) -> int:
        """The epoch of the next image, counted from 0."""
        return self._position // self._view.num_images

    def __iter__(self) -> RandomAccessLoader:
        return self

    def __next__(self) -> Batch:
        stride = self._world_size * self._view.batch_size
        if self._batches is None:
            loader = make_loader(
                self._view,
                num_workers=self._num_workers,
                sampler=_Bases(self._position, stride),
                pin_memory=self._pin_memory,
            )
            self._batches = iter(loader)
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise batch
        check_labels(batch.labels.numpy(), self._num_classes)
        self._position += stride
        return batch

    def state_dict(self) -> dict:
        """The position of the next batch; equal on all ranks."""
        return {"kind": "random_access", "seed": self._view.seed, "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken; before the first batch.

        Raises:
            UserError: the state is of a stream, or of another seed.
        """
        if self._batches is not None:
            raise RuntimeError("load_state_dict() after the first batch")
        check_state(state, {"kind": "random_access", "seed": self._view.seed})
        self._position = state["position"]

    def close(self) -> None:
        """End the workers."""
        self._batches = None


class _Bases:
    def __init__(self, start: int, stride: int):
        self._start, self._stride = start, stride

    def __iter__(self):
        return itertools.count(self._start, self._stride)
