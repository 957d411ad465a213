"""Batches that are ready on the device before they are asked for, the time waited for them, and advice against it."""

import atexit
import contextlib
import shlex
import threading
import time
from collections import deque
from typing import Any

import torch

from jit_accel.base.errors import UserError, check_ranges
from jit_accel.config.presets import sides_of
from jit_accel.data.batches.batch import Batch, ready
from jit_accel.data.batches.degradations import Degradation, degradation_of
from jit_accel.data.batches.loader import build_loader
from jit_accel.data.formats.source import Source

PATIENCE_S = 2.0
_POLL_S = 0.001
# A share of time waited is named after this much: less may be chance.
_LEAST_STEPS, _LEAST_S = 20, 2.0
_ENOUGH_S = 10.0


def batches(
    source: Source,
    *,
    img_size: int | tuple[int, int],
    batch_size: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    condition_from: str | None = None,
    **how,
) -> "ReadyBatches":
    """Return an endless iterator of the batches that a training sees: images in [-1, 1], labels and positions.

    Args:
        img_size: to which images are cropped: the side in pixels, or height and width.
        batch_size: images a batch, of this process.
        seed: of the order, of the mirroring, and of what is random about conditions.
        condition_from: what makes conditions of the images, such as "downscale:4", where they have none.
        how: further fields of `ReadingTask`, such as `num_workers`, `horizontal_flip`, `crop="random"`, `rank` and
            `world_size`.

    UserError if a number is below 1, the images were prepared smaller than `img_size`, or leave random crops nothing to
    choose, or they have conditions already.
    """
    counts = {"img_size": img_size, "batch_size": batch_size, "lanes": how.get("lanes")}
    check_ranges(counts, [(name, lambda count: min(sides_of(count)) >= 1, "at least 1") for name in counts])
    how = {"pin_memory": torch.device(device).type == "cuda", **how}
    degradation = None if condition_from is None else degradation_of(condition_from, seed)
    if degradation and source.condition_channels:
        rule = f"the images of {source.name} come with conditions: leave it out."
        raise UserError(rule, about="condition_from", value=condition_from)
    loader = build_loader(source, img_size=img_size, batch_size=batch_size, seed=seed, **how)
    return ReadyBatches(loader, device, degradation=degradation)


class ReadyBatches:
    """An endless iterator of `Batch`es on `device`, made of the `PixelBatch`es of `loader`.

    Up to `depth` batches wait on the device, copied from page-locked memory by a CUDA stream of their own. With depth
    0, the default on a CPU, where a thread would take the cores from the training, each is made when it is asked for.
    `state_dict()` and `epoch` describe what was handed out. Nothing is read before the first `next`.
    """

    def __init__(
        self, loader, device: torch.device | str, depth: int | None = None, degradation: Degradation | None = None
    ):
        self._loader, self._device, self._degradation = loader, torch.device(device), degradation
        self._depth = (0 if self._device.type == "cpu" else 2) if depth is None else depth
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Batch, Any, tuple[dict, int]]] = deque()  # see `_take`
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
        batch, copied, self._place = item
        if copied is not None:  # what the caller does next on the device waits for the copy, and not the caller
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in filter(torch.is_tensor, vars(batch).values()):
                tensor.record_stream(stream)  # its memory must not be given to another copy before that is over
        return batch

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
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or len(self._waiting) < self._depth)
                    if self._is_closed:
                        break
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

    def _take(self) -> tuple[Batch, Any, tuple[dict, int]]:
        """Make a batch, on the device once an event of CUDA is over; the loader's state and epoch after it."""
        # The stream also makes the device current, which in a new thread is the first one and not that of this process.
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            pixels = next(self._loader)
            if self._stream is not None and not pixels.images.is_pinned():
                pixels = pixels.pin_memory()
            batch = ready(pixels, self._device, self._degradation)
            copied = self._stream.record_event() if self._stream is not None else None
        return batch, copied, (self._loader.state_dict(), self._loader.epoch)


class WaitTime:
    """The time in which `device` had nothing to do because the next batch was not there.

    An interval of steps begins with its first batch and ends when its metrics are read. `lost_lately` does not count
    the first one, in which workers start and code is compiled.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0  # waited in this interval, by this process
        self._begun: float | None = None
        self._is_warm = False
        self._recent = (0, 0.0, 0.0)  # steps, seconds, of these waited

    def next(self, loader) -> Batch:
        """Return the next batch of `loader`; the wait for it is added to `seconds`."""
        if self._begun is None:
            self._begun = time.perf_counter()
        idle_since = self._idle_since(loader)
        batch = next(loader)
        if idle_since is not None:
            self.seconds += time.perf_counter() - idle_since
        return batch

    def _idle_since(self, loader) -> float | None:
        """Return when the device ran out of work before a batch was there; None if it did not."""
        if self.device.type != "cpu":  # and `loader` is a ReadyBatches
            if loader.wait(0):
                return None
            work = self._work()
            while not work.query():  # the host runs ahead of the device: until that is idle, nothing is lost
                if loader.wait(_POLL_S):
                    return None
        return time.perf_counter()

    def _work(self):
        """Return an event behind all the work that the device has so far."""
        event = torch.get_device_module(self.device).Event()
        event.record()
        return event

    def end_interval(self, steps: int, waited_s: float) -> float:
        """Return the share, 0..1, that an interval lost in which the slowest process waited `waited_s`."""
        elapsed_s = time.perf_counter() - (self._begun or 0.0)
        share = min(1.0, waited_s / elapsed_s)
        if self._is_warm:
            self._recent = tuple(a + b for a, b in zip(self._recent, (steps, elapsed_s, waited_s)))
        self._is_warm, self._begun, self.seconds = True, None, 0.0
        return share

    def lost_lately(self) -> float | None:
        """Return the share lost since the last answer; None where that is too short a time."""
        steps, elapsed_s, waited_s = self._recent
        if elapsed_s < (_LEAST_S if steps >= _LEAST_STEPS else _ENOUGH_S):
            return None
        self._recent = (0, 0.0, 0.0)
        return min(1.0, waited_s / elapsed_s)


def waiting_advice(
    data_path: str,
    *,
    num_workers: int,
    cores: int,
    is_remote: bool,
    is_encoded: bool,
    is_prepared: bool,
    has_conditions: bool = False,
    crop: str = "center",
) -> str:
    """Return what to do about training that waits for its data, where a process has so many `cores` for itself."""
    spare = cores - 1  # one is for the training itself
    if is_remote:
        more = f"--num_workers {max(2 * num_workers, spare, 1)}"
        return f"{more} reads more files at once, and a copy of the data on a local disk needs no network."
    if num_workers < spare:
        return f"--num_workers {spare} (now {num_workers}) uses all cores."
    if is_encoded:
        command = f"python -m jit_accel.prepare --data_path {shlex.quote(data_path)} --format uint8 --output_dir FOLDER"
        remedy = f"decode once and for all with `{command}`{', and the flag of the conditions' * has_conditions}"
        remedy += "." if crop == "center" else f", and train with --crop center: --crop {crop} decodes an image anew."
        if is_prepared:
            remedy = "prepare the data with --format uint8, which needs no decoding, or train at a smaller --img_size."
        return f"all cores decode already: {remedy}"
    return "the images need no decoding, so it is the disk that is slow: move them to a faster one, or more memory."
