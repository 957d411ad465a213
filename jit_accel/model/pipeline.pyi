"""Types of `pipeline.py`: what a call returns follows from its `output_type` and `return_dict`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypedDict, TypeVar, overload

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor
from typing_extensions import Self, Unpack

from jit_accel.config.presets import Size
from jit_accel.model.call_arguments import Label
from jit_accel.model.carried_code import KeptCardMixin
from jit_accel.model.guidance import GuidanceMixin
from jit_accel.model.lora_loading import LoraMixin
from jit_accel.model.picture_arguments import Picture
from jit_accel.model.scheduler import JiTScheduler
from jit_accel.model.transformer import JiTTransformer2DModel
from jit_accel.model.vector_arguments import Row

T = TypeVar("T")
Labels = Label | Sequence[Label] | Tensor | np.ndarray
Generators = torch.Generator | list[torch.Generator] | None
Steps, Number, Interval, Noise = int | None, float | None, Sequence[float] | None, Tensor | None
COMPONENTS: dict[str, type]
STEPS: int

class Images(ImagePipelineOutput, Generic[T]):
    images: T  # type: ignore[assignment]

class Options(TypedDict, total=False):
    callback_on_step_end: Callable[[JiTPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None
    height: int | None
    width: int | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    num_images_per_label: int
    image: Picture | Sequence[Picture] | None
    strength: float | None
    mask_image: Picture | Sequence[Picture] | None
    condition_image: Picture | Sequence[Picture | None] | None
    guidance_on: str | None
    tile: Size | None
    overlap: Size | None
    vectors: Sequence[Row] | Row | Tensor | np.ndarray
    time_shift: float | None

class JiTPipeline(KeptCardMixin, GuidanceMixin, DiffusionPipeline, LoraMixin):
    config: Any  # type: ignore[assignment]
    transformer: JiTTransformer2DModel
    def __init__(
        self,
        transformer: JiTTransformer2DModel | ModelMixin,
        scheduler: SchedulerMixin,
        class_names: list[str] | dict[str, str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: list[float] | tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        method: str | None = None,
        objective: dict[str, Any] | None = None,
        guidance_on: str | None = None,
        vectors: dict[str, list] | None = None,
        value_range: list[float] | tuple[float, float] | None = None,
        time_shift: float | None = None,
    ) -> None: ...
    @property
    def components(self) -> dict[str, Any]: ...
    @property
    def scheduler(self) -> JiTScheduler: ...
    @scheduler.setter
    def scheduler(self, value: SchedulerMixin) -> None: ...
    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self: ...  # type: ignore[override]
    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any: ...
    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str: ...
    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None: ...
    @property
    def interrupt(self) -> bool: ...
    @property
    def num_timesteps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...
    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None: ...
    @property
    def guide(self) -> JiTTransformer2DModel | None: ...
    @guide.setter
    def guide(self, value: JiTTransformer2DModel | JiTPipeline | None) -> None: ...
    def solver_name(self, method: str | None = None) -> str: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        output_type: Literal["pil"] = "pil",
        return_dict: Literal[True] = True,
        **options: Unpack[Options],
    ) -> Images[list[Image.Image]]: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        *,
        output_type: Literal["np"],
        return_dict: Literal[True] = True,
        **options: Unpack[Options],
    ) -> Images[np.ndarray]: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = True,
        **options: Unpack[Options],
    ) -> Images[Tensor]: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        output_type: Literal["pil"] = "pil",
        *,
        return_dict: Literal[False],
        **options: Unpack[Options],
    ) -> tuple[list[Image.Image]]: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        *,
        output_type: Literal["np"],
        return_dict: Literal[False],
        **options: Unpack[Options],
    ) -> tuple[np.ndarray]: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[False],
        **options: Unpack[Options],
    ) -> tuple[Tensor]: ...
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        num_inference_steps: Steps = None,
        guidance_scale: Number = None,
        guidance_interval: Interval = None,
        method: str | None = None,
        generator: Generators = None,
        latents: Noise = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[JiTPipeline, int, Tensor, dict], dict | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        condition_image: Picture | Sequence[Picture | None] | None = None,
        guidance_on: str | None = None,
        tile: Size | None = None,
        overlap: Size | None = None,
        vectors: Sequence[Row] | Row | Tensor | np.ndarray = None,
        time_shift: float | None = None,
    ) -> Images[list[Image.Image] | np.ndarray | Tensor] | tuple[list[Image.Image] | np.ndarray | Tensor]: ...
    def label_ids(self, class_labels: Labels) -> list[int | list[int]]: ...
    def prepare_latents(
        self, batch: int, generator: Generators, latents: Noise, height: int | None, width: int | None
    ) -> Tensor: ...
