"""The manifest that seals a checkpoint: names, sizes and checksums of its files; and what is wrong with a folder."""

import json
import re
import stat
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jit_accel.base.errors import message_of
from jit_accel.model.tensor_files import Written, chunks_of, sum_of, summed_file

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 3  # 1 and 2 had no checksums
THREADS = 4


def write_manifest(folder: Path, files: Mapping[str, Written], seconds: float) -> None:
    """Write the manifest of these files, which took so many seconds to be written; whoever finds it finds them whole.

    Raises `OSError`.
    """
    manifest = {
        "format": FORMAT_VERSION,
        "seconds": round(seconds, 3),
        "files": {name: file.size for name, file in sorted(files.items())},
        "crc32": {name: " ".join(f"{value:08x}" for value in file.sums) for name, file in sorted(files.items())},
    }
    with summed_file(folder / MANIFEST) as file:
        file.write(json.dumps(manifest | {"seal": _seal_of(manifest)}, indent=1).encode())


def _seal_of(manifest: Mapping) -> str:
    """Return a checksum of the manifest's own content."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def read_manifest(path: Path) -> dict:
    """Read the manifest of a checkpoint. Raises `OSError`, and `ValueError` where it is none, or a damaged one."""
    try:
        if not stat.S_ISREG((path / MANIFEST).stat().st_mode):  # reading a named pipe would wait for ever
            raise ValueError("is no file")
        manifest = json.loads((path / MANIFEST).read_bytes())
    except RecursionError:
        raise ValueError("is no JSON") from None
    if not isinstance(manifest, dict) or not isinstance(sizes := manifest.get("files"), dict):
        raise ValueError("names no files")
    if any(type(size) is not int or Path(name).name != name for name, size in sizes.items()):
        raise ValueError("names no files of its folder")
    is_sealed = manifest.get("format") not in (1, 2)
    if is_sealed and not (
        manifest.get("seal") == _seal_of(manifest) and sizes.keys() == manifest.get("crc32", {}).keys()
    ):
        raise ValueError("is not what was written")
    return manifest


def is_complete(path: Path) -> bool:
    """Return True where the manifest is there and every file it names has the size it names."""
    try:
        return all((path / name).stat().st_size == size for name, size in read_manifest(path)["files"].items())
    except (OSError, ValueError):
        return False


def files_of(path: Path, part: str) -> list[Path]:
    """Return the files of a part of a checkpoint. Raises `OSError` or `ValueError`: it has no manifest."""
    return [path / name for name in read_manifest(path)["files"] if part_of_file(name) == part]


def part_of_file(name: str) -> str:
    """Return the part of a checkpoint that is in a file of this name."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", name)


def damage_of(path: Path, parts: Collection[str] | None = None, rank: int = 0, ranks: int = 1) -> str | None:
    """Return what is wrong with the files of a checkpoint, None where nothing is; nothing of it is loaded.

    parts: those whose content is looked at, beside `state.json`; None: all. Of the content this is the share of process
    `rank` of `ranks`. What was written without checksums has at least to be there, of its size, and of its form.
    """
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({message_of(error)})"
    wanted = [name for name in manifest["files"] if parts is None or name == STATE or part_of_file(name) in parts]
    if STATE not in manifest["files"]:
        return f"{STATE} is missing"
    try:
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected:
                return f"{name} has {size:,} bytes in place of {expected:,}"
        if sums := manifest.get("crc32"):
            return _other_content(path, {name: sums[name] for name in wanted}, manifest["files"], rank, ranks)
        return next((f"{name} cannot be read" for name in wanted if not _has_form(path / name)), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"


def _other_content(path: Path, sums: Mapping[str, str], sizes: Mapping[str, int], rank: int, ranks: int) -> str | None:
    """Return which file has another content than was written, by its checksums."""
    expected = [int(value, 16) for text in sums.values() for value in text.split()][rank::ranks]
    chunks = [chunk for name in sums for chunk in chunks_of(path / name, sizes[name])][rank::ranks]
    with ThreadPoolExecutor(THREADS) as pool:
        for (file, begin), was, now in zip(chunks, expected, pool.map(sum_of, chunks)):
            if was != now:
                pool.shutdown(cancel_futures=True)
                return f"{file.name} is not what was written (behind byte {begin:,})"
    return None


def _has_form(file: Path) -> bool:
    """Return True where a file has the form of its kind: a header, or all of its JSON. Raises `OSError` naming it."""
    open(file, "rb").close()  # safetensors takes what it may not read for missing, and names no file
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return True
        return isinstance(json.loads(file.read_bytes()), dict)
    except (ValueError, SafetensorError):
        return False
