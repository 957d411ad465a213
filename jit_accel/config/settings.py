"""Every setting, by one flat name: a flag, a YAML key and a key of the recorded configuration.

Defaults < YAML file (`--config`) < command line. Nothing here imports torch, so `--help` answers at once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jit_accel.base.console import redacted
from jit_accel.base.errors import UserError, lookup
from jit_accel.base.files import write_text
from jit_accel.config.groups import (
    AuxConfig,
    ConditionConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PerformanceConfig,
    TechniqueConfig,
    TuneConfig,
)
from jit_accel.config.run_groups import EvalConfig, HealthConfig, HubConfig, RunConfig, SheetConfig, TrackingConfig


@dataclass(frozen=True)
class Config:
    """Train a JiT pixel-space diffusion model on a folder or data set of images."""

    data: DataConfig
    """What to learn from."""
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    """What the network is shown beside the noise, such as a smaller or damaged picture."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Starting from trained weights."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Noise, prediction and loss (arXiv 2511.13720)."""
    aux: AuxConfig = field(default_factory=AuxConfig)
    """Losses beside that one."""
    technique: TechniqueConfig = field(default_factory=TechniqueConfig)
    """Techniques for better training (docs/techniques.md)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Batch, length, learning rate, averaging."""
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    """Speed and memory."""
    run: RunConfig = field(default_factory=RunConfig)
    """Output, checkpoints, logging."""
    sample: SheetConfig = field(default_factory=SheetConfig)
    """Pictures on the way."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """How good the samples are, measured on the way."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Weights & Biases, and other trackers."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """When to say that something looks wrong."""
    hub: HubConfig = field(default_factory=HubConfig)
    """Sharing the result."""

    @classmethod
    def of(cls, **settings: Any) -> "Config":
        """Return checked settings, given by their flat names: `Config.of(data_path="photos", img_size=64)`.

        Raises:
            UserError: no such setting, a value of another type or out of range, or settings that contradict each other.
        """
        from jit_accel.config.checks import as_type, check

        if settings.get("data_path") is None:
            raise UserError("not given: name the images to learn from.", about="data_path")
        for name in settings:
            lookup(SETTINGS, name, "settings", rule="no such setting")
        typed = {name: as_type(name, value) for name, value in settings.items()}
        config = cls(DataConfig(typed["data_path"])).updated(**typed)
        check(config)
        return config

    @classmethod
    def of_record(cls, settings: Mapping[str, Any]) -> "Config":
        """Return recorded settings; names that this version does not know are left out, new ones have defaults."""
        known = {name: value for name, value in settings.items() if name in SETTINGS}
        return cls(DataConfig(known["data_path"])).updated(**known)

    def flat(self) -> dict[str, Any]:
        """Return all settings by their one flat name, as plain YAML values."""
        values = {name: value for group in asdict(self).values() for name, value in group.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def recorded(self) -> dict[str, Any]:
        """Return the same without secrets, for files and trackers."""
        return {name: _without_secrets(value) for name, value in self.flat().items()}

    def updated(self, **settings: Any) -> "Config":
        """Return a copy with these flat settings in the place of its own."""
        assert settings.keys() <= SETTINGS.keys(), f"no such settings: {sorted(settings.keys() - SETTINGS.keys())}"
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        parts = {}
        for name, group in vars(self).items():
            parts[name] = replace(group, **{setting: values[setting] for setting in vars(group).keys() & values})
        return Config(**parts)


GROUPS: tuple[type, ...] = tuple(group.type for group in fields(Config))
SETTINGS = {setting.name: setting for group in GROUPS for setting in fields(group)}


def write_config(recorded: dict[str, Any], path: Path) -> None:
    """Write settings, as `Config.recorded` gives them, as YAML that `--config` reads back."""
    import yaml

    write_text(path, yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(part) for part in value]
    return redacted(value) if isinstance(value, str) else value
