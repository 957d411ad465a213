"""LPIPS, the distance of images as AlexNet sees them (Zhang et al., 1801.03924, version 0.1).

torchmetrics has the weights of its heads, and would load the network's by torchvision, which is not used here; so the
few layers are built here, and nothing is ever downloaded.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.evaluate.features import read_weights

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # as torchvision keeps it; ends in the first digits of its SHA-256
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET_FILE}"
LEAST_SIDE = 31  # pixels: of less, nothing is left after two poolings
TAPS = (1, 4, 7, 9, 11)  # the layers whose outputs are compared
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], as the authors have them


def alexnet() -> nn.Sequential:
    """Return the layers of AlexNet (Krizhevsky, 1404.5997) up to the last output that is compared."""
    relu, pool = nn.ReLU, lambda: nn.MaxPool2d(3, 2)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(), nn.Conv2d(64, 192, 5, padding=2), relu(), pool()),
        *(nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu()),
        *(nn.Conv2d(256, 256, 3, padding=1), relu()),
    )


def load_lpips(heads_file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS, (B,), of images and truths float32 (B, C, H, W) in [0, 1], C 1 or 3, H and W 31 or more.

    `heads_file` is torchmetrics' `alex.pth`. `UserError` where the network's weights are not in torch hub's cache.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    if not file.is_file():
        rule = f"its weights are not in {file}, and are never downloaded: put {ALEXNET_URL} there, or leave it out."
        raise UserError(rule, about="metrics", value="lpips")
    network = alexnet().requires_grad_(False).eval()
    with renamed_settings(feature_weights="metrics"):
        state, heads = read_weights(file)[0], read_weights(heads_file)[0]
        try:
            network.load_state_dict({name: state[f"features.{name}"] for name in network.state_dict()})
            weights = [heads[f"lin{place}.model.1.weight"] for place in range(len(TAPS))]  # (1, C, 1, 1) each
        except (KeyError, RuntimeError):
            raise UserError("not weights of AlexNet: get them again.", about="feature_weights", value=file) from None

    def features(images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        found, x = [], (2 * images.expand(-1, 3, -1, -1) - 1 - shift) / scale
        for place, layer in enumerate(network):
            x = layer(x)
            if place in TAPS:
                found.append(x / torch.sqrt(1e-8 + x.square().sum(1, keepdim=True)))
        return found

    def score(images: Tensor, truths: Tensor) -> Tensor:
        network.to(images.device)
        pairs = zip(features(images), features(truths), weights)
        return sum((weight.to(a.device) * (a - b).square()).sum(1).mean((1, 2)) for a, b, weight in pairs)

    return score
