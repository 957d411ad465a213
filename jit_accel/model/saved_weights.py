"""A network's weights in files: what is saved and read, and what lies on a disk while the network is used."""

import functools
import hashlib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

WEIGHT_FILE = re.compile(
    r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<last>[\w-]+))?\.(?:safetensors|bin)"
)
OFFLOADED = "group_*.safetensors"  # diffusers' names for groups of weights
OFFLOADED_BY = "weights.sha256"


class SavedWeightsMixin:
    """For a diffusers model: files hold its own weights, as safetensors."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load as diffusers does. Raises `ValueError` where a pickle is asked for, and reads none."""
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors False would read a pickle: leave it out; jit_accel.convert reads pickles")
        place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if not place.is_dir() or any(place.glob("*.bin")):  # else it is as everywhere, also what is said to be missing
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines hand on what they find in the signature
    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save as diffusers does.

        Raises `ValueError` for a pickle; with an adapter, which would be lost; and while the weights are elsewhere.
        """
        call = inspect.signature(ModelMixin.save_pretrained).bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        if not call.arguments["safe_serialization"]:
            raise ValueError("safe_serialization False would write a pickle, which nothing here reads: leave it out")
        if getattr(self, "peft_config", None):
            remedy = "fuse_lora() and unload_lora_weights() first to save the weights with it, or save it alone with "
            raise ValueError(f"a LoRA adapter is attached: {remedy}save_lora_weights()")
        if _is_elsewhere(self):
            raise ValueError("the weights are offloaded, to a disk or module by module: save them before that")
        if call.arguments["is_main_process"]:
            variant = f".{call.arguments['variant']}" if call.arguments["variant"] else ""
            for end in (f"{variant}.safetensors", f".safetensors.index{variant}.json"):  # of parts that go
                (Path(save_directory) / f"diffusion_pytorch_model{end}").unlink(missing_ok=True)
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    @functools.wraps(ModelMixin.enable_group_offload, assigned=())
    def enable_group_offload(self, *args, **kwargs) -> None:
        """Offload as diffusers does. Raises `ValueError` for a folder with other weights, which it would take."""
        call = inspect.signature(ModelMixin.enable_group_offload).bind(self, *args, **kwargs)
        if place := call.arguments.get("offload_to_disk_path"):
            folder, own = Path(place), weights_fingerprint(self.state_dict())
            mark = folder / OFFLOADED_BY
            if any(folder.glob(OFFLOADED)) and not (mark.is_file() and mark.read_text() == own):
                raise ValueError(f"offload_to_disk_path {place} holds another network's weights: give an empty one")
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(own)
        super().enable_group_offload(*args, **kwargs)


def _is_elsewhere(network: torch.nn.Module) -> bool:
    """Return True where parameters hold no weights: hooks bring them from a disk, or to one module after the other."""
    registries = (getattr(module, "_diffusers_hook", None) for module in network.modules())
    groups = (getattr(hook, "group", None) for registry in registries if registry for hook in registry.hooks.values())
    on_disk = any(group is not None and group.offload_to_disk_path for group in groups)
    return on_disk or any(parameter.is_meta for parameter in network.parameters())


def only_variant(folder: Path) -> str | None:
    """Return the variant of a network's weights, such as "fp16", where all files are of one; else None."""
    found = {variant_of(file.name) for file in folder.glob("diffusion_pytorch_model*.safetensors")}
    return found.pop() if len(found) == 1 else None


def variant_of(name: str) -> str | None:
    """Return the variant that a file of weights is of; None for those of no variant, and for other files."""
    match = WEIGHT_FILE.fullmatch(name)
    return match and (match["variant"] or match["last"])


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
