"""Measurements of a training, kept on the device until a whole interval is read at once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from jit_accel.monitor import metric_table as table

T_BINS = 10
HISTOGRAM_BINS = 64


class StepMetrics:
    """Losses, gradient norms and further values of the steps since the last flush.

    Nothing here waits for the device, except `flush`: one all-reduce and one copy to the host.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._forget()

    def _forget(self) -> None:
        self.rows: dict[int, dict] = {}  # by step
        self.values: list[tuple[int, str, Tensor, Tensor | None]] = []
        self.by_t = torch.zeros(2, T_BINS, device=self.device)  # sums of losses, and how many, by the time t
        self.parts: dict[str, list[Tensor]] = {}  # of the micro-steps of the step that is not over

    def record_by_t(self, t: Tensor, losses: Tensor) -> None:
        """Keep the losses (B,) of one micro-step by their times (B,) in [0, 1]."""
        bins = (t * T_BINS).long().clamp(0, T_BINS - 1)
        # A product, since sums by index are not deterministic on GPUs.
        is_in_bin = (bins[:, None] == torch.arange(T_BINS, device=t.device)).float()
        self.by_t += torch.stack([losses.detach().float(), torch.ones_like(t)]) @ is_in_bin

    def record_part(self, key: str, value: Tensor) -> None:
        """Keep a further value of one micro-step; the step that they make has their mean."""
        self.parts.setdefault(key, []).append(value.detach())

    def record(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Keep one step's values; `loss` is this process's mean, `grad_norm` the global one, before clipping."""
        values = {table.TRAIN_LOSS: loss, table.GRAD_NORM: grad_norm}
        self.rows[step] = {"step": step, **values, table.LEARNING_RATE: learning_rate}
        values |= {key: torch.stack(parts).mean() for key, parts in self.parts.items()}
        self.values += [(step, key, value, None) for key, value in values.items()]
        self.parts = {}

    def record_occasional(self, key: str, value: Tensor, whole: Tensor | None = None) -> None:
        """Keep a further value of the newest step.

        With `whole` it is a ratio of two L2 norms, of which these are the squares over this process's share.
        """
        self.values.append((next(reversed(self.rows)), key, value, whole))

    def flush(self, reduce_mean, counters: list[float]) -> tuple[list[dict], list[float]]:
        """Read and forget the kept steps. Returns one row a step, and the counters averaged over the processes.

        `reduce_mean` averages a float32 tensor over them.
        """
        # On the device also where no step is kept: NCCL reduces nothing else.
        kept = [torch.tensor(counters, dtype=torch.float32, device=self.device), self.by_t.flatten()]
        if parts := [part for _, _, *pair in self.values for part in pair if part is not None]:
            kept.append(torch.stack(parts).float())
        means = iter(reduce_mean(torch.cat(kept)).tolist())
        counters = list(islice(means, len(counters)))
        by_t = zip(list(islice(means, T_BINS)), list(islice(means, T_BINS)))
        for step, key, _, whole in self.values:
            value, size = next(means), None if whole is None else next(means)
            self.rows[step][key] = value if whole is None else (value / size) ** 0.5 if size else 0.0
        rows = list(self.rows.values())
        for i, (total, count) in enumerate(by_t if rows else ()):
            if count:
                rows[-1][table.LOSS_BY_T.format(bin=f"{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}")] = total / count
        self._forget()
        return rows, counters


def of_each_process(value: float, rank: int, num_processes: int) -> list[float]:
    """Return counters whose means over the processes are the processes' own values, of which the worst counts."""
    return [value * num_processes * (place == rank) for place in range(num_processes)]


class WeightWatch:
    """The distance that a step moves the weights, and that of the averages behind them.

    Measured on the matrices of the first, the middle and the last block, which say as much as all of them and cost
    little; each process measures the share that it holds.
    """

    def __init__(self, params: dict[str, nn.Parameter], averages: dict[str, dict[str, Tensor]], num_blocks: int):
        watched = tuple(f"blocks.{i}." for i in {0, num_blocks // 2, num_blocks - 1})
        names = [name for name, p in params.items() if name.startswith(watched) and p.ndim == 2]
        self.weights = [params[name] for name in names]
        self.averages = {decay: [average[name] for name in names] for decay, average in averages.items()}

    @torch.no_grad()
    def copy(self) -> list[Tensor]:
        return [local_part(weight).clone() for weight in self.weights]

    @torch.no_grad()
    def record(self, metrics: StepMetrics, before: list[Tensor]) -> None:
        """Keep the update ratio |w - before| / |w| and of each average the distance |w - average| / |w|."""
        weights = [local_part(weight) for weight in self.weights]
        others = {table.UPDATE_RATIO: before}
        for decay, averages in self.averages.items():
            others[table.EMA_DISTANCE.format(decay=decay)] = [local_part(average) for average in averages]
        size = squared_norm(weights)
        for key, tensors in others.items():
            metrics.record_occasional(key, squared_norm(torch._foreach_sub(weights, tensors)), size)


@torch.no_grad()
def histograms_of(params: dict[str, nn.Parameter], watched: str) -> dict[str, Tensor]:
    """Count "gradients", "parameters" or "all" in `HISTOGRAM_BINS` bins each, this process's share, on the device.

    Returns of each `gradients/<name>` and `parameters/<name>` its lowest value, its highest value, and the counts.
    """
    found = {}
    for name, p in params.items():
        for kind, tensor in (("gradients", p.grad), ("parameters", p)):
            if watched in (kind, "all") and tensor is not None and local_part(tensor).numel():
                values = local_part(tensor).float().flatten()
                low, high = values.aminmax()
                places = ((values - low) * (HISTOGRAM_BINS / (high - low))).nan_to_num().long()
                counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.long, device=values.device)
                counts.scatter_add_(0, places.clamp(0, HISTOGRAM_BINS - 1), torch.ones_like(places))
                found[f"{kind}/{name}"] = torch.cat([low[None], high[None], counts])
    return found


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Return the square of the L2 norm of all of them together, a scalar on the device."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def local_part(tensor: Tensor) -> Tensor:
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
        self.paused_s, self.durations_s = 0.0, []

    def tick(self) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        self.durations_s.append(now - self.last)
        self.last = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out: validation, samples, checkpoints are no training."""
        began = now(self.device)
        try:
            yield
        finally:
            self.paused_s += now(self.device) - began

    def end_interval(self) -> tuple[list[float], float]:
        """Return the seconds of each step since the last call, pauses included, and of all of them without pauses.

        To be called when the device has just been waited for.
        """
        if not self.durations_s:
            return [], 0.0
        began, paused_s, durations_s, last = self.began, self.paused_s, self.durations_s, self.last
        self.start()
        durations_s[-1] += self.began - last  # the device was still at work when the host ended its last step
        return durations_s, max(1e-9, self.began - began - paused_s)


def now(device: torch.device) -> float:
    """Return the host's clock, in seconds, when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class EpochMetrics:
    """Mean loss, seconds and images/s of each pass over the data, and the lowest mean so far.

    Counted in images, whose number at a step changes where a run goes on with another batch size; `num_images` is that
    of one pass.
    """

    def __init__(self, num_images: int):
        self.num_images, self.images_seen = num_images, 0
        self.elapsed_s: float | None = 0.0  # None: earlier starts did not count it
        self.best_loss: float | None = None
        self._begin()

    def _begin(self) -> None:
        self.loss_sum, self.seconds, self.images = 0.0, 0.0, 0

    def add(self, row: dict, seconds: float, batch: int) -> None:
        """Count a step of `batch` images; where an epoch ends with it, its metrics go into the row."""
        before, self.images_seen = self.images_seen, self.images_seen + batch
        row |= {table.IMAGES_SEEN: self.images_seen, table.EPOCH: self.images_seen / self.num_images}
        if self.elapsed_s is not None:
            self.elapsed_s += seconds
        self.loss_sum += row[table.TRAIN_LOSS] * batch
        self.seconds += seconds
        self.images += batch
        if self.images_seen // self.num_images == before // self.num_images:
            return
        loss = self.loss_sum / self.images
        self.best_loss = loss if self.best_loss is None else min(loss, self.best_loss)
        row |= {table.EPOCH_LOSS: loss, table.BEST_LOSS: self.best_loss, table.EPOCH_TIME: self.seconds}
        row[table.SAMPLES_PER_SECOND] = self.images / max(1e-9, self.seconds)
        self._begin()

    def state_dict(self) -> dict:
        """Return what the rest of an epoch that has begun needs."""
        names = ("images_seen", "elapsed_s", "loss_sum", "seconds", "images", "best_loss")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update({"elapsed_s": None} | state)
