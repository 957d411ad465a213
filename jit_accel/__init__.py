"""jit_accel: train pixel-space diffusion transformers (JiT, arXiv 2511.13720) on HuggingFace Accelerate.

The names below are the public ones (docs/python.md); everything else may change between versions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jit_accel.base.errors import UserError
    from jit_accel.config.settings import Config
    from jit_accel.data.batches.ready_batches import batches
    from jit_accel.data.formats.sources import open_images
    from jit_accel.evaluate import measure
    from jit_accel.model.generation import generate
    from jit_accel.model.loading import load_pipeline as load
    from jit_accel.model.objective import Objective
    from jit_accel.model.pipeline import JiTPipeline
    from jit_accel.model.scheduler import JiTScheduler
    from jit_accel.model.transformer import JiTTransformer2DModel
    from jit_accel.train import fit

__version__ = "0.1.0"
__all__ = [
    "Config",
    "JiTPipeline",
    "JiTScheduler",
    "JiTTransformer2DModel",
    "Objective",
    "UserError",
    "__version__",
    "batches",
    "fit",
    "generate",
    "load",
    "measure",
    "open_images",
]

# Imported on first use, so that `--help` does not pay for torch: the module, and the name there.
_HOMES = {
    "Config": ("config.settings", "Config"),
    "JiTPipeline": ("model.pipeline", "JiTPipeline"),
    "JiTScheduler": ("model.scheduler", "JiTScheduler"),
    "JiTTransformer2DModel": ("model.transformer", "JiTTransformer2DModel"),
    "Objective": ("model.objective", "Objective"),
    "UserError": ("base.errors", "UserError"),
    "batches": ("data.batches.ready_batches", "batches"),
    "fit": ("train", "fit"),
    "generate": ("model.generation", "generate"),
    "load": ("model.loading", "load_pipeline"),
    "measure": ("evaluate", "measure"),
    "open_images": ("data.formats.sources", "open_images"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
