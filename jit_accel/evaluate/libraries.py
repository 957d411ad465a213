"""torch-fidelity and others of the extra `eval`, imported only where they are used."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jit_accel.base.errors import UserError

# torch-fidelity imports these for its own data sets and for other networks; we use none of that. A torchvision that is
# missing, or does not fit the installed torch and cannot be imported, is no reason to do without the rest.
_UNUSED = (
    *("torchvision", "torchvision.datasets", "torchvision.models"),
    *("torchvision.transforms", "torchvision.transforms.functional"),
)


def import_torch_fidelity(module: str) -> types.ModuleType:
    """The module `torch_fidelity.<module>`.

    Raises:
        UserError: torch-fidelity is not installed.
    """
    name = f"torch_fidelity.{module}"
    if name not in sys.modules:
        with _stand_ins():
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(
                    f"torch-fidelity cannot be imported ({error}): pip install 'jit_accel[eval]', or 'pip install "
                    "--no-deps torch-fidelity' where torchvision does not fit the installed torch."
                ) from None
    return sys.modules[name]


def has_torch_fidelity() -> bool:
    """Whether its formulas can be had."""
    try:
        import_torch_fidelity("metric_kid")
    except UserError:
        return False
    return True


def import_package(name: str, features: str) -> types.ModuleType:
    """A package that `--features` needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error}: pip install 'jit_accel[eval]'.", about="features", value=features) from None


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules in place of torchvision's, while torch-fidelity is imported."""
    before = {name: sys.modules.pop(name, None) for name in _UNUSED}
    stand_ins = {name: _Empty(name) for name in _UNUSED}
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


class _Empty(types.ModuleType):
    """A module that has whatever class is asked for."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def swapped(module: types.ModuleType, name: str, value: Any) -> Iterator[None]:
    """Put `value` in place of a module's name for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
