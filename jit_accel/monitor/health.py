"""Signs that a training goes wrong, each with its likely cause and what helps."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from jit_accel.config.run_groups import HealthConfig
from jit_accel.monitor.metric_table import GRAD_NORM, HEALTH, TRAIN_LOSS, WAIT_FRACTION
from jit_accel.monitor.pictures import contrast, patch_seams, saturated_channel

# A mean of a few losses is compared, since single batches of rare images reach five times the median.
JUMP_STEPS = 5
HISTORY_STEPS = 100
LEAST_HISTORY_STEPS = 10
LEVEL_STEPS = 20
FALLEN = 0.9
# Steps between patches, by those beside them: real pictures have 0.9 to 1.4 in sheets of eight, a good tiny model 1.5
# to 2.5, one that begins 14, and 4 to 5 after a quarter of its training.
SEAMS, BEGINNERS_SEAMS = 1.6, 6.0
YOUNG, GROWN = 0.25, 0.5  # shares of the training
YOUNG_STEPS = 200


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
    "patch_grid": Kind(
        "samples show the grid of the patches: pixels jump {value:.2g} times as far between patches as inside them",
        "the network has lost, or never learnt, how patches fit together, mostly from steps that are too large or "
        "weights that diverge: look at the sheet; go on from an earlier checkpoint with a lower --learning_rate, or a "
        "longer --ema_decays where only the average lags.",
        TRAIN_LOSS,
    ),
    "grey_samples": Kind(
        "samples are nearly flat: their pixels deviate by {value:.2g} of 255",
        "the network has collapsed to a mean image, or its average has hardly begun to follow: look at the sheet "
        "and at train/grad_norm, try a shorter --ema_decays and a lower --learning_rate; look for blank images in "
        "the data.",
        TRAIN_LOSS,
    ),
    "saturated_channel": Kind(
        "{value:.0%} more of one channel's values than of another's are at their limit in the samples",
        "the colours run away, mostly with guidance that is too strong or weights that diverge: lower "
        "--guidance_scale, and go on from an earlier checkpoint with a lower --learning_rate if it stays.",
        TRAIN_LOSS,
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
        self.least_seams = math.inf
        self.real: np.ndarray | None = None  # some training images, uint8 (n, H, W, 3), once they are shown

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
                new += self._event(kind, row["step"], value, advice if kind == "data_starving" else None)
        return new

    def examine_samples(
        self, step: int, images: np.ndarray, patch_size: int, done: float
    ) -> tuple[dict[str, float], list[Event]]:
        """Look at generated images, uint8 (n, H, W, 3), after this share of the training; return signs and new events.

        A young model is no fault: what it draws is grey, then made of patches that do not fit, and less and less so. So
        a grid is one that comes back, or that is still that of a beginner in the second half. Nor is what the training
        images have as well: pixel art, dark skies, a single colour.
        """
        thresholds, signs, real = self.thresholds, {}, self.real
        real_seams = (patch_seams(real, patch_size) if real is not None else None) or 1.0
        real_contrast = contrast(real) if real is not None else math.inf
        real_excess = saturated_channel(real) if real is not None else 0.0
        if step < YOUNG_STEPS:
            return {}, []
        seams = patch_seams(images, patch_size) if done >= YOUNG else None
        if seams is not None and thresholds.health_patch_grid:
            returns = seams > max(SEAMS, thresholds.health_patch_grid * self.least_seams)
            if (returns or (done >= GROWN and seams > BEGINNERS_SEAMS)) and seams > SEAMS * real_seams:
                signs["patch_grid"] = seams
            if contrast(images) >= thresholds.health_min_contrast:  # what is flat has no seams
                self.least_seams = min(self.least_seams, seams)
        if done >= GROWN:
            if (deviation := contrast(images)) < min(thresholds.health_min_contrast, real_contrast / 2):
                signs["grey_samples"] = deviation
            excess = saturated_channel(images)
            if 0 < thresholds.health_max_saturated < excess - real_excess:
                signs["saturated_channel"] = excess
        events = [event for kind, value in signs.items() for event in self._event(kind, step, value)]
        return {HEALTH.format(kind=kind): value for kind, value in signs.items()}, events

    def _event(self, kind: str, step: int, value: float, advice: str | None = None) -> list[Event]:
        """Return the event of a sign, [] where one of its kind was returned before."""
        if kind in self.found:
            return []
        self.found.add(kind)
        return [Event(kind, step, value, advice or KINDS[kind].remedy)]

    def state_dict(self) -> dict:
        """Return what the signs of later rows follow from."""
        names = ("losses", "first_losses", "last_losses")
        lists = {name: list(getattr(self, name)) for name in names}
        seams = self.least_seams if math.isfinite(self.least_seams) else None
        return lists | {"must_fall": self.must_fall, "steps": self.steps, "least_seams": seams}

    def load_state_dict(self, state: dict | None) -> None:
        """Take what `state_dict` gave; None where there was none, of a run that had begun."""
        if state is None:
            self.must_fall = False
            return
        self.must_fall, self.steps = state["must_fall"], state["steps"]
        self.losses.extend(state["losses"])
        self.first_losses = state["first_losses"][: self.last_losses.maxlen]
        self.last_losses.extend(state["last_losses"])
        self.least_seams = state.get("least_seams") or math.inf

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
