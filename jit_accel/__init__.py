"""jit_accel: train pixel-space diffusion transformers (JiT, arXiv 2511.13720) on HuggingFace Accelerate."""

__version__ = "0.1.0"

_EXPORTS = {
    "JiTTransformer2DModel": "jit_accel.model.transformer",
    "JiTScheduler": "jit_accel.model.scheduler",
    "JiTPipeline": "jit_accel.model.pipeline",
}
__all__ = ["JiTPipeline", "JiTScheduler", "JiTTransformer2DModel", "__version__"]


def __getattr__(name: str):
    # Imported on first use, so that `--help` does not pay for torch.
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'jit_accel' has no attribute {name!r}")
