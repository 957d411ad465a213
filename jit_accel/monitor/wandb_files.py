"""The files that W&B keeps of a run in `output_dir/wandb`, one folder for each start of the training.

Each `.wandb` file is a LevelDB log (blocks of 32 KiB, records cut into fragments) behind a header of 7 bytes.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER, BLOCK, FRAGMENT_HEADER = 7, 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Segment:
    """What one start of a training left.

    Attributes:
        file: its `.wandb` file.
        project, entity: where it belongs; entity is empty where the login decides.
        last_step: of the rows in the file; 0 where there are none.
    """

    file: Path
    project: str
    entity: str
    last_step: int

    @property
    def is_offline(self) -> bool:
        return self.file.parent.name.startswith("offline-")

    @property
    def is_on_server(self) -> bool:
        """Whether the server has all of it; `wandb sync` leaves, and looks for, the same mark."""
        return synced_mark(self.file).exists()


def synced_mark(file: Path) -> Path:
    return file.with_name(file.name + ".synced")


def read_segments(output_dir: Path, run_id: str) -> list[Segment]:
    """The segments of a run that a killed training may have left, oldest first, mended for `wandb sync`.

    `wandb sync` stops at an empty or cut file, sends none of the later ones, and on the next try sends the rows before
    the cut once more. So what follows the last whole record is cut off, and an offline folder without one is removed.
    """
    found = []
    for file in sorted((output_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"), key=_start_time):
        run = next((record.run for _, record in records(file) if record.HasField("run")), None)
        if run is not None:
            os.truncate(file, last_whole_record(file))
            found.append(Segment(file, run.project, run.entity, last_step(file)))
        elif file.parent.name.startswith("offline-"):
            shutil.rmtree(file.parent)
        else:
            found.append(Segment(file, "", "", 0))
    return found


def _start_time(file: Path) -> str:
    return file.parent.name.removeprefix("offline-")


def records(file: Path, start: int = HEADER) -> Iterator[tuple[int, object]]:
    """`(offset behind it, wandb_internal_pb2.Record)` of all whole records from the block that begins at `start`."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    parts = None  # of a record whose first fragment was seen
    for end, kind, fragment in _fragments(file, start):
        if kind in (WHOLE, FIRST):
            parts = b""
        if parts is None:
            continue
        parts += fragment
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(parts)
            except DecodeError:
                return
            parts = None
            yield end, record


def _fragments(file: Path, start: int) -> Iterator[tuple[int, int, bytes]]:
    with open(file, "rb") as stream:
        position = start
        stream.seek(position)
        while True:
            if (rest := BLOCK - position % BLOCK) < FRAGMENT_HEADER:  # no fragment begins in a block's last bytes
                position += len(stream.read(rest))
            header = stream.read(FRAGMENT_HEADER)
            if len(header) < FRAGMENT_HEADER:
                return
            length, kind = struct.unpack_from("<HB", header, 4)
            fragment = stream.read(length)
            if len(fragment) < length or not WHOLE <= kind <= LAST:
                return
            position += FRAGMENT_HEADER + length
            yield position, kind, fragment


def _tails(file: Path) -> Iterator[int]:
    """Where to begin to read for what is last: ever further from the end."""
    size, blocks = file.stat().st_size, 1
    while blocks * BLOCK < size:
        yield (size // BLOCK - blocks + 1) * BLOCK
        blocks *= 4
    yield HEADER


def last_step(file: Path) -> int:
    """The step of the last row, or 0; reads little more than the end of the file."""
    for start in _tails(file):
        steps = [record.history.step.num for _, record in records(file, start) if record.HasField("history")]
        if steps:
            return steps[-1]
    return 0


def last_whole_record(file: Path) -> int:
    """The offset behind it."""
    for start in _tails(file):
        ends = [end for end, _ in records(file, start)]
        if ends:
            return ends[-1]
    return HEADER
