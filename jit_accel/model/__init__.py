"""The network, the path from noise to image, and a trained model as a folder."""

import importlib
import importlib.metadata
import os
import sys
from importlib.util import find_spec

from jit_accel.base.console import warn


def set_aside_broken_torchvision() -> None:
    """Hide a torchvision that cannot be imported, and warn: nothing here needs it.

    diffusers, transformers and peft import it wherever it is installed, and fail where it was built for another torch.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision.transforms")  # also no folder that an uninstall left behind
    except Exception as error:  # what torch raises of operators that are not there depends on its release
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # as if it were not installed
        for library in ("diffusers", "transformers"):  # which may have looked for it already
            if utils := sys.modules.get(f"{library}.utils.import_utils"):
                utils._torchvision_available = False
                getattr(utils.is_torchvision_available, "cache_clear", bool)()
        if os.environ.get("RANK", "0") == "0":
            reason = " ".join(str(error).split())[:150]
            warn(
                f"torchvision {_version('torchvision')} cannot be imported beside torch {_version('torch')} "
                f"({type(error).__name__}: {reason}). It is set aside, since nothing here needs it, but other programs "
                f"will fail: `pip uninstall torchvision`, or install the build that matches: {_matching_torchvision()}"
            )


def _matching_torchvision() -> str:
    """Return how to install torchvision for this torch: 0.22 was made for torch 2.7, 0.23 for 2.8, and so on."""
    release, _, build = _version("torch").partition("+")
    major, minor = (*release.split("."), "")[:2]
    version = f"0.{int(minor) + 15}" if major == "2" and minor.isdigit() else ""
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install 'torchvision{f'=={version}.*' if version else ''}'{index}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def __getattr__(name: str):
    # Pipeline folders of version 0.1.0 look for the class here, and diffusers for its base beside it.
    if name in ("JiTTransformer2DModel", "ModelMixin"):
        from jit_accel.model import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


set_aside_broken_torchvision()
