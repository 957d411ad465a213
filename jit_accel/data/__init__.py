"""From `--data_path` to batches: `open_images`, then `batches.ready_batches.batches`."""

from importlib import import_module

from jit_accel.base.errors import UserError

_ROOMS = {
    "Batch": "jit_accel.data.batches.batch",
    "Source": "jit_accel.data.formats.source",
    "build_loader": "jit_accel.data.batches.loader",
    "open_images": "jit_accel.data.formats.sources",
}
__all__ = list(_ROOMS)


def __getattr__(name: str):
    """Import on demand, so that settings and names can be read without torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def data_error(path: object, rule: str) -> UserError:
    """Return the error about a data set, or one of its files, at `path`."""
    return UserError(rule, about="data_path", value=str(path))


def undecodable(path: object, which: str, reason: str) -> UserError:
    """Return the error about images of a data set of which none is left to go on with, for this `reason`."""
    remedy = "repair the data"
    if reason.endswith("not an image"):
        remedy += ", or, if these are the bare numbers of arrays, say which: --raw_shape and --raw_dtype"
    return data_error(path, f"{which} ({reason}): {remedy}.")
