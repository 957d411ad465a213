"""Endless batches of decoded images for one process of the run, with exactly resumable state."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from jit_accel.base import rng
from jit_accel.base.errors import UserError
from jit_accel.data.batches import order
from jit_accel.data.batches.batch import MAX_SUBSTITUTES, PixelBatch, check_labels, empty_batch
from jit_accel.data.batches.lanes import Decoding
from jit_accel.data.batches.state import check_state
from jit_accel.data.batches.streams import StreamLoader
from jit_accel.data.batches.workers import make_loader
from jit_accel.data.formats.source import Source

__all__ = ["PixelBatch", "RandomAccessLoader", "StreamLoader", "build_loader"]


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
    shuffle_buffer: int = 1024,
    num_classes: int | None = None,
) -> RandomAccessLoader | StreamLoader:
    """An endless iterator of `PixelBatch`es of `batch_size` images for process `rank` of `world_size`.

    It has `state_dict()` (small, JSON, describing what was handed out and not what was prefetched),
    `load_state_dict(states)` (of all processes in the order of their ranks; before the first batch), `epoch` and
    `close()`. Each image comes exactly once an epoch, and states may be resumed with other values of `world_size`,
    `batch_size` and `num_workers`. Random access gives the images in an order that does not depend on these; the
    order of a stream depends on the first two.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        shuffle_buffer: images that each of the (up to eight) lanes of a stream shuffles together.
        num_classes: labels from here on are refused with a `UserError` when they are met.

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
    how = {"world_size": world_size, "num_workers": num_workers, "pin_memory": pin_memory, "num_classes": num_classes}
    if source.streaming:
        decoding = Decoding(img_size, batch_size, seed, shuffle_buffer, horizontal_flip)
        return StreamLoader(source, decoding, rank=rank, **how)
    return RandomAccessLoader(_BatchView(source, img_size, batch_size, seed, rank, horizontal_flip), **how)


class _BatchView(torch.utils.data.Dataset):
    """Item `base` is the batch of this rank when the run stands at position `base`."""

    def __init__(self, source: Source, img_size: int, batch_size: int, seed: int, rank: int, horizontal_flip: bool):
        self.images, self.num_images = source.images, len(source.images)
        self.img_size, self.batch_size, self.seed, self.rank = img_size, batch_size, seed, rank
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, base: int) -> PixelBatch | UserError:
        """A UserError is returned, not raised: torch would bury its message under a worker's traceback."""
        positions = order.batch_positions(base, self.rank, self.batch_size)
        batch = empty_batch((self.batch_size, 3, self.img_size, self.img_size))
        images = batch.numpy()
        labels, bad = self.images.read(order.image_indices(self.seed, positions, self.num_images), images)
        for place, reason in bad.items():
            label = self._substitute(int(positions[place]), images[place : place + 1])
            if label is None:
                return UserError(
                    f"an image and {MAX_SUBSTITUTES} substitutes drawn for it cannot be decoded "
                    f"({reason}): repair the data.",
                    about="data_path",
                )
            labels[place] = label
        mirror = order.flips(self.seed, positions) if self.horizontal_flip else None
        return PixelBatch(batch, torch.from_numpy(labels), positions, list(bad.values()), mirror)

    def _substitute(self, position: int, out: np.ndarray) -> int | None:
        """Another image for a position whose own is bad, so that batches keep their shape: a pure function too."""
        draws = position * MAX_SUBSTITUTES + np.arange(MAX_SUBSTITUTES)
        for index in rng.hash64(self.seed, "substitute", draws) % np.uint64(self.num_images):
            labels, bad = self.images.read(np.array([index], np.int64), out)
            if not bad:  # one that is bad as well is named at its own turn
                return int(labels[0])
        return None


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

    def __next__(self) -> PixelBatch:
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

    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Continue where `state` (or the states of all processes, which are equal) was taken; before the first batch.

        Raises:
            UserError: the state is of a stream, or of another seed.
        """
        state = state[0] if isinstance(state, list) else state
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
