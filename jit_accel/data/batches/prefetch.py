"""Batches copied to the device ahead of their use, by a thread beside the training."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from jit_accel.data.batches.batch import Batch

PATIENCE_S = 2.0


@dataclass(frozen=True)
class _Ready:
    """A batch on the device once `copied` (a CUDA event) is over, and what its loader said after it."""

    batch: Batch
    copied: Any
    state: dict
    epoch: int


class DevicePrefetcher:
    """A loader whose batches are on `device`; see `build_loader` for the interface.

    Up to `depth` batches wait there, copied from page-locked memory by a CUDA stream of their own. `state_dict()` and
    `epoch` tell of the batches that were handed out. Nothing is read before the first `next`.
    """

    def __init__(self, loader, device: torch.device | str, depth: int = 2):
        self._loader, self._device, self._depth = loader, torch.device(device), depth
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._changed = threading.Condition()
        self._ready: deque[_Ready] = deque()
        self._place: tuple[dict, int] | None = None  # state and epoch after the batch handed out last
        self._error: BaseException | None = None  # that ended the thread
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def epoch(self) -> int:
        """The epoch of the next image, counted from 0."""
        return self._loader.epoch if self._place is None else self._place[1]

    def state_dict(self) -> dict:
        """What was handed out so far."""
        return self._loader.state_dict() if self._place is None else self._place[0]

    def load_state_dict(self, states: dict | list[dict]) -> None:
        """Continue where `states` were taken; before the first batch."""
        if self._thread is not None:
            raise RuntimeError("load_state_dict() after the first batch")
        self._loader.load_state_dict(states)

    def __iter__(self) -> DevicePrefetcher:
        return self

    def __next__(self) -> Batch:
        if self._is_closed:
            raise RuntimeError("next() after close()")
        if self._thread is None:
            # Taken here, so that the workers are forked while there is no thread yet that could hold a lock.
            item = self._take()
            self._start()
        else:
            with self._changed:
                self._changed.wait_for(self._has_news)
                if not self._ready:
                    raise self._error
                item = self._ready.popleft()
                self._changed.notify_all()
        self._place = item.state, item.epoch
        return self._handed_over(item)

    def wait(self, timeout_s: float) -> bool:
        """Wait until `next` would return at once, at most `timeout_s`; return whether it would."""
        with self._changed:
            return self._changed.wait_for(self._has_news, timeout_s)

    def close(self) -> None:
        """End the thread and the workers. A thread that waits for a worker longer than `PATIENCE_S` is left to end
        by itself when the batch arrives.
        """
        with self._changed:
            self._is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        atexit.unregister(self.close)
        if self._thread is None:
            self._loader.close()
        else:
            self._thread.join(PATIENCE_S)

    def _has_news(self) -> bool:
        return bool(self._ready) or self._error is not None

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside CUDA while the interpreter goes away would crash it

    def _fill(self) -> None:
        """The thread: alone with the loader from here on, and the one to close it."""
        try:
            while self._has_room():
                item = self._take()
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                del item  # or the batch would stay until the next one came
        except BaseException as error:  # raised where the batch is asked for
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._loader.close()

    def _has_room(self) -> bool:
        """Wait for room; False when the time has come to leave."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._ready) < self._depth)
            return not self._is_closed

    def _take(self) -> _Ready:
        with self._on_own_stream():
            batch, copied = next(self._loader), None
            if self._stream is not None:
                batch = batch if batch.images.is_pinned() else batch.pin_memory()
            batch = batch.to(self._device)
            if self._stream is not None:
                copied = self._stream.record_event()
        return _Ready(batch, copied, self._loader.state_dict(), self._loader.epoch)

    def _on_own_stream(self) -> contextlib.AbstractContextManager:
        """Also makes the device current, which in a new thread is the first one and not that of this process."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _handed_over(self, item: _Ready) -> Batch:
        """Make what the caller does next on the device wait for the copy, and not the caller."""
        if item.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(item.copied)
            for tensor in (item.batch.images, item.batch.labels):
                tensor.record_stream(stream)  # its memory must not be given to another copy before that is over
        return item.batch
