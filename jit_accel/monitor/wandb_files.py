"""The files that W&B keeps of a run in `output_dir/wandb`, one folder for each start of the training.

Each `.wandb` file is a LevelDB log (blocks of 32 KiB, records cut into fragments) behind a header of 7 bytes.
"""

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER, BLOCK, FRAGMENT_HEADER = 7, 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Segment:
    """The `.wandb` file of one start of a training."""

    file: Path
    project: str
    entity: str  # empty where the login decides
    last_step: int  # of its rows; 0 where it has none

    @property
    def is_offline(self) -> bool:
        return self.file.parent.name.startswith("offline-")


def synced_mark(file: Path) -> Path:
    """Return the file that says that the server has all of a segment; `wandb sync` leaves, and looks for, the same."""
    return file.with_name(file.name + ".synced")


def read_segments(output_dir: Path, run_id: str) -> list[Segment]:
    """Return the segments of a run that a killed training may have left, oldest first, repaired for `wandb sync`.

    `wandb sync` stops at an empty or cut file, sends none of the later ones, and on the next try sends the rows before
    the cut once more. So what follows the last whole record is cut off, and an offline folder without one is removed.
    """
    found = []
    files = (output_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    for file in sorted(files, key=lambda file: file.parent.name.removeprefix("offline-")):  # by their time
        run = next((record.run for _, record in records(file) if record.HasField("run")), None)
        if run is not None:
            os.truncate(file, last_in(file, lambda end, record: end) or HEADER)
            found.append(Segment(file, run.project, run.entity, last_step(file)))
        elif file.parent.name.startswith("offline-"):
            shutil.rmtree(file.parent)
        else:
            found.append(Segment(file, "", "", 0))
    return found


def last_step(file: Path) -> int:
    """Return the step of the last row, or 0."""
    return last_in(file, lambda end, record: record.history.step.num if record.HasField("history") else None) or 0


def last_in(file: Path, find: Callable[[int, object], int | None]) -> int | None:
    """Return the last result that `find` has for the records; reads little more than the end of the file."""
    size, blocks, start = file.stat().st_size, 1, HEADER + 1
    while start > HEADER:  # ever further from the end
        start = (size // BLOCK - blocks + 1) * BLOCK if blocks * BLOCK < size else HEADER
        found = [result for record in records(file, start) if (result := find(*record)) is not None]
        if found:
            return found[-1]
        blocks *= 4
    return None


def records(file: Path, start: int = HEADER) -> Iterator[tuple[int, object]]:
    """Yield all whole records (`wandb_internal_pb2.Record`) behind `start`, where a block begins, with their ends."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    parts = None  # of a record whose first fragment was seen
    with open(file, "rb") as stream:
        stream.seek(start)
        while True:
            if (rest := BLOCK - stream.tell() % BLOCK) < FRAGMENT_HEADER:  # no fragment begins in a block's last bytes
                stream.seek(rest, os.SEEK_CUR)
            header = stream.read(FRAGMENT_HEADER)
            length, kind = struct.unpack_from("<HB", header.ljust(FRAGMENT_HEADER, b"\0"), 4)
            fragment = stream.read(length)
            if len(fragment) < length or not WHOLE <= kind <= LAST:  # a header that is cut has no kind
                return
            if kind in (WHOLE, FIRST):
                parts = fragment
            elif parts is not None:
                parts += fragment
            if parts is not None and kind in (WHOLE, LAST):
                try:
                    record = wandb_internal_pb2.Record.FromString(parts)
                except DecodeError:
                    return
                parts = None
                yield stream.tell(), record
