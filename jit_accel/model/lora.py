"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: trained, merged, and kept the way diffusers does it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from jit_accel.base.errors import UserError, nearest
from jit_accel.base.files import atomic_folder
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.saved_weights import weights_fingerprint

ADAPTER = "default"
ADDED = ("condition_embedder", "vector_embedder")  # parts that may be new, and are then trained as wholes


class Adapter:
    """A new adapter on a network, which is changed in place and otherwise frozen; it starts as the zero function.

    To the weights of Linear layers whose names end in one of `targets` it adds `scale` B A: scale is alpha / rank, A
    (rank, in) and B (out, rank); `dropout` is of what A sees. Parts for conditions that the frozen weights are without,
    `added`, are trained as wholes. Raises `UserError`: peft is missing, a target fits no Linear layer, or the rank is
    larger than a weight.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Iterable[str],
        added: Iterable[str] = (),
    ):
        self.rank, self.alpha, self.scale, self.targets = rank, alpha, alpha / rank, list(targets)
        least = min(min(layer.weight.shape) for layer in _targeted(network, self.targets))
        if rank > least:
            rule = f"must not be above {least}, the smaller side of a weight it adapts."
            raise UserError(rule, about="lora_rank", value=rank)
        self.added = sorted(added)
        base = {name: t for name, t in network.state_dict().items() if name.partition(".")[0] not in self.added}
        self.base_identity = weights_fingerprint(base)
        try:
            from peft import LoraConfig
        except ImportError:
            raise UserError("needs peft: pip install 'jit_accel[lora]'.", about="lora_rank", value=rank) from None
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.targets))
        for part in self.added:
            getattr(network, part).requires_grad_(True)

    def save(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write these trained tensors as a file for `load_lora_weights`, whole or not at all."""
        # What rank and alpha mean to diffusers; a whole LoraConfig would tie the file to one release of peft.
        config = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": self.targets}
        layers = {name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in tensors.items()}
        with atomic_folder(folder) as temporary:
            JiTPipeline.save_lora_weights(temporary, layers, transformer_lora_adapter_metadata=config)


def is_added(name: str) -> bool:
    """Return True for a tensor of a part that may be trained as a whole beside an adapter."""
    return name.partition(".")[0] in ADDED


def merged(tensors: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights of a plain network that does what this one does with an adapter.

    `tensors` are those of a network with or without the adapter's layers, `adapter` are its own in float32, by their
    names in a network, with what was trained as a whole beside it, and `scale` is alpha / rank.
    """
    plain = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if ".lora_" not in name}
    plain |= {name: tensor for name, tensor in adapter.items() if is_added(name)}
    for name, down in adapter.items():
        stem, is_down, _ = name.partition(f".lora_A.{ADAPTER}.weight")
        if is_down:
            up = adapter[f"{stem}.lora_B.{ADAPTER}.weight"]
            plain[f"{stem}.weight"] = plain[f"{stem}.weight"] + scale * (up @ down)
    return plain


def refuse_other_base(checkpoint: Path, run: dict, path: str, fingerprint: str) -> None:
    """Raise `UserError` where a checkpoint's adapter was trained on other weights than those from `path`."""
    if run["base_identity"] != fingerprint:
        rule = (
            f"holds other weights (SHA-256 {fingerprint[:12]}) than the adapter of {checkpoint} was trained on "
            f"({run['base_identity'][:12]}, then from {run['settings']['init_from']}): give those, or another "
        )
        raise UserError(f"{rule}--output_dir to start anew.", about="init_from", value=path)


def _targeted(network: nn.Module, targets: list[str]) -> list[nn.Linear]:
    modules, found = dict(network.named_modules()), []
    for target in targets:
        named = [module for name, module in modules.items() if f".{name}".endswith(f".{target}")]
        if not named or not all(isinstance(module, nn.Linear) for module in named):
            linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            choices = list(dict.fromkeys(name.split(".", 2)[-1] if "blocks." in name else name for name in linear))
            rule = f"must be the end of a Linear layer's name, such as {', '.join(choices)}.{nearest(target, choices)}"
            raise UserError(rule, about="lora_targets", value=target)
        found += named
    return found
