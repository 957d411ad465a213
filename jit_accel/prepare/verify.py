"""Comparing the files of a store with the checksums in its index."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from jit_accel.base.errors import UserError
from jit_accel.data.formats.index import files_of, read_index, sha256_of


def verify(folder: str) -> int:
    """Read every file of a store; return the exit code, 0. Raises `UserError` where files are missing or damaged."""
    index = read_index(folder, "verify")
    files, damaged = files_of(index), []
    with tqdm(total=index["num_bytes"], unit="B", unit_scale=True, desc="checksums", disable=None) as bar:
        for file in files:
            try:
                if sha256_of(Path(folder) / file["file"]) != file["sha256"]:
                    damaged.append(file["file"])
            except OSError as error:
                damaged.append(f"{file['file']} ({error.strerror})")
            bar.update(file["bytes"])
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(files)} files are not what was written: "
            f"{', '.join(damaged[:5])}{', ...' if len(damaged) > 5 else ''}: copy them again, or prepare the images "
            "again.",
            about="verify",
            value=folder,
        )
    print(f"{folder}: {len(files)} files, {index['num_images']:,} images, all as they were written.")
    return 0
