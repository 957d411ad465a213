"""LoRA adapters for the pipeline, through diffusers' own loader."""

from collections.abc import Mapping

from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin


class JiTLoraLoaderMixin(SanaLoraLoaderMixin):
    """`load_lora_weights` and its companions, as of Sana's pipeline, whose only network is a `transformer` too."""

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """Add an adapter to the network and use it.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, file or Hub id with LoRA weights as safetensors, such as
                `runs/x/lora`; or its tensors, whose names begin with `transformer.`.
            adapter_name: what `set_adapters` calls it; diffusers makes one up.
            hotswap: put it in the place of the one of that name, without another compilation.
            kwargs: such as `weight_name`, `subfolder`, `revision` or `token`.

        Raises:
            ValueError: peft is not installed, or nothing there belongs to an adapter of this network.
        """
        source = pretrained_model_name_or_path_or_dict
        before = list(getattr(self.transformer, "peft_config", {}))
        kwargs.setdefault("use_safetensors", True)  # never a pickle
        super().load_lora_weights(source, adapter_name, hotswap, **kwargs)
        if not hotswap and list(getattr(self.transformer, "peft_config", {})) == before:  # diffusers only warns
            name = "the given tensors" if isinstance(source, Mapping) else source
            rule = f"no LoRA weights of this network, whose names begin with {self.transformer_name}."
            raise ValueError(f"{name}: {rule}")
