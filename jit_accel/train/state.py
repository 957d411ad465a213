"""The parts of a run that its checkpoints hold, besides those that keep their own state (feed, monitor, scaler)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jit_accel.base.console import warn
from jit_accel.base.devices import kind_of
from jit_accel.base.errors import UserError, changed_settings
from jit_accel.base.processes import Sliceable, sharded_like
from jit_accel.config.facts import Plan
from jit_accel.config.identity import NAMES, WITHOUT_EFFECT, tells_apart
from jit_accel.config.settings import SETTINGS
from jit_accel.data.formats.source import Source
from jit_accel.model.checkpoints import named_damage
from jit_accel.model.lora import Adapter
from jit_accel.train.results import describe_data

# Settings that must agree between a checkpoint and the run that continues it; everything else may change.
FIXED_SETTINGS = (
    *("model", "img_size", "num_classes", "prediction", "path", "optimizer", "ema_decays", "seed"),
    *("image_column", "label_column", "vector_column", "renumber_labels", "holdout", "label_separator"),
    *("lora_rank", "lora_alpha", "lora_targets", "in_channels", "value_range", "raw_shape", "raw_dtype"),
    *("condition_column", "condition_channels", "condition_inject", "condition_bottleneck"),
    "augment",
)


class NamedTensors:
    """Weights or an average of them, as a part of a checkpoint; they are loaded in place."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Sliceable]) -> None:
        """Copy the tensors of a checkpoint into these; sharded ones take their share. ValueError: they are others."""
        if others := sorted(state.keys() ^ self.tensors.keys()):
            raise ValueError(f"{len(others)} tensors are on one side only, such as {others[0]}")
        for name, tensor in self.tensors.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has the shape {tuple(state[name].shape)} in place of {tuple(tensor.shape)}")
        for name, tensor in self.tensors.items():
            tensor.copy_(sharded_like(state[name], tensor))


class OptimizerState:
    """The state of all optimizers of a network without its wrapper, as `<parameter>|<key>` -> tensor."""

    def __init__(self, network: nn.Module, optimizers: Sequence):
        self.network, self.optimizers = network, optimizers

    def state_dict(self) -> dict[str, Tensor]:
        names = {p: name for name, p in self.network.named_parameters()}
        return {
            f"{names[p]}|{key}": value
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Sliceable]) -> None:
        """Put back what `state_dict` gave, into optimizers that have not stepped yet."""
        owner = {p: each for each in self.optimizers for group in each.param_groups for p in group["params"]}
        params = dict(self.network.named_parameters())
        for full_name, value in state.items():
            name, _, key = full_name.rpartition("|")
            p = params[name]
            # Step counts are scalars; they follow the device of their parameter, as fused AdamW wants it.
            owner[p].state[p][key] = sharded_like(
                value, p if value.shape == p.shape else torch.empty(0, device=p.device)
            )


class RunFacts:
    """The settings and data of a run (`facts`, see `of`), to be held against those of the start that continues it."""

    def __init__(self, facts: dict, is_main: bool):
        self.facts, self.is_main = facts, is_main
        self.changes = ""  # in words, since the checkpoint
        self.is_other_training = False  # than the one it goes on from

    @classmethod
    def of(
        cls,
        settings: dict,
        plan: Plan,
        source: Source,
        accelerator,
        class_names: list[str],
        adapter: Adapter | None,
        experiment: str,
    ) -> "RunFacts":
        """Gather all that a reader of the run's checkpoints needs to know."""
        facts = {
            "world_size": accelerator.num_processes,
            "device": kind_of(accelerator.device),
            "global_batch_size": plan.global_batch_size,
            "settings": settings,
            "experiment": experiment,
            "data": describe_data(source),
            "class_names": class_names,
            "vectors": source.vector_record,
            "has_several_labels": source.most_labels is not None,
            "fingerprint": source.fingerprint,
            "base_identity": adapter and adapter.base_identity,
        }
        return cls(facts, accelerator.is_main_process)

    def state_dict(self) -> dict:
        return self.facts

    def load_state_dict(self, saved: dict) -> None:
        """Note what is other than in a checkpoint, and warn of another global batch."""
        before, now = saved["global_batch_size"], self.facts["global_batch_size"]
        if before != now and self.is_main:
            warn(
                f"the global batch was {before} images and is now {now}: "
                "--epochs and the learning rate's schedule count as if the whole run had the new one."
            )
        settings = self.facts["settings"]
        # Settings that there were not then had their defaults.
        then = {name: _recorded(SETTINGS[name].default) for name in settings} | saved["settings"]
        changed = [name for name, value in settings.items() if then.get(name) != value]
        self._warn_of_another(then, [name for name in changed if tells_apart(name)])
        shown = [name for name in changed if name not in ("resume", "output_dir")]
        self.changes = ", ".join(f"{name} {then.get(name)} → {settings[name]}" for name in shown)
        self.is_other_training = not set(changed) <= set(WITHOUT_EFFECT)

    def _warn_of_another(self, then: dict, changed: list[str]) -> None:
        """Say which of the `changed` settings make this another experiment than the checkpoint's."""
        now = self.facts["settings"]
        # The same images elsewhere, a device's precision; and of the batch, what the processes make of it counts.
        same = {"data_path", "condition_path", "mixed_precision", "batch_size", "gradient_accumulation_steps"}
        if not (now["use_wandb"] or now["report_to"]):
            same |= set(NAMES)
        differences = changed_settings(then, {name: now[name] for name in changed if name not in same})
        if differences and self.is_main:
            warn(
                f"this resume changes what the run is: {'; '.join(differences)}. What is trained from here on goes "
                "into the same folder and curves. For a run of its own give another --output_dir or --wandb_name."
            )

    def refuse_other(self, path: Path, saved: dict) -> None:
        """Raise `UserError` where this run cannot continue the checkpoint at `path`, naming each difference."""
        settings = self.facts["settings"]
        with named_damage(path, "resume", "run"):
            fixed = {name: _recorded(SETTINGS[name].default) for name in FIXED_SETTINGS} | saved["settings"]
            differences = [
                f"--{name} is {settings[name]}, the checkpoint has {fixed[name]}"
                for name in FIXED_SETTINGS
                if settings[name] != fixed[name]
            ]
            if settings.get("average_snapshots") and not saved["settings"].get("average_snapshots"):
                differences.append("the averages that --average_snapshots stores were not tracked from its beginning")
            if saved["fingerprint"] != self.facts["fingerprint"]:
                differences.append(f"--data_path is {self.facts['data']}, the checkpoint has {saved['data']}")
        if differences:
            raise UserError(
                f"belongs to another run: {'; '.join(differences)}.",
                about="resume",
                value=path,
                remedy="Give the settings it was made with, or another --output_dir to start anew.",
            )


def _recorded(default: object) -> object:
    """Return a default as JSON gives it back."""
    return list(default) if isinstance(default, tuple) else default
