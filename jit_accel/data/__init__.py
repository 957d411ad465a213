"""From `--data_path` to batches: `open_source`, then `build_loader`."""

from jit_accel.data.loader import Batch, build_loader
from jit_accel.data.sources import Source, open_source

__all__ = ["Batch", "Source", "build_loader", "open_source"]
