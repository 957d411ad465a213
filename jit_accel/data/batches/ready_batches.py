"""Batches that are ready on the device before they are asked for, by a thread beside the training."""

import atexit
import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from jit_accel.data.batches.batch import Batch, ready
from jit_accel.data.batches.loader import build_loader
from jit_accel.data.formats.source import Source

PATIENCE_S = 2.0


def batches(
    source: Source, *, img_size: int, batch_size: int, seed: int = 0, device: torch.device | str = "cpu", **how
) -> "ReadyBatches":
    """Return an endless iterator of the batches that a training sees: images in [-1, 1], labels and positions.

    Args:
        source: of `open_images`.
        img_size: side in pixels to which images are cropped.
        batch_size: images a batch, of this process.
        seed: of the order and of the mirroring.
        how: further arguments of `build_loader`, such as `num_workers`, `horizontal_flip`, `rank` and `world_size`.

    Raises:
        UserError: the images were prepared smaller than `img_size`.
    """
    how = {"pin_memory": torch.device(device).type == "cuda", **how}
    return ReadyBatches(build_loader(source, img_size=img_size, batch_size=batch_size, seed=seed, **how), device)


@dataclass(frozen=True)
class _Waiting:
    """A batch on the device once `copied` (a CUDA event) is over, and the loader's state and epoch after it."""

    batch: Batch
    copied: Any
    state: dict
    epoch: int


class ReadyBatches:
    """An endless iterator of `Batch`es on `device`, made of the `PixelBatch`es of `loader`.

    Up to `depth` batches wait on the device, copied from page-locked memory by a CUDA stream of their own. With depth
    0, the default on a CPU, where a thread would take the cores from the training, each is made when it is asked for.
    `state_dict()` and `epoch` describe what was handed out. Nothing is read before the first `next`.
    """

    def __init__(self, loader, device: torch.device | str, depth: int | None = None):
        self._loader, self._device = loader, torch.device(device)
        self._depth = (0 if self._device.type == "cpu" else 2) if depth is None else depth
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._place: tuple[dict, int] | None = None  # state and epoch after the batch handed out last
        self._error: BaseException | None = None  # the end of the thread
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def epoch(self) -> int:
        """The epoch of the next image, counted from 0."""
        return self._loader.epoch if self._place is None else self._place[1]

    def state_dict(self) -> dict:
        """Return the place of the next batch: a few numbers, the same on all processes."""
        return self._loader.state_dict() if self._place is None else self._place[0]

    def load_state_dict(self, state: dict | list[dict]) -> None:
        """Continue where `state` was taken, before the first batch; errors are those of `Loader`."""
        if self._place is not None:
            raise RuntimeError("load_state_dict() after the first batch")
        self._loader.load_state_dict(state)

    def __iter__(self) -> "ReadyBatches":
        return self

    def __next__(self) -> Batch:
        if self._is_closed:
            raise RuntimeError("next() after close()")
        if self._thread is None:
            # Taken here, so that the workers are forked while there is no thread yet that could hold a lock.
            item = self._take()
            if self._depth:
                self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
                self._thread.start()
                atexit.register(self.close)  # a thread inside CUDA while the interpreter goes away would crash it
        else:
            with self._changed:
                self._changed.wait_for(self._has_news)
                if not self._waiting:
                    raise self._error
                item = self._waiting.popleft()
                self._changed.notify_all()
        self._place = item.state, item.epoch
        return self._handed_over(item)

    def wait(self, timeout_s: float) -> bool:
        """Wait until `next` would return at once, at most `timeout_s`; return whether it would."""
        with self._changed:
            return self._changed.wait_for(self._has_news, timeout_s)

    def close(self) -> None:
        """End the thread and the workers; a thread that waits for one after `PATIENCE_S` ends when that answers."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        atexit.unregister(self.close)
        if self._thread is None:
            self._loader.close()
        else:
            self._thread.join(PATIENCE_S)

    def _has_news(self) -> bool:
        return bool(self._waiting) or self._error is not None

    def _fill(self) -> None:
        """Run the thread: alone with the loader from here on, and the one to close it."""
        try:
            while self._has_room():
                item = self._take()
                with self._changed:
                    self._waiting.append(item)
                    self._changed.notify_all()
                del item  # or the batch would stay until the next one came
        except BaseException as error:  # raised where the batch is asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._loader.close()

    def _has_room(self) -> bool:
        """Wait for room; return False when the time has come to leave."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._waiting) < self._depth)
            return not self._is_closed

    def _take(self) -> _Waiting:
        # The stream also makes the device current, which in a new thread is the first one and not that of this process.
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            pixels = next(self._loader)
            if self._stream is not None and not pixels.images.is_pinned():
                pixels = pixels.pin_memory()
            batch = ready(pixels, self._device)
            copied = self._stream.record_event() if self._stream is not None else None
        return _Waiting(batch, copied, self._loader.state_dict(), self._loader.epoch)

    def _handed_over(self, item: _Waiting) -> Batch:
        """Make what the caller does next on the device wait for the copy, and not the caller."""
        if item.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(item.copied)
            for tensor in (item.batch.images, item.batch.labels):
                tensor.record_stream(stream)  # its memory must not be given to another copy before that is over
        return item.batch
