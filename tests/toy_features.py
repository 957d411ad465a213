"""A feature network for images of 28 px that costs nothing."""

import torch

from jit_accel.evaluate.features import LOADERS


class Toy(torch.nn.Module):
    """Stands for Inception, with 16 features: it is quick, and its features are those of real pixels."""

    sizes = {"main": 16, "spatial": 7, "logits": 5}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"main": (3 * 28 * 28, 16), "spatial": (3 * 28 * 28, 7), "logits": (16, 5)}
        self.weights = {name: torch.randn(*shape, generator=generator) / 50 for name, shape in shapes.items()}

    def forward(self, images):
        pixels = images.float().flatten(1) / 32
        features = (pixels @ self.weights["main"]).relu()
        return {
            "main": features,
            "spatial": pixels @ self.weights["spatial"],
            "logits": features @ self.weights["logits"],
        }


def load_toy(weights=None):
    toy = Toy()
    return toy, toy.sizes, toy.forward, "toy"


def use_toy():
    """In a process of its own."""
    LOADERS["inception"] = load_toy
