"""LoRA adapters for the pipeline, through diffusers' own loaders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

LORA_COMPONENT = "transformer"  # what diffusers calls the network, and puts before the names in a file


class JiTLoraLoaderMixin(LoraBaseMixin):
    """`load_lora_weights` and its companions, for a pipeline whose network is `transformer`."""

    _lora_loadable_modules = [LORA_COMPONENT]  # noqa: RUF012 (diffusers' own class attribute)
    transformer_name = LORA_COMPONENT

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """Add an adapter to the network and use it.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, file or Hub id with LoRA weights as safetensors, such as
                `runs/x/lora`; or its tensors, whose names begin with `transformer.`.
            adapter_name: to tell several apart (`set_adapters`); diffusers makes one up.
            hotswap: put it in the place of the one of that name, without another compilation.
            kwargs: of diffusers' `load_lora_adapter`, such as `weight_name`, `subfolder`, `revision` or `token`.

        Raises:
            ValueError: peft is not installed, or nothing there belongs to an adapter of this network.
        """
        _require_peft_backend()
        source = pretrained_model_name_or_path_or_dict
        before = set(getattr(self.transformer, "peft_config", {}))
        kwargs.setdefault("use_safetensors", True)  # never a pickle
        self.transformer.load_lora_adapter(
            dict(source) if isinstance(source, Mapping) else source,
            prefix=LORA_COMPONENT,
            adapter_name=adapter_name,
            hotswap=hotswap,
            _pipeline=self,
            **kwargs,
        )
        if not hotswap and set(getattr(self.transformer, "peft_config", {})) == before:
            name = "the given tensors" if isinstance(source, Mapping) else source
            raise ValueError(f"{name}: no LoRA weights of this network, whose names begin with {LORA_COMPONENT}.")

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: Mapping[str, Tensor],
        transformer_lora_adapter_metadata: dict | None = None,
        weight_name: str | None = None,
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """Write an adapter as `load_lora_weights` reads it.

        Args:
            transformer_lora_layers: tensors by name as peft's `get_peft_model_state_dict` gives them.
            transformer_lora_adapter_metadata: of its `LoraConfig`; without it alpha is taken to be the rank.
            weight_name: of the file; default `pytorch_lora_weights.safetensors`.
        """
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={LORA_COMPONENT: dict(transformer_lora_layers)},
            lora_metadata={LORA_COMPONENT: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            **kwargs,
        )

    def fuse_lora(self, components: Iterable[str] = (LORA_COMPONENT,), **kwargs) -> None:
        """Add the active adapters into the weights, so that a call costs what it does without any."""
        super().fuse_lora(components=list(components), **kwargs)

    def unfuse_lora(self, components: Iterable[str] = (LORA_COMPONENT,), **kwargs) -> None:
        """Take fused adapters out of the weights again, up to float rounding."""
        super().unfuse_lora(components=list(components), **kwargs)


def _require_peft_backend() -> None:
    from diffusers.utils import USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        raise ValueError("PEFT backend is required for this method: pip install peft")
