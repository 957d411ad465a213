"""Files of `torch.save` that others made, read without running anything of them."""

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import serialization

from jit_accel.base.errors import UserError

# Besides tensors and plain containers, which `weights_only` allows. A Namespace only holds attributes.
ALLOWED = [argparse.Namespace]


def read_pickle(path: Path) -> object:
    """Return what `torch.save` put into the file; tensors on the CPU, mapped into memory where the format permits it.

    Whatever a pickle asks for beyond tensors, containers and `argparse.Namespace` makes it refused, before anything
    of it is run.

    Raises `UserError`: refused, broken, or no file of `torch.save`.
    """
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            rule = "is only a Git LFS pointer: fetch the file itself with `git lfs pull`."
            raise UserError(rule, about="input", value=path)
    try:
        with only_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is said by `reason_of`
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except Exception as error:  # a made-up file can make the reader fail in any way
        raise UserError(reason_of(error), about="input", value=path) from None


@contextlib.contextmanager
def only_allowed() -> Iterator[None]:
    """Inside, `weights_only` allows what torch itself does and `ALLOWED`; not what other libraries have added."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        with serialization.safe_globals(ALLOWED):
            yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def can_be_mapped(path: Path) -> bool:
    """Return whether the file is a zip archive of stored, not compressed, entries; others cannot be mapped."""
    if not zipfile.is_zipfile(path):
        return False
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    return False


# Words of torch's errors, and what they mean to the user; `{}` is what the pattern found.
_REASONS = (
    (
        # As in "Unsupported global: GLOBAL posix.system was not an allowed global by default"
        r"GLOBAL:? ([\w.]+)",
        "refused, and nothing of it was run: its pickle asks for `{}`, where only tensors, containers and "
        "argparse.Namespace are allowed. A file that asks for more can run any code: get it from its author as "
        ".safetensors, or as a .pth of tensors and plain values.",
    ),
    ("TorchScript()", "is a TorchScript program, not a checkpoint: give the .pth that the training wrote."),
    (
        r"legacy \.tar format()",
        "refused: the tar format of torch 0.1 cannot be read safely; save it anew with a later torch.",
    ),
    (
        r"(?:WeightsUnpickler error:\s*|(?=Unsupported))(.{0,120})",
        "refused, and nothing of it was run: it is no pickle of tensors and plain values as torch.save writes it ({}).",
    ),
    (
        r"\A\s*(.{0,160})",
        "cannot be read as a file of torch.save; it is broken, cut off or something else ({}): get it again.",
    ),
)


def reason_of(error: Exception) -> str:
    """Return why a file was not read, and what to do, from torch's many words."""
    text = str(error) or type(error).__name__
    for pattern, meaning in _REASONS:
        is_of_pickles = "no pickle of" not in meaning or isinstance(error, pickle.UnpicklingError)
        if is_of_pickles and (match := re.search(pattern, text)):
            return meaning.format(match[1])
    raise AssertionError("the last pattern fits every text")
