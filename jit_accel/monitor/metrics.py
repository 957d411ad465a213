"""What is measured in a training, kept on the device until a whole interval is read at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jit_accel.monitor.metric_table import (
    BEST_LOSS,
    EMA_DISTANCE,
    EPOCH,
    EPOCH_LOSS,
    EPOCH_TIME,
    GRAD_NORM,
    IMAGES_SEEN,
    LEARNING_RATE,
    LOSS_BY_T,
    SAMPLES_PER_SECOND,
    TRAIN_LOSS,
    UPDATE_RATIO,
)

T_BINS = 10


class StepMetrics:
    """Losses, gradient norms and further values of the steps since the last flush.

    Nothing here waits for the device, except `flush`: one all-reduce and one copy to the host.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._forget()

    def _forget(self) -> None:
        self.steps: list[int] = []
        self.learning_rates: list[float] = []
        self.losses: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.occasional: list[tuple[int, str, Tensor, Tensor | None]] = []
        self.by_t = torch.zeros(2, T_BINS, device=self.device)  # sums of losses, and how many, by the time t

    def record_by_t(self, t: Tensor, losses: Tensor) -> None:
        """Keep the losses (B,) of one micro-step by their times (B,) in [0, 1]."""
        bins = (t * T_BINS).long().clamp(0, T_BINS - 1)
        # A product, since sums by index are not deterministic on GPUs.
        is_in_bin = (bins[:, None] == torch.arange(T_BINS, device=t.device)).float()
        self.by_t += torch.stack([losses.detach().float(), torch.ones_like(t)]) @ is_in_bin

    def record(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Keep one step's values; `loss` is this process's mean, `grad_norm` the global one, before clipping."""
        self.steps.append(step)
        self.learning_rates.append(learning_rate)
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def record_occasional(self, name: str, value: Tensor) -> None:
        """Keep a further value of the step recorded last, one that not every step has."""
        self.occasional.append((self.steps[-1], name, value, None))

    def record_ratio(self, name: str, part: Tensor, whole: Tensor) -> None:
        """The same for a ratio of two L2 norms, of which these are the squares over this process's share."""
        self.occasional.append((self.steps[-1], name, part, whole))

    def flush(self, reduce_mean, counters: list[float]) -> tuple[list[dict], list[float]]:
        """Read and forget the kept steps.

        Args:
            reduce_mean: averages a float32 tensor over the processes.
            counters: further numbers of this process to average with them.

        Returns:
            One row a step, keyed as the trackers show them, and the averaged counters.
        """
        parts = [part for _, _, part, _ in self.occasional]
        wholes = [part if whole is None else whole for _, _, part, whole in self.occasional]
        on_device = [*self.losses, *self.grad_norms, *parts, *wholes]
        # On the device also where no step is kept: NCCL reduces nothing else.
        kept = [torch.tensor(counters, dtype=torch.float32, device=self.device), self.by_t.flatten()]
        if on_device:
            kept.append(torch.stack(on_device).float())
        values = iter(reduce_mean(torch.cat(kept)).tolist())
        counters = [next(values) for _ in counters]
        by_t = [[next(values) for _ in range(T_BINS)] for _ in range(2)]
        losses, norms = ([next(values) for _ in self.steps] for _ in range(2))
        parts, wholes = ([next(values) for _ in self.occasional] for _ in range(2))

        rows = {
            step: {"step": step, TRAIN_LOSS: loss, GRAD_NORM: norm, LEARNING_RATE: rate}
            for step, loss, norm, rate in zip(self.steps, losses, norms, self.learning_rates)
        }
        for (step, name, _, whole), value, size in zip(self.occasional, parts, wholes):
            rows[step][name] = value if whole is None else (value / size) ** 0.5 if size else 0.0
        if rows:
            rows[self.steps[-1]] |= loss_by_t(*by_t)
        self._forget()
        return list(rows.values()), counters


def of_each_process(value: float, rank: int, num_processes: int) -> list[float]:
    """Counters whose means over the processes are the processes' own values: for what the slowest one decides."""
    return [value * num_processes * (place == rank) for place in range(num_processes)]


def loss_by_t(sums: list[float], counts: list[float]) -> dict[str, float]:
    """Mean loss in each tenth of t that any image fell into."""
    return {
        LOSS_BY_T.format(bin=f"{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}"): total / count
        for i, (total, count) in enumerate(zip(sums, counts))
        if count
    }


class WeightWatch:
    """How far a step moves the weights, and how far the averages trail behind them.

    Measured on the matrices of the first, the middle and the last block, which tell as much as all of them and cost
    little; each process measures the share that it holds.
    """

    def __init__(self, params: dict[str, nn.Parameter], averages: dict[str, dict[str, Tensor]], num_blocks: int):
        watched = tuple(f"blocks.{i}." for i in {0, num_blocks // 2, num_blocks - 1})
        names = [name for name, p in params.items() if name.startswith(watched) and p.ndim == 2]
        self.weights = [params[name] for name in names]
        self.averages = {decay: [average[name] for name in names] for decay, average in averages.items()}

    @torch.no_grad()
    def copy(self) -> list[Tensor]:
        return [_local(weight).clone() for weight in self.weights]

    @torch.no_grad()
    def record(self, metrics: StepMetrics, before: list[Tensor]) -> None:
        """Keep the update ratio |w - before| / |w| and of each average the distance |w - average| / |w|."""
        weights = [_local(weight) for weight in self.weights]
        size = squared_norm(weights)
        metrics.record_ratio(UPDATE_RATIO, squared_norm(torch._foreach_sub(weights, before)), size)
        for decay, averages in self.averages.items():
            trail = torch._foreach_sub(weights, [_local(average) for average in averages])
            metrics.record_ratio(EMA_DISTANCE.format(decay=decay), squared_norm(trail), size)


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Of all of them together, a scalar on the device."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


class StepClock:
    """Seconds of each step, and of an interval without its pauses, by the host's clock.

    The host runs ahead of a GPU inside an interval, whose end is exact.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        self.began = self.last = time.perf_counter()
        self.paused_s = 0.0
        self.durations_s: list[float] = []

    def tick(self) -> None:
        """A step ends here."""
        now = time.perf_counter()
        self.durations_s.append(now - self.last)
        self.last = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training: validation, samples, checkpoints."""
        began = self._now()
        try:
            yield
        finally:
            self.paused_s += self._now() - began

    def end_interval(self) -> tuple[list[float], float]:
        """Seconds of each step since the last call, pauses included, and of all of them without pauses.

        To be called when the device has just been waited for.
        """
        if self.durations_s:  # the device was still at work when the host ended its last step
            now = time.perf_counter()
            self.durations_s[-1] += now - self.last
            durations_s, trained_s = self.durations_s, max(1e-9, now - self.began - self.paused_s)
            self.began, self.paused_s, self.durations_s = now, 0.0, []
            self.last = now
            return durations_s, trained_s
        return [], 0.0

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


class EpochMetrics:
    """Mean loss, seconds and images/s of each pass over the data, and the lowest mean so far.

    Counted in images, whose number at a step changes where a run goes on with another batch size.

    Args:
        num_images: of one pass; None where that is not known, and nothing ever ends.
    """

    def __init__(self, num_images: int | None):
        self.num_images = num_images
        self.images_seen = 0
        self.loss_sum, self.seconds, self.images = 0.0, 0.0, 0
        self.best_loss: float | None = None

    def add(self, row: dict, seconds: float, batch: int) -> bool:
        """Count a step of `batch` images; where an epoch ends with it, its metrics are put into the row.

        Returns:
            Whether one did.
        """
        before, self.images_seen = self.images_seen, self.images_seen + batch
        row[IMAGES_SEEN] = self.images_seen
        if not self.num_images:
            return False
        row[EPOCH] = self.images_seen / self.num_images
        self.loss_sum += row[TRAIN_LOSS] * batch
        self.seconds += seconds
        self.images += batch
        if self.images_seen // self.num_images == before // self.num_images:
            return False
        loss = self.loss_sum / self.images
        self.best_loss = loss if self.best_loss is None else min(loss, self.best_loss)
        row[EPOCH_LOSS], row[BEST_LOSS] = loss, self.best_loss
        row[EPOCH_TIME] = self.seconds
        row[SAMPLES_PER_SECOND] = self.images / max(1e-9, self.seconds)
        self.loss_sum, self.seconds, self.images = 0.0, 0.0, 0
        return True

    def state_dict(self) -> dict:
        """For a checkpoint, of an epoch that has begun."""
        return {name: getattr(self, name) for name in ("images_seen", "loss_sum", "seconds", "images", "best_loss")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
