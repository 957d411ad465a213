"""The output folder of a preparation: begun, continued, finished, verified; never half of a store in its place."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from jit_accel.base.errors import UserError, changed_settings
from jit_accel.base.files import disk_errors, move, sync, write_json
from jit_accel.data.formats.index import INDEX, STORE_VERSION, UNFINISHED, files_of, read_index, sha256_of
from jit_accel.prepare.store_shards import shard_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK_PATIENCE_S = 5  # workers of a killed run leave within a second


class OutputFolder:
    """`output_dir`, with the shards of an unfinished preparation in its hidden folder `work`."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir).expanduser()
        self.work = self.path / UNFINISHED

    def check_place(self, data_path: str) -> None:
        """Refuse a folder inside the source, where the next run would take the shards for images."""
        source, target = Path(data_path).resolve(), self.path.resolve()
        if source.is_dir() and source in (target, *target.parents):
            raise self._refusal(f"lies inside --data_path {data_path}: choose a folder elsewhere.")

    def finished(self, recorded: dict) -> dict | None:
        """Return the index of such a preparation that is there; `UserError` where other settings or files are."""
        if not self.path.is_dir():
            if self.path.exists():
                raise self._refusal("is a file: choose a new folder.")
            return None
        found = [entry for entry in os.listdir(self.path) if entry != UNFINISHED]
        if INDEX in found:
            index = read_index(self.path, "output_dir")
            self._compare(index["settings"], recorded, "holds images that were prepared otherwise", "")
            shutil.rmtree(self.work, ignore_errors=True)
            return index
        if found and not (self.work / "plan.json").is_file():
            raise self._refusal(f"is not empty ({sorted(found)[0]}, ...): choose a new folder.")
        return None

    @contextlib.contextmanager
    def begun(self, recorded: dict) -> Iterator[dict | None]:
        """Own the folder while the block runs; a preparation that was interrupted here is continued.

        Yields the index where another process has just finished it. Raises `UserError` for a folder that is not
        writable, in use, or begun with other settings, and for a full disk.
        """
        with disk_errors("output_dir", self.path, "run the same command again"), self._lock():
            index = self.finished(recorded)
            if index is None:
                self._record_plan({"version": STORE_VERSION, **recorded})
            yield index
            if (self.path / INDEX).is_file():  # which whoever gets the lock next looks for
                shutil.rmtree(self.work, ignore_errors=True)

    def check_space(self, num_bytes: int) -> None:
        """Refuse to begin what cannot be finished."""
        free = shutil.disk_usage(self.work).free
        there = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        if num_bytes > free + there:
            raise self._refusal(
                f"needs {num_bytes / 2**30:,.1f} GiB, and the disk has {free / 2**30:,.1f} GiB left: make room, choose "
                "another disk, a smaller --img_size or --format jpeg."
            )

    def entry(self, number: int) -> dict | None:
        """Return what is known of shard `number`, if it is finished."""
        path = shard_file(self.work, number, "json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def publish(self, names: list[str]) -> None:
        """Move finished files to where they belong; those that were moved before an interruption are there."""
        for name in names:
            if (self.work / name).exists():
                move(self.work / name, self.path / name)
        sync(self.path)

    def _record_plan(self, recorded: dict) -> None:
        path = self.work / "plan.json"
        if not path.is_file():
            return write_json(path, recorded)
        remedy = f", or remove {self.work} to begin anew"
        self._compare(json.loads(path.read_text(encoding="utf-8")), recorded, "was begun otherwise", remedy)

    def _compare(self, then: dict, now: dict, problem: str, remedy: str) -> None:
        images = {"source_fingerprint": "the images of --data_path changed"}
        if changed := changed_settings(then, now, images):
            remedy = f"use the same settings, or another --output_dir{remedy}."
            raise self._refusal(f"{problem}: {'; '.join(changed)}: {remedy}")

    def _refusal(self, rule: str) -> UserError:
        return UserError(rule, about="output_dir", value=self.path)

    def _lock_file(self) -> TextIO:
        while True:
            self.work.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a process that finished has just removed the folder
                return open(self.work / "lock", "w")

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with self._lock_file() as file:
            deadline = time.monotonic() + _LOCK_PATIENCE_S
            while fcntl:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        rule = "another process is preparing images there: wait for it, or choose another folder."
                        raise self._refusal(rule) from None
                    time.sleep(0.1)
            yield


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
