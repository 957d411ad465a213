"""The ways to draw images that are measured: one, or the grid that flags name."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import get_args

from jit_accel.base.errors import lookup
from jit_accel.config.groups import MOST_STEPS, width_name
from jit_accel.config.run_groups import Method
from jit_accel.evaluate.flag_values import intervals, numbers, widths, words

METHODS = {name: name for name in get_args(Method)}


@dataclass(frozen=True)
class Setting:
    """One way to draw images. `ema` None: the weights of the pipeline folder. Guidance 1 has no interval."""

    ema: str | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    num_inference_steps: int = 50
    method: str = "heun"
    time_shift: float = 1.0

    def __post_init__(self):
        # Without guidance the interval makes no difference; JSON has lists for pairs.
        interval = None if self.is_unguided or self.guidance_interval is None else tuple(self.guidance_interval)
        object.__setattr__(self, "guidance_interval", interval)

    @property
    def is_unguided(self) -> bool:
        return self.guidance_scale == 1

    @property
    def sampling(self) -> dict:
        """The fields of `SamplerSettings`."""
        return {name: value for name, value in asdict(self).items() if name != "ema"}

    def interval_text(self, form: str = "{:g} to {:g}") -> str:
        """The interval in words; "" without one."""
        return form.format(*self.guidance_interval) if self.guidance_interval else ""

    def __str__(self) -> str:
        ema = f"EMA {self.ema.replace('_', ' ')}, " if self.ema else ""
        guidance = f"guidance {self.guidance_scale:g}{self.interval_text(' in ({:g}, {:g})')}"
        guidance = "no guidance" if self.is_unguided else guidance
        return f"{ema}{guidance}, {self.solver_text()}"

    def solver_text(self) -> str:
        shift = f", shift {self.time_shift:g}" if self.time_shift != 1 else ""
        return f"{self.num_inference_steps} {self.method} steps{shift}"


def grid(*axes: Sequence, with_unguided: bool = True) -> list[Setting]:
    """Return all combinations, each once, of values for the fields of `Setting`; `with_unguided`: at guidance 1 too."""
    emas, scales, intervals, counts, methods, shifts = axes
    scales = sorted({*scales, 1.0} if with_unguided else {*scales})
    combined = itertools.product(emas, shifts, methods, counts, intervals, scales)
    settings = [
        Setting(ema, scale, interval, count, method, shift) for ema, shift, method, count, interval, scale in combined
    ]
    return list(dict.fromkeys(settings))


def axes_of(config) -> dict[str, list]:
    """Return the values of the flags that name settings, by the fields of `Setting`; [] for the pipeline's own."""
    axes = {name: read(name, getattr(config, name)) if getattr(config, name) else [] for name, read in AXES.items()}
    return axes | {"ema": [*axes["ema"], *map(width_name, widths("ema_width", config.ema_width))]}


# How the values of each flag are read; names of averages are compared with those of the checkpoint later.
AXES = {
    "ema": lambda flag, parts: words(parts),
    "guidance_scale": numbers,
    "guidance_interval": intervals,
    "num_inference_steps": partial(numbers, least=1, most=MOST_STEPS, kind=int),
    "method": lambda flag, parts: [lookup(METHODS, name, flag) for name in words(part.lower() for part in parts)],
    "time_shift": partial(numbers, least=0.01, most=100),
}
FLAGS = (*AXES, "ema_width")  # whose widths are values of `ema`, too
