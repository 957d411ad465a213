"""Signs that a training goes wrong, each with its likely cause and what helps."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

from jit_accel.config.run_groups import HealthConfig
from jit_accel.monitor.metric_table import GRAD_NORM, HEALTH, TRAIN_LOSS, WAIT_FRACTION

# A mean of a few losses is compared, since single batches of rare images reach five times the median.
JUMP_STEPS = 5
HISTORY_STEPS = 100
LEAST_HISTORY_STEPS = 10
LEVEL_STEPS = 20
FALLEN = 0.9


@dataclass(frozen=True)
class Kind:
    """A thing that can go wrong."""

    title: str  # goes behind "step 12: ", with a place for the measured value
    remedy: str  # the likely cause, and what to do
    metric: str  # in whose chart its events are marked
    limit: tuple[str, ...] = ()  # the setting that limits the metric, and its name in the chart

    def describe(self, value: float) -> str:
        return self.title.format(value=value)


KINDS = {
    "loss_not_finite": Kind(
        "the loss or the gradient norm is not finite",
        "the training has diverged, mostly from a learning rate that is too high, or from fp16: lower "
        "--learning_rate, set --max_grad_norm 1, use --mixed_precision bf16 or no, and go on from the last checkpoint "
        "with --resume auto.",
        TRAIN_LOSS,
    ),
    "loss_jump": Kind(
        "the loss jumped to {value:.3g} times its median",
        "steps that were too large, or a stretch of broken images: if it does not come back within some hundred "
        "steps, go on from an earlier checkpoint with a lower --learning_rate or a longer warm-up.",
        TRAIN_LOSS,
    ),
    "grad_exploding": Kind(
        "the gradient norm is {value:.3g} (exploding)",
        "the learning rate is too high or the warm-up too short: keep --max_grad_norm 1, lower --learning_rate, "
        "lengthen --warmup_steps.",
        GRAD_NORM,
        ("health_max_grad_norm", "exploding above"),
    ),
    "grad_vanishing": Kind(
        "the gradient norm is {value:.2g} (vanishing)",
        "nothing is being learnt: blank or identical images, a --loss_space that hides the error, or weights that "
        "collapsed at a learning rate that was too high: look at the data and at the first samples.",
        GRAD_NORM,
        ("health_min_grad_norm", "vanishing below"),
    ),
    "loss_flat": Kind(
        "the loss is still {value:.0%} of what it was at the start",
        "the weights hardly move: raise --learning_rate, shorten the warm-up; normal only for a run that starts "
        "from trained weights.",
        TRAIN_LOSS,
    ),
    "data_starving": Kind(
        "the training waits for data {value:.0%} of the time",
        "images are read or decoded too slowly: raise --num_workers, or store them once with jit_accel.prepare; "
        "benchmarks/loader.py measures which stage is slow.",
        WAIT_FRACTION,
        ("health_max_wait", "starving above"),
    ),
}


@dataclass(frozen=True)
class Event:
    kind: str
    step: int
    value: float
    remedy: str

    @property
    def title(self) -> str:
        return KINDS[self.kind].describe(self.value)

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.title}: {self.remedy}"


class Health:
    """Watches the rows of metrics as they come.

    The loss of a run from untrained weights `must_fall`; fp16, which `has_scaler`, meets infinite gradients as a matter
    of course, and skips those steps.
    """

    def __init__(self, thresholds: HealthConfig, must_fall: bool = True, has_scaler: bool = False):
        self.thresholds, self.has_scaler, self.must_fall = thresholds, has_scaler, must_fall
        window = max(min(LEVEL_STEPS, thresholds.health_flat_steps // 2), thresholds.health_flat_steps // 10, 1)
        self.losses: deque[float] = deque(maxlen=HISTORY_STEPS + JUMP_STEPS)
        self.first_losses: list[float] = []
        self.last_losses: deque[float] = deque(maxlen=window)
        self.steps = 0
        self.found: set[str] = set()

    def examine(self, rows: list[dict], lost_to_data: float | None = None, advice: str | None = None) -> list[Event]:
        """Look at consecutive rows; what is found goes into them as `health/<kind>`, new kinds are returned as events.

        `lost_to_data` is the share of the time of late that was lost to waiting for data, where known, with `advice`.
        """
        new = []
        for row in rows:
            signs = self._signs(row)
            if row is rows[-1] and lost_to_data is not None and 0 < self.thresholds.health_max_wait < lost_to_data:
                signs["data_starving"] = lost_to_data
            for kind, value in signs.items():
                row[HEALTH.format(kind=kind)] = value
                if kind not in self.found:
                    self.found.add(kind)
                    remedy = advice if kind == "data_starving" and advice else KINDS[kind].remedy
                    new.append(Event(kind, row["step"], value, remedy))
        return new

    def state_dict(self) -> dict:
        """Return what the signs of later rows follow from."""
        names = ("losses", "first_losses", "last_losses")
        return {name: list(getattr(self, name)) for name in names} | {"must_fall": self.must_fall, "steps": self.steps}

    def load_state_dict(self, state: dict | None) -> None:
        """Take what `state_dict` gave; None where there was none, of a run that had begun."""
        if state is None:
            self.must_fall = False
            return
        self.must_fall, self.steps = state["must_fall"], state["steps"]
        self.losses.extend(state["losses"])
        self.first_losses = state["first_losses"][: self.last_losses.maxlen]
        self.last_losses.extend(state["last_losses"])

    def _signs(self, row: dict) -> dict[str, float]:
        loss, norm = row[TRAIN_LOSS], row[GRAD_NORM]
        is_scaled_away = self.has_scaler and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or is_scaled_away):
            return {"loss_not_finite": 1.0}
        signs = {}
        if not is_scaled_away and 0 < self.thresholds.health_max_grad_norm < norm:
            signs["grad_exploding"] = norm
        if norm < self.thresholds.health_min_grad_norm:
            signs["grad_vanishing"] = norm
        signs |= {"loss_jump": self._jump(loss), "loss_flat": self._level(loss)}
        return {kind: value for kind, value in signs.items() if value is not None}

    def _jump(self, loss: float) -> float | None:
        """Return how many times its usual value the loss is of late, where that is too much."""
        self.losses.append(loss)
        factor, recent = self.thresholds.health_loss_jump, list(self.losses)
        if not factor or len(recent) < LEAST_HISTORY_STEPS + JUMP_STEPS:
            return None
        usual = median(recent[:-JUMP_STEPS])
        times = fmean(recent[-JUMP_STEPS:]) / usual if usual > 0 else 0.0
        return times if times > factor else None

    def _level(self, loss: float) -> float | None:
        """Return the loss as a share of the first ones, where it should have fallen by now and has not."""
        patience = self.thresholds.health_flat_steps
        if not self.must_fall or not patience:
            return None
        self.steps += 1
        if len(self.first_losses) < self.last_losses.maxlen:
            self.first_losses.append(loss)
        self.last_losses.append(loss)
        if self.steps % patience or self.steps == 1:  # nothing can have fallen yet
            return None
        first = median(self.first_losses)
        level = median(self.last_losses) / first if first > 0 else 0.0
        self.must_fall = level > FALLEN
        return level if self.must_fall else None
