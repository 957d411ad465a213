"""The reference's values (tests/fixtures/*.safetensors): weights, inputs and outputs of two small networks."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from jit_accel.model.functional import position_table
from jit_accel.model.transformer import JiTTransformer2DModel

FILES = ("tiny", "nocontext")


@dataclass
class Golden:
    config: dict
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name.removeprefix("weights."): t for name, t in self.tensors.items() if name.startswith("weights.")}

    def model(self) -> JiTTransformer2DModel:
        model, weights = JiTTransformer2DModel(**self.config), self.weights
        grid = model.config.img_size // model.config.patch_size
        positions = position_table(model.config.hidden_size, (grid, grid), grid, torch.device("cpu"))
        assert torch.allclose(weights.pop("pos_embed"), positions, atol=1e-4)  # fixed, so it is no weight of ours
        model.load_state_dict(weights, strict=True)
        return model

    def sampling_rows(self):
        pattern = r"sample\.(\w+)\.steps(\d+)\.cfg([\d.]+)\.interval([\d.]+)-([\d.]+)\.noise([\d.]+)\.out"
        for name in self.tensors:
            if match := re.fullmatch(pattern, name):
                method, steps, *numbers = match.groups()
                yield name.removesuffix(".out"), method, int(steps), *map(float, numbers)


def load_golden(name: str) -> Golden:
    with safe_open(Path(__file__).parent / "fixtures" / f"{name}.safetensors", "pt") as file:
        return Golden(json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
