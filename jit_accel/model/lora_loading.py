"""Adapters (LoRA) of a pipeline, loaded and fused as by Sana's, whose only network is a `transformer` too."""

from collections.abc import Mapping

from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


class LoraMixin(SanaLoraLoaderMixin):
    """For a `DiffusionPipeline`: adapters are read from safetensors alone, and one that does not fit is an error."""

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """Return the tensors of an adapter, read as by `load_lora_weights`. Raises `ValueError` for a pickle."""
        file = kwargs.get("weight_name") or pretrained_model_name_or_path_or_dict
        if kwargs.get("use_safetensors") is False or str(file).endswith(PICKLES):
            raise ValueError(f"{file}: pickles are not read: give LoRA weights as safetensors")
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **{**kwargs, "use_safetensors": True})

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """Add an adapter to the network and use it.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, file or Hub id with LoRA weights as safetensors, such as
                `runs/x/lora`; or its tensors, whose names begin with `transformer.`.
            adapter_name: what `set_adapters` calls it; diffusers makes one up.
            hotswap: put it in the place of the one of that name, without another compilation.

        Raises `ValueError`: peft is not installed, or nothing there belongs to an adapter of this network.
        """
        source = pretrained_model_name_or_path_or_dict
        before = list(getattr(self.transformer, "peft_config", {}))
        super().load_lora_weights(source, adapter_name, hotswap, **kwargs)
        if not hotswap and list(getattr(self.transformer, "peft_config", {})) == before:  # diffusers only warns
            name = "the given tensors" if isinstance(source, Mapping) else source
            rule = f"no LoRA weights of this network, whose names begin with {self.transformer_name}."
            raise ValueError(f"{name}: {rule}")
