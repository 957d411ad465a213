"""Types of `transformer.py`: what a call of the network returns follows from `return_dict`."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor, nn
from typing_extensions import Self

from jit_accel.model.saved_weights import SavedWeightsMixin

class NetworkOutput(Transformer2DModelOutput):
    sample: Tensor

class JiTTransformer2DModel(SavedWeightsMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    config: Any  # type: ignore[assignment]
    blocks: nn.ModuleList
    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        bottleneck_dim: int,
        in_context_len: int,
        in_context_start: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        in_channels: int = 3,
        condition_channels: int = 0,
        condition_bottleneck: int | None = None,
        condition_inject: str = "add",
        vector_sizes: Sequence[int] = (),
        has_several_labels: bool = False,
        augment_size: int = 0,
    ) -> None: ...
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self: ...
    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Self: ...  # type: ignore[override]
    def to(self, *args: torch.device | str | torch.dtype | Tensor | bool, **kwargs: Any) -> Self: ...
    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any: ...
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None: ...
    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None: ...
    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None: ...
    def reset_parameters(self) -> None: ...
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        condition_image: Tensor | None = None,
        condition_mask: Tensor | None = None,
        vectors: Tensor | None = None,
        vector_mask: Tensor | None = None,
        augmentation: Tensor | None = None,
        kept_tokens: Tensor | None = None,
    ) -> NetworkOutput | tuple[Tensor]: ...
    @overload
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: Literal[True] = True,
        condition_image: Tensor | None = None,
        condition_mask: Tensor | None = None,
        vectors: Tensor | None = None,
        vector_mask: Tensor | None = None,
        augmentation: Tensor | None = None,
        kept_tokens: Tensor | None = None,
    ) -> NetworkOutput: ...
    @overload
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        return_dict: Literal[False],
        condition_image: Tensor | None = None,
        condition_mask: Tensor | None = None,
        vectors: Tensor | None = None,
        vector_mask: Tensor | None = None,
        augmentation: Tensor | None = None,
        kept_tokens: Tensor | None = None,
    ) -> tuple[Tensor]: ...
    @overload
    def __call__(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None, return_dict: Literal[False]
    ) -> tuple[Tensor]: ...
    @overload
    def __call__(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> NetworkOutput | tuple[Tensor]: ...

def build_model(name: str, img_size: int | Sequence[int], num_classes: int, **sizes: Any) -> JiTTransformer2DModel: ...
def evaluating(module: nn.Module) -> AbstractContextManager[None]: ...
