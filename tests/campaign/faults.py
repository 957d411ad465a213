"""The faults: what may happen to a training, and when."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from helpers import Group

KILL_ONE, KILL_ALL = "kill -9 of one process", "kill -9 of all"
TERM_ONE, TERM_ALL, TERM_LAUNCHER = "SIGTERM to one process", "SIGTERM to all", "SIGTERM to the launcher"
FULL_DISK = "full disk"
FLIPPED_BIT, OTHER_NUMBER = "flipped bit", "another number of processes"  # between two starts
# How often each is drawn.
STRIKES = {KILL_ONE: 30, KILL_ALL: 30, TERM_ONE: 9, TERM_ALL: 9, TERM_LAUNCHER: 9, FULL_DISK: 13}
KILLS, TERMS = (KILL_ONE, KILL_ALL), (TERM_ONE, TERM_ALL, TERM_LAUNCHER)

AT_START, IN_TRAINING, IN_SAVE = "while it starts", "in training", "inside a save"
MOMENTS_OF_KILLS = {AT_START: 10, IN_TRAINING: 50, IN_SAVE: 40}  # some saves end before they are struck
MOMENTS = {AT_START: 10, IN_TRAINING: 70, IN_SAVE: 20}
LONGEST_SAVE_S, LONGEST_STEP_S, LONGEST_START_S = 0.1, 0.1, 2.0
DISK_BYTES, BALLAST = 8 << 20, "ballast"


@dataclass(frozen=True)
class Strike:
    """A fault while a training runs: so many steps, or saves, after its start, and a little later."""

    what: str
    moment: str
    after: int
    delay_s: float
    choice: int  # among processes, or of the room that is left on a disk

    def __str__(self) -> str:
        return f"{self.what}, {self.moment}"


def draw_strike(chance: random.Random, has_disk: bool) -> Strike:
    possible = {what: often for what, often in STRIKES.items() if has_disk or what != FULL_DISK}
    (what,) = chance.choices(list(possible), possible.values())
    moments = MOMENTS_OF_KILLS if what in KILLS else MOMENTS
    moment = chance.choices(list(moments), moments.values())[0]
    longest = {AT_START: LONGEST_START_S, IN_TRAINING: LONGEST_STEP_S, IN_SAVE: LONGEST_SAVE_S}[moment]
    most = {AT_START: 0, IN_TRAINING: 6, IN_SAVE: 2}[moment]
    return Strike(what, moment, chance.randint(min(1, most), most), chance.uniform(0, longest), chance.getrandbits(30))


def wait_for(strike: Strike, group: Group, checkpoints: Path, steps_done: Callable[[], int]) -> bool:
    """Wait for the moment of a fault. Returns False where the training has ended before."""

    def is_alive() -> bool:
        return any(process.is_alive() for process in group.processes)

    begun, left_over, saves = time.monotonic(), under_way(checkpoints), set()
    while is_alive():
        if strike.moment == AT_START:
            time.sleep(strike.delay_s)
            return is_alive()
        if strike.moment == IN_TRAINING and steps_done() >= strike.after:
            time.sleep(strike.delay_s)
            return is_alive()
        if strike.moment == IN_SAVE and (found := under_way(checkpoints) - left_over):
            saves |= found
            if len(saves) >= strike.after:
                time.sleep(strike.delay_s / 2)
                if under_way(checkpoints) - left_over:
                    return is_alive()
        time.sleep(0.004)
        assert time.monotonic() < begun + 300, f"nothing happens:\n{group.output()}"
    return False


def under_way(checkpoints: Path) -> set[str]:
    """Return the names of what is being written, or removed."""
    try:
        return {name for name in os.listdir(checkpoints) if name.startswith("tmp_")}
    except FileNotFoundError:
        return set()


def carry_out(strike: Strike, group: Group, disk: Path) -> None:
    """Let the fault happen."""
    if strike.what == FULL_DISK:
        return fill(disk, room=strike.choice % 65536)
    ranks = [process.pid for process in group.processes]
    number = signal.SIGTERM if strike.what in TERMS else signal.SIGKILL
    if strike.what == KILL_ONE:  # also one that only decodes
        ranks += [child.pid for rank in ranks for child in children_of(rank)]
    if strike.what in (KILL_ONE, TERM_ONE):
        ranks = [ranks[strike.choice % len(ranks)]]
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def flip_random_bit(folder: Path, chance: random.Random, spared: tuple[str, ...]) -> tuple[Path, bytes] | None:
    """Flip a bit of a random file below the folder; return its path, and what it held before. None: it has no files."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in spared and path.stat().st_size]
    if not files:
        return None
    file = chance.choice(sorted(files))
    before = file.read_bytes()
    place = chance.randrange(len(before))
    damaged = bytearray(before)
    damaged[place] ^= 1 << chance.randrange(8)
    file.write_bytes(damaged)
    return file, before


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Mount a small disk at a folder for the block; False where only root may do so."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, room: int) -> None:
    """Leave only so many bytes on a disk."""
    with open(disk / BALLAST, "wb", buffering=0) as file:
        try:
            while (left := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room) > 0:
                file.write(bytes(min(left, 1 << 20)))
        except OSError:  # full by now
            pass
