"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text.

    Raises:
        OSError: it cannot be written; the old one is there then.
    """
    temporary = path.with_name(f"tmp_{os.getpid()}_{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder into the place of another, which is removed only when the new one is there.

    Raises:
        OSError: they cannot be renamed; the old folder is in its place then.
    """
    aside = folder.with_name(f"tmp_old_{folder.name}")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
