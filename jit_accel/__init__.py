"""jit_accel: train pixel-space diffusion transformers (JiT, arXiv 2511.13720) on HuggingFace Accelerate.

The names below are the public ones (docs/python.md); everything else may change between versions.
"""

from importlib import import_module

__version__ = "0.1.0"
# Module and name there, imported on first use, so that `--help` does not pay for torch; types are in __init__.pyi.
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

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
