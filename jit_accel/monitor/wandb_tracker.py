"""A training as a run of Weights & Biases: online, or offline where its server cannot be used.

`metrics.jsonl` has every row, so whatever W&B lacks up to the step where a training starts is sent from there, and
rows that it has are not sent again: its curves have no gap and no step twice, however a training was interrupted.
W&B keeps a file of records in `output_dir/wandb` for each start of the training: a segment.
"""

import os
import secrets
import shlex
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import wandb
from accelerate.tracking import GeneralTracker
from google.protobuf.message import DecodeError
from wandb.errors import AuthenticationError, UsageError
from wandb.proto.wandb_internal_pb2 import Record

from jit_accel.base.console import say, warn
from jit_accel.base.files import write_text
from jit_accel.monitor.log import METRICS_FILE
from jit_accel.monitor.metric_table import EPOCH, METRICS, SAMPLES
from jit_accel.monitor.trackers import FINISH_TIMEOUT_S, describe, in_time

ID_FILE = "wandb_run_id.txt"
# The training waits at most this long for a server that does not answer: for the check of the key (wandb's own ten
# seconds, or WANDB_HTTP_TIMEOUT), for the start, and at the end for what is left to send.
START_TIMEOUT_S = 20
TEARDOWN_TIMEOUT_S = 5
# wandb's service may write the last rows after it has said that it is done.
FILE_TIMEOUT_S = 20

SETTINGS = {
    "silent": True,  # what matters of it is said by us, once
    "init_timeout": START_TIMEOUT_S,
    "finish_timeout": FINISH_TIMEOUT_S,
    "finish_timeout_raises": True,
    # The command line, the git remote and SLURM's variables may hold secrets; the configuration has what is needed.
    "x_disable_meta": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "console": "off",
    "x_transaction_log_flush_interval": 2,  # seconds of rows that a kill costs the local file
}


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


class WandbTracker(GeneralTracker):
    """A run of W&B, begun or continued; Accelerate's own tracker needs a server, and begins a new run at each start.

    `output_dir` remembers the run, and holds its files below `wandb`; `init_kwargs` go to `wandb.init`. `tracker` is
    wandb's run, and `last_step` the newest step that W&B has of earlier starts: it takes no row before that.
    """

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, project: str, output_dir: Path, **init_kwargs):
        self.project, self.output_dir, self.init_kwargs, self.tracker = project, output_dir, init_kwargs, None
        self.id_file = output_dir / ID_FILE
        self.id = self.id_file.read_text().strip() if self.id_file.exists() else ""
        self.last_step, self.newest_step, self.exit_code = 0, 0, 1
        self.is_offline = self.is_warned = self.has_given_up = False
        super().__init__()

    def start(self) -> bool:
        """Begin, or go on with, a run, offline where no server can be used; return False where W&B is disabled."""
        mode = self._set_up()
        if mode == "disabled":
            return False
        folder = self.output_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)  # wandb would turn to the system's temporary folder silently
        self.id = self.id or secrets.token_hex(4)
        self.earlier = read_segments(self.output_dir, self.id)
        self.is_offline = mode in ("offline", "dryrun")
        if not self.is_offline and (problem := self._start_online()):
            warn(f"{problem} Training goes on, and W&B's files are kept here until they can be sent.")
            self.is_offline = True
        if self.is_offline:
            self._start_offline()
        write_text(self.id_file, self.id)
        self._introduce()
        self._define_metrics()
        return True

    def _set_up(self) -> str:
        """Quieten wandb. Returns the mode that the environment and wandb's own settings ask for."""
        session = wandb.setup(settings=wandb.Settings(silent=True))
        listener = SimpleNamespace(info=lambda line: None, warning=self._look_for_end, error=self._look_for_end)
        wandb.termsetup(wandb.Settings(silent=True), listener)  # what it would print goes there
        return session.settings.mode

    def _look_for_end(self, line: str) -> None:
        self.has_given_up |= "Fatal error while uploading" in line

    def _start_online(self) -> str:
        """Start, or return why the server cannot be used now, and what would help."""
        if problem := log_in():
            return problem
        try:
            self._init("online")
        except Exception as error:
            self._tear_down()
            if "deleted" not in str(error) or not self.id_file.exists():
                return f"wandb could not start ({describe(error)})."
            warn(f"the run {self.id} was deleted in W&B: this training continues in a new one.")
            self.id_file.unlink()
            self.id, self.earlier = secrets.token_hex(4), []
            return self._start_online()
        self.last_step = max(0, self.tracker.starting_step - 1)
        # The server gets all rows that it lacks, those in earlier files too: `wandb sync` must not send them again.
        for segment in self._of_project():
            segment.synced_mark.touch()
        return ""

    def _of_project(self) -> list[Segment]:
        return [segment for segment in self.earlier if segment.project in ("", self.project)]

    def _start_offline(self) -> None:
        entity = self.init_kwargs.get("entity") or ""
        earlier = [segment for segment in self._of_project() if entity in ("", segment.entity or entity)]
        if any(not segment.is_offline and not segment.synced_mark.exists() for segment in earlier):
            old, self.id, earlier = self.id, secrets.token_hex(4), []
            warn(
                f"nobody can know now how much of the run {old} W&B's server has: this part goes to the new run "
                f"{self.id}, with all rows from the first step on."
            )
        self._init("offline")
        self.last_step = max((segment.last_step for segment in earlier), default=0)

    def _init(self, mode: str) -> None:
        self.tracker = wandb.init(
            project=self.project,
            **self.init_kwargs,
            dir=str(self.output_dir),
            id=self.id,
            mode=mode,
            resume="allow",
            settings=wandb.Settings(**SETTINGS),
        )

    def _tear_down(self) -> None:
        """Undo a start that failed: wandb's service would refuse the id."""
        try:
            in_time(wandb.teardown, TEARDOWN_TIMEOUT_S)
        except TimeoutError:
            raise RuntimeError("wandb's service does not end after a start that failed") from None
        self._set_up()
        files = {segment.file for segment in self.earlier}
        for file in (self.output_dir / "wandb").glob(f"*run-*-{self.id}/*.wandb"):
            if file not in files:
                shutil.rmtree(file.parent)

    @property
    def _file(self) -> Path:
        return Path(self.tracker.dir).parent / f"run-{self.id}.wandb"

    def _introduce(self) -> None:
        say(f"Wandb initialized: project={self.project}, name={self.tracker.name or self.id}")
        if self.is_offline:
            # The command sends the files of all starts, in the right order, each once.
            command = f"wandb sync {shlex.quote(str(self.output_dir / 'wandb'))}/offline-run-*-{self.id}"
            say(f"Wandb is offline: files in {self._file.parent}; upload later with: {command}")
        else:
            say(f"View run at: {self.tracker.url}")

    def _define_metrics(self) -> None:
        self.tracker.define_metric("step", hidden=True)
        for room in dict.fromkeys(key.partition("/")[0] for key in METRICS):
            self.tracker.define_metric(f"{room}/*", step_metric="step")
        for key, metric in METRICS.items():
            if metric.when == "epoch":
                self.tracker.define_metric(key, step_metric=EPOCH)
            elif metric.better:
                best = "min" if metric.better == "lower" else "max"
                self.tracker.define_metric(key, step_metric="step", summary=f"{best},last")

    def store_init_configuration(self, values: dict) -> None:
        """Show these settings and facts as the run's configuration."""
        self.tracker.config.update(values, allow_val_change=True)

    def log(self, values: dict, step: int | None = None) -> None:
        """Send a row under its own true step."""
        if step is not None:
            self.newest_step, values = step, {"step": step, **values}
        self.tracker.log(values, step=step)
        self._warn_if_given_up()

    def log_picture(self, path: Path, step: int, caption: str) -> None:
        """Send a picture; W&B takes nothing for a step it has, so that a late one goes with the next."""
        self.tracker.log({SAMPLES: wandb.Image(str(path), caption=caption)}, step=max(step, self.last_step + 1))

    def alert(self, title: str, text: str) -> None:
        self.tracker.alert(title=title[:63], text=text, level="WARN")

    def finish(self) -> None:
        """Send what is left, for a minute at most; with an exit code above 128 W&B calls the run preempted."""
        if self.exit_code > 128:
            self.tracker.mark_preempting()
        problem = ""
        try:
            in_time(lambda: self.tracker.finish(exit_code=self.exit_code), FINISH_TIMEOUT_S + 10)
        except TimeoutError:
            problem = f"W&B's server did not take everything within {FINISH_TIMEOUT_S} s"
        self._warn_if_given_up()
        if self.is_offline:
            # Its file alone shows whether something is missing: wandb itself says nothing about a full disk.
            deadline = time.monotonic() + FILE_TIMEOUT_S
            while (is_cut := read_segment(self._file).last_step < self.newest_step) and time.monotonic() < deadline:
                time.sleep(0.1)
            problem = f"{self._file} could not be written to its end (is the disk full?)" if is_cut else ""
        if problem:
            self._warn_incomplete(problem)
        elif not self.is_offline and not self.is_warned:
            Segment(self._file).synced_mark.touch()

    def _warn_if_given_up(self) -> None:
        if self.has_given_up and not self.is_offline:
            self._warn_incomplete("W&B's server refuses what is sent, and wandb has given up")

    def _warn_incomplete(self, problem: str) -> None:
        if not self.is_warned:
            warn(
                f"{problem}. Nothing is lost: {self.output_dir / METRICS_FILE} has every row. The same command with "
                "--resume auto, also after the last step, sends what W&B lacks."
            )
        self.is_warned = True


def read_segments(output_dir: Path, run_id: str) -> list[Segment]:
    """Return the segments of a run that a killed training may have left, oldest first, repaired for `wandb sync`.

    `wandb sync` stops at an empty or cut file, sends none of the later ones, and on the next try sends the rows before
    the cut once more. So what follows the last whole record is cut off, and an offline folder without one is removed.
    """
    found = []
    files = (output_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
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


def log_in() -> str:
    """Use the key that wandb finds, without asking the user; return why it or the server is of no use, or ""."""
    try:
        if wandb.login(verify=True, prompt=False):
            return ""
        return "wandb has no API key: run `wandb login` once, set WANDB_API_KEY, or set WANDB_MODE=offline."
    except (AuthenticationError, UsageError, ValueError) as error:
        if "did not respond in time" in str(error):
            return "W&B's server does not answer: check the network, or set WANDB_MODE=offline."
        return f"wandb cannot log in ({describe(error)}): run `wandb login`, or set WANDB_API_KEY."
