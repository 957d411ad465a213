"""A feature network of 16 numbers: real ones cost seconds a comparison."""

from __future__ import annotations

import torch

from jit_accel.evaluate import features, settings


def load_tiny(weights: str | None) -> tuple:
    network = torch.nn.Conv2d(3, 16, 5, stride=3)
    draws = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws)

    def forward(images):
        return {features.MAIN: network(images.float() / 127.5 - 1).relu().mean((2, 3))}

    return network, {features.MAIN: 16}, forward, "tiny"


def install() -> None:
    """Make it known as `--features tiny`."""
    features.LOADERS["tiny"] = load_tiny
    settings.FEATURES["tiny"] = None


def remove() -> None:
    """Forget it again."""
    del features.LOADERS["tiny"], settings.FEATURES["tiny"]
