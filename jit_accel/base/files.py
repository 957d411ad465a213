"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a hidden file beside `path`, which takes its place when it is complete.

    Raises:
        OSError: it cannot be written; the old file is there then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text, which is on the disk when this returns.

    Raises:
        OSError: it cannot be written; the old file is there then.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def new_folder(folder: Path) -> Path:
    """Where to write what is to replace `folder`: a hidden place beside it, which is empty, and not made yet.

    Raises:
        OSError: `put_back` fails.
    """
    put_back(folder)
    temporary = _beside(folder, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder into the place of another, which is removed only when the new one is there.

    Raises:
        OSError: they cannot be renamed; the old folder is in its place then.
    """
    put_back(folder)
    aside = _beside(folder, "old")
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Undo the replacing of a folder that was killed between its two renamings, or finish it where it was later."""
    aside = _beside(folder, "old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        os.rename(aside, folder)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.jit_accel_{what}")
