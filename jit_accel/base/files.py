"""Files and folders that are there whole or not at all, lines of JSON, and what a full disk means to the user."""

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from jit_accel.base.errors import UserError

# Folders that one program alone may write to, and what makes sure that it is this one.
_guards: dict[str, Callable[[], None]] = {}
_NO_ROOM = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextlib.contextmanager
def guarded(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` in the block before anything in this folder is written, replaced or moved; it may raise."""
    key = os.path.join(os.path.abspath(folder), "")
    _guards[key] = check
    try:
        yield
    finally:
        _guards.pop(key, None)


def check_guard(path: Path) -> None:
    """Call the check of the guarded folder that this is or lies in, if any."""
    place = os.path.join(os.path.abspath(path), "")
    for folder, check in list(_guards.items()):
        if place.startswith(folder):
            check()


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a hidden path beside `path` to write to; the file takes the place of `path` at the block's end.

    With `durable` it is on the disk by then, even after a power cut, and what killed processes left of it is removed.
    Raises `OSError`; the old file is there then.
    """
    check_guard(path)
    if durable:
        remove_leftovers(path.parent, path.name)
    temporary = _temporary(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        check_guard(path)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # what stood in the way of writing stands in the way here
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give the path of a hidden folder to make and fill; it takes the place of `folder` at the block's end.

    The old folder is removed only when the new one, whole and on the disk, is there. Raises `OSError`; the old folder
    is in its place then.
    """
    check_guard(folder)
    restore_folder(folder)
    remove_leftovers(folder.parent, folder.name)
    temporary, aside = _temporary(folder), _aside(folder)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        check_guard(folder)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(temporary, folder)
        shutil.rmtree(aside, ignore_errors=True)
        sync(folder.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            restore_folder(folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo the replacing of a folder that was killed between its two renamings, or finish it where it was later."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        os.rename(aside, folder)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text, durably. Raises `OSError`; the old file is there then."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: object) -> None:
    """Replace a file by this value as indented JSON, durably. Raises `OSError`; the old file is there then."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name on the same disk, in place of a file of that name."""
    check_guard(source)
    os.replace(source, target)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; folders of Windows need not be waited for."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of files and folders with this name, or any, that they wrote into `folder`."""
    for path in folder.glob(f".{glob.escape(name) if name else '*'}.*.tmp"):
        match = re.fullmatch(r"\..+\.(\d{1,9})\.tmp", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def append_json_lines(path: Path, rows: Iterable[dict], *, durable: bool = False) -> None:
    """Write rows behind what a file of JSON lines has, all of them or none; a last line that was cut is ended first.

    NaN and infinity become null. With `durable` the rows are on the disk when this returns. Raises `OSError`.
    """
    data = "".join(map(json_line, rows)).encode()
    check_guard(path)
    with open(path, "a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            data = b"\n" + data
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def json_line(row: dict) -> str:
    """Return a row as a line of strict JSON: NaN and infinity among its values become null."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n"


def parse_json_line(line: bytes) -> dict | None:
    """Return the row of a line; None where it was cut short or is something else."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)  # NaN in files of other versions
    except (ValueError, RecursionError):
        return None
    return row if type(row) is dict else None


def read_json_lines(path: Path) -> Iterator[dict]:
    """Yield the rows of a file of JSON lines, none where it is missing; lines that were cut short are left out."""
    if path.exists():
        with open(path, "rb") as file:
            yield from (row for row in map(parse_json_line, file) if row is not None)


@contextlib.contextmanager
def disk_errors(about: str, value: object, go_on: str | None = None) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError` about the setting that names the place.

    `go_on` is how to continue with what is finished, such as "run the same command again"; None: nothing was changed.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, about, value, go_on) from error


def disk_error(error: Exception, about: str, value: object, go_on: str | None = None) -> UserError:
    """Return what an error while writing means to the user; arguments as of `disk_errors`."""
    reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
    if getattr(error, "errno", None) in _NO_ROOM or "No space left" in reason:
        kept = f". What is finished is kept: make room and {go_on}." if go_on else ": make room, or give another place."
        problem = f"the disk is full{kept}"
    else:
        problem = f"cannot be written ({reason}): give another place."
    return UserError(problem, about=about, value=value, remedy=None if go_on else "Nothing was changed.")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.jit_accel_old")
