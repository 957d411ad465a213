"""Files of `torch.save` that others made, read without running anything of them."""

from __future__ import annotations

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


def read_pickle(path: Path, about: str = "input") -> object:
    """What `torch.save` put into the file; tensors on the CPU, mapped into memory where the format permits it.

    Whatever a pickle asks for beyond tensors, containers and `argparse.Namespace` makes it refused, before anything
    of it is run.

    Raises:
        UserError: refused, broken, or no file of `torch.save`.
    """
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise UserError(
                "is only a Git LFS pointer: fetch the file itself with `git lfs pull`.", about=about, value=path
            )
    try:
        with only_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is said by `reason_of`
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except Exception as error:  # a made-up file can make the reader fail in any way
        raise UserError(reason_of(error), about=about, value=path) from None


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
    """Whether the file is a zip archive of stored, not compressed, entries; others cannot be mapped."""
    if not zipfile.is_zipfile(path):
        return False
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    return False


def reason_of(error: Exception) -> str:
    """Why a file was not read, and what to do, from torch's many words."""
    text = str(error)
    # As in "Unsupported global: GLOBAL posix.system was not an allowed global by default"
    match = re.search(r"GLOBAL:? ([\w.]+)", text) or re.search(r"unsupported GLOBAL ([\w.]+)", text)
    if match:
        return (
            f"refused, and nothing of it was run: its pickle asks for `{match[1]}`, where only tensors, containers and "
            "argparse.Namespace are allowed. A file that asks for more can run any code: get it from its author as "
            ".safetensors, or as a .pth of tensors and plain values."
        )
    if "TorchScript" in text:
        return "is a TorchScript program, not a checkpoint: give the .pth that the training wrote."
    if "legacy .tar format" in text:
        return "refused: the tar format of torch 0.1 cannot be read safely; save it anew with a later torch."
    if isinstance(error, pickle.UnpicklingError) and ("Unsupported" in text or "WeightsUnpickler error" in text):
        detail = text.partition("WeightsUnpickler error:")[2].strip() or text
        return (
            "refused, and nothing of it was run: it is no pickle of tensors and plain values as torch.save writes it "
            f"({detail.splitlines()[0][:120]})."
        )
    first = (text.strip().splitlines() or [type(error).__name__])[0][:160]
    return f"cannot be read as a file of torch.save; it is broken, cut off or something else ({first}): get it again."
