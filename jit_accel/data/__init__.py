"""From `--data_path` to batches: `open_images`, then `build_loader`."""

from importlib import import_module

_ROOMS = {
    "Batch": "jit_accel.data.batches.batch",
    "Source": "jit_accel.data.formats.sources",
    "build_loader": "jit_accel.data.batches.loader",
    "open_images": "jit_accel.data.formats.sources",
}
__all__ = list(_ROOMS)


def __getattr__(name: str):
    """Import on demand, so that `python -m jit_accel.data.benchmark --help` need not wait for torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
