"""Files and folders are there whole or not at all, whatever stops their writing."""

import errno
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from jit_accel.base.errors import UserError
from jit_accel.base.files import (
    append_json_lines,
    atomic_file,
    atomic_folder,
    disk_errors,
    read_json_lines,
    remove_leftovers,
    restore_folder,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def made(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    return folder


def fill(folder: Path, *files: str) -> None:
    with atomic_folder(folder) as temporary:
        made(temporary, *files)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error, durable):
    path = tmp_path / "a.json"
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_text("old")
    with pytest.raises(type(error)), atomic_file(path, durable=durable) as temporary:
        temporary.write_text("new")
        raise error
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "old"


def test_json_is_written_as_it_is_read(tmp_path):
    value = {"name": "cäsar", "counts": [1, 2]}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    fill(tmp_path / "folder", "old")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "folder"):
        pass  # nothing was written
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as temporary:
        made(temporary, "new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder", "folder/old"]
    # Killed between the renamings: the next one puts the old folder back first.
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr(os, "rename", lambda old, new: _die() if Path(new).name == "folder" else rename(old, new))
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "folder", "new")
    assert not (tmp_path / "folder").exists()
    restore_folder(tmp_path / "folder")
    assert names(tmp_path) == ["folder", "folder/old"]
    fill(tmp_path / "folder", "new")
    assert names(tmp_path) == ["folder", "folder/new"]


def _die():
    raise KeyboardInterrupt


def test_what_killed_processes_left_is_removed_and_what_others_write_stays(tmp_path, dead):
    others = [f".a[1].{os.getppid()}.tmp", f".b.{dead}.tmp", ".a[1].x.tmp", "tmp_a[1]"]
    for name in (*others, f".a[1].{dead}.tmp"):
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "a[1]") as temporary:
        temporary.touch()
    assert names(tmp_path) == sorted(["a[1]", *others])
    made(tmp_path / f".folder.{dead}.tmp", "half")
    fill(tmp_path / "folder", "new")
    assert names(tmp_path / "folder") == ["new"]
    assert not (tmp_path / f".folder.{dead}.tmp").exists()
    remove_leftovers(tmp_path)
    assert not (tmp_path / f".b.{dead}.tmp").exists()


def test_lines_of_json_survive_a_crash_in_the_last_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_json_lines(path, [{"step": 1, "loss": math.nan}, {"step": 2, "values": {"fid": math.inf}}])
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    append_json_lines(path, [{"step": 3}], durable=True)
    append_json_lines(path, [])
    rows = [{"step": 1, "loss": None}, {"step": 2, "values": {"fid": None}}, {"step": 3}]
    assert list(read_json_lines(path)) == rows
    assert list(read_json_lines(tmp_path / "none")) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_told_with_what_helps(tmp_path):
    def told(error: OSError, *go_on: str) -> str:
        with pytest.raises(UserError) as caught, disk_errors("output_dir", tmp_path, *go_on):
            raise error
        return str(caught.value)

    for number in (errno.ENOSPC, errno.EDQUOT):
        full = OSError(number, os.strerror(number))
        assert told(full, "go on") == (
            f"output_dir {tmp_path}: the disk is full. What is finished is kept: make room and go on."
        )
        assert told(full).endswith("the disk is full: make room, or give another place. Nothing was changed.")
    denied = OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "cannot be written (Read-only file system): give another place." in told(denied)
