"""One campaign: a training that faults strike again and again until it has come to its end."""

import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from campaign import faults, judge
from campaign.faults import Strike
from campaign.judge import Images, check
from campaign.kinds import GLOBAL_BATCH, OTHERS, STEPS, Kind, Layout, begin, reference
from helpers import Group

from jit_accel.model.checkpoints import step_folders

PATIENCE_S = 240.0  # for processes to end that were left behind, on a busy machine
NO_WHOLE_ONE = "no checkpoint there is whole"
# A flipped bit in them cannot be seen: metrics.jsonl has no checksums.
NOT_SEALED = ("metrics.jsonl", faults.BALLAST)
# A launcher ends the others then, within its grace; nobody else does before they have met.
LAUNCHERS_ENDS, GRACE_S = {(faults.KILL_ONE, faults.AT_START), (faults.TERM_ONE, faults.AT_START)}, 10.0


@dataclass
class Campaign:
    """A training of one kind, and what has happened to it; in a folder of its own below `work`, which has the data."""

    kind: Kind
    seed: str
    work: Path
    is_elastic: bool  # it goes on with other numbers of processes, too
    most_faults: int = 1000
    struck: Counter = field(default_factory=Counter)
    seen: Images = field(default_factory=dict)
    story: list[str] = field(default_factory=list)
    flipped: list[Path] = field(default_factory=list)
    starts: int = 0

    def run(self) -> Counter:
        """Train to the end in spite of all. Returns how often each fault has struck; raises `judge.Broken`."""
        chance = random.Random(self.seed)
        self.place = self.work / re.sub(r"\W", "_", self.seed)
        shutil.rmtree(self.place, ignore_errors=True)
        expected = reference(self.kind, self.work)
        with faults.small_disk(self.place / "disk") as self.has_disk:
            self.disk, self.output = self.place / "disk", self.place / "disk" / "run"
            try:
                self._disturb(chance)
                is_same = not self.struck[faults.OTHER_NUMBER]
                judge.check_end(self.output, self.seen, expected, is_same, self.flipped)
            except BaseException:
                shutil.copytree(self.disk, self.place / "disk_found")
                raise
        shutil.rmtree(self.place)
        return self.struck

    def _disturb(self, chance: random.Random) -> None:
        layout, workers = self.kind.layout, chance.choice([0, 0, 1])
        while True:
            is_calm = self.struck.total() >= self.most_faults
            strike = None if is_calm else faults.draw_strike(chance, self.has_disk)
            if self._start(layout, strike, workers):
                return
            if not is_calm and chance.random() < 0.35:
                self._flip(chance)
            if self.is_elastic and not is_calm and chance.random() < 0.5:
                layout = self._another(layout, chance)

    def _start(self, layout: Layout, strike: Strike | None, workers: int) -> bool:
        """Train until a fault, or to the end; check what is left. Returns True at the end."""
        self.starts += 1
        newest = judge.newest_sound(self.output)
        notes, log = self.place / f"notes{self.starts}", self.place / f"log{self.starts}.txt"
        launched = bool(strike and strike.what == faults.TERM_LAUNCHER)
        self.story.append(f"{self.starts}: {layout.name} from step {newest}, {strike or 'undisturbed'}")
        group = begin(self.kind.of(layout), self.work / "data", self.output, notes, log, workers, launched)
        is_struck = strike is not None and faults.wait_for(
            strike, group, self.output / "checkpoints", lambda: judge.steps_noted(notes)
        )
        if is_struck:
            self.struck[str(strike)] += 1
            faults.carry_out(strike, group, self.disk)
        codes = self._wait(group, strike)
        (self.disk / faults.BALLAST).unlink(missing_ok=True)
        self.story[-1] += f"; codes {codes}, {'struck' if is_struck else 'not struck'}"
        self._check_start(group.output(), codes, strike if is_struck else None, newest, notes)
        return all(code == 0 for code in codes)

    def _wait(self, group: Group, strike: Strike | None) -> list[int]:
        """Wait until all processes have ended by themselves; but those that wait for one to come are ended."""
        try:
            if strike and (strike.what, strike.moment) in LAUNCHERS_ENDS:
                deadline = time.monotonic() + GRACE_S
                while any(process.is_alive() for process in group.processes) and time.monotonic() < deadline:
                    time.sleep(0.05)
                group.kill()
            return group.wait(PATIENCE_S)
        except TimeoutError as error:
            raise judge.Broken(f"processes did not end after {strike}: {error}") from None

    def _check_start(self, printed: str, codes: list[int], strike: Strike | None, newest: int, notes: Path) -> None:
        """Check what one start has left, and note which images of the run it took."""
        resumed = judge.step_in(judge.RESUMED, printed)
        check(resumed in (None, newest), f"went on at step {resumed}, but the checkpoint of step {newest} is whole")
        if taken := judge.read_notes(notes):
            first = (resumed or 0) * GLOBAL_BATCH
            check(resumed is not None or newest == 0, "trained without going on from a checkpoint")
            self.seen = {place: image for place, image in self.seen.items() if place < first} | taken
        judge.check_folder(self.output, self.flipped)
        check(judge.newest_sound(self.output) >= newest, "a checkpoint was lost")
        # Torch's own: of those that wait for a process that never came, and of workers whose parent is gone, or gone
        # themselves.
        is_of_worker = "DataLoader worker" in printed or "resource_sharer" in printed
        may_trace = strike and (strike.moment == faults.AT_START or is_of_worker)
        check("Traceback" not in printed or may_trace, f"a traceback:\n{printed}")
        what = strike.what if strike else None
        if what in faults.KILLS:
            check(-signal.SIGKILL in codes or set(codes) == {0} or what == faults.KILL_ONE, f"codes {codes}")
        elif what in faults.TERMS:
            stopped = judge.step_in(judge.STOPPED, printed)
            if stopped is not None:
                check(set(codes) == {128 + signal.SIGTERM}, f"codes {codes} after a stop")
                check(judge.newest_sound(self.output) == stopped, f"stopped at step {stopped} without its checkpoint")
            elif taken and judge.newest_sound(self.output) < STEPS:
                check(set(codes) == {0}, f"a stop was not heeded, codes {codes}:\n{printed}")
        elif what == faults.FULL_DISK:
            check(set(codes) in ({0}, {2}), f"codes {codes} of a full disk:\n{printed}")
        else:
            check(set(codes) == {0}, f"ended by itself, codes {codes}:\n{printed}")

    def _flip(self, chance: random.Random) -> None:
        """Flip a bit of a random file of the run, and put it back where no checkpoint is left to go on from."""
        if (found := faults.flip_random_bit(self.output, chance, NOT_SEALED)) is None:
            return
        file, before = found
        self.flipped.append(file)
        self.struck[faults.FLIPPED_BIT] += 1
        self.story.append(f"   a bit flipped in {file.relative_to(self.output)}")
        had_one = any(step_folders(self.output / "checkpoints"))
        if had_one and judge.newest_sound(self.output) == 0:
            self._check_refusal()
            file.write_bytes(before)

    def _check_refusal(self) -> None:
        """Check that nothing is begun anew where checkpoints are, and none is whole."""
        log = self.place / f"refused{self.starts}.txt"
        group = begin(self.kind.of(Layout("DDP 1", 1)), self.work / "data", self.output, self.place / "none", log)
        codes = self._wait(group, None)
        check(codes == [2] and NO_WHOLE_ONE in group.output(), f"codes {codes}, not refused:\n{group.output()}")

    def _another(self, layout: Layout, chance: random.Random) -> Layout:
        other = chance.choice([each for each in (self.kind.layout, *OTHERS[self.kind.layout]) if each != layout])
        self.struck[faults.OTHER_NUMBER] += 1
        return other
