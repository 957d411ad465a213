"""W&B's local files: one of records, a segment, for each start of a training."""

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

# A `.wandb` file is a LevelDB log (blocks of 32 KiB, records cut into fragments) behind a header of 7 bytes.
HEADER, BLOCK, FRAGMENT_HEADER = 7, 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Segment:
    """The `.wandb` file of one start of a training, and how far it can be read."""

    file: Path
    project: str = ""
    entity: str = ""  # empty where the login decides
    last_step: int = 0  # of its rows
    end: int = HEADER  # of its last whole record, in bytes

    @property
    def is_offline(self) -> bool:
        return self.file.parent.name.startswith("offline-")

    @property
    def synced_mark(self) -> Path:
        """The file that says that the server has all of it; `wandb sync` leaves, and looks for, the same."""
        return self.file.with_name(self.file.name + ".synced")


def read_segments(folder: Path, run_id: str) -> list[Segment]:
    """Return the segments in W&B's folder that starts of a run, maybe killed, left: by age, repaired for `wandb sync`.

    `wandb sync` stops at an empty or cut file, sends none of the later ones, and on the next try sends the rows before
    the cut once more. So what follows the last whole record is cut off, and an offline folder without one is removed.
    """
    found = []
    files = folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    for file in sorted(files, key=lambda file: file.parent.name.removeprefix("offline-")):  # by their time
        segment = read_segment(file)
        if segment.is_offline and not segment.project:
            shutil.rmtree(file.parent)
            continue
        if segment.project:
            os.truncate(file, segment.end)
        found.append(segment)
    return found


def read_segment(file: Path) -> Segment:
    """Read all whole records of a file: a second for 200,000 rows."""
    project = entity = ""
    step, end = 0, HEADER
    for position, data in records(file):
        try:
            record = Record.FromString(data)
        except DecodeError:
            break
        end = position
        if record.HasField("run"):
            project, entity = record.run.project, record.run.entity
        elif record.HasField("history"):
            step = record.history.step.num
    return Segment(file, project, entity, step, end)


def records(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield where each whole record of a file ends, and its bytes."""
    parts = b""
    with open(file, "rb") as stream:
        stream.seek(HEADER)
        while True:
            if (rest := BLOCK - stream.tell() % BLOCK) < FRAGMENT_HEADER:  # no fragment begins in a block's last bytes
                stream.seek(rest, os.SEEK_CUR)
            header = stream.read(FRAGMENT_HEADER)
            length, kind = struct.unpack_from("<HB", header.ljust(FRAGMENT_HEADER, b"\0"), 4)
            fragment = stream.read(length)
            if len(fragment) < length or not WHOLE <= kind <= LAST:  # a header that is cut has no kind
                return
            parts = fragment if kind in (WHOLE, FIRST) else parts + fragment
            if kind in (WHOLE, LAST):
                yield stream.tell(), parts
