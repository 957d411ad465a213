"""The time that training waits for data, and advice against it."""

import shlex
import time

import torch

from jit_accel.data.batches.batch import Batch

_POLL_S = 0.001
# A share is named after this much: less may be chance.
_LEAST_STEPS, _LEAST_S = 20, 2.0
_ENOUGH_S = 10.0


class WaitTime:
    """The time in which `device` had nothing to do because the next batch was not there.

    An interval of steps begins with its first batch and ends when its metrics are read. The first one, in which
    workers start and code is compiled, is not counted by `lost_lately`.
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
    data_path: str, *, num_workers: int, cores: int, is_remote: bool, is_encoded: bool, is_prepared: bool
) -> str:
    """Return what to do about training that waits for its data, where a process has so many `cores` for itself."""
    spare = cores - 1  # one is for the training itself
    if is_remote:
        more = f"--num_workers {max(2 * num_workers, spare, 1)}"
        return f"{more} reads more files at once, and a copy of the data on a local disk needs no network."
    if num_workers < spare:
        return f"--num_workers {spare} (now {num_workers}) uses all cores."
    if is_encoded and is_prepared:
        remedy = "prepare the data with --format uint8, which needs no decoding, or train at a smaller --img_size."
        return f"all cores decode already: {remedy}"
    if is_encoded:
        command = f"python -m jit_accel.prepare --data_path {shlex.quote(data_path)} --format uint8 --output_dir FOLDER"
        return f"all cores decode already: decode once and for all with `{command}`."
    return "the images need no decoding, so it is the disk that is slow: move them to a faster one, or more memory."
