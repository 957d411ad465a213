"""Types of `scheduler.py`: what is loaded is a `JiTScheduler`, and what `step` returns follows from `return_dict`."""

import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, overload

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor
from typing_extensions import Self

def checked_choice(setting: str, name: str, choices: Collection[str]) -> str: ...

class JiTScheduler(SchedulerMixin, ConfigMixin):
    config: Any  # type: ignore[assignment]
    num_inference_steps: int | None
    timesteps: Tensor
    method: str
    def __init__(
        self,
        prediction_type: str = "x",
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
        solver: str = "heun",
        path: str = "noise",
    ) -> None: ...
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Self: ...
    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, **kwargs: Any) -> Self: ...  # type: ignore[override]
    @property
    def init_noise_sigma(self) -> float: ...
    @property
    def order(self) -> int: ...
    @property
    def mid_step(self) -> bool: ...
    @property
    def next_time(self) -> float: ...
    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        method: str | None = None,
        skip_steps: int = 0,
        time_shift: float = 1.0,
    ) -> None: ...
    def forget_history(self) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor: ...
    @overload
    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: Literal[True] = True
    ) -> SchedulerOutput: ...
    @overload
    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: Literal[False]
    ) -> tuple[Tensor]: ...
    @overload
    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]: ...
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...
    def __len__(self) -> int: ...

def is_own(scheduler: object) -> bool: ...

class FlowMatchDriver(JiTScheduler):
    def __init__(
        self,
        scheduler: SchedulerMixin,
        objective: Mapping[str, Any],
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> None: ...
