"""A training as a run of Weights & Biases: online, or offline where its server cannot be used.

`metrics.jsonl` has every row, so whatever W&B lacks up to the step where a training starts is sent from there, and
rows that it has are not sent again: its curves have no gap and no step twice, however a training was interrupted.
"""

import contextlib
import importlib
import math
import os
import secrets
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import wandb
from accelerate.tracking import GeneralTracker
from wandb.errors import AuthenticationError, UsageError

from jit_accel.base.console import say, warn
from jit_accel.base.files import write_text
from jit_accel.monitor.log import METRICS_FILE, URL_FILE
from jit_accel.monitor.metric_table import EPOCH, METRICS, SAMPLES, SAMPLES_OF_CLASS, TIME
from jit_accel.monitor.trackers import FINISH_TIMEOUT_S, describe, in_time
from jit_accel.monitor.wandb_files import Segment, read_segment, read_segments

ID_FILE = "wandb_run_id.txt"
# The training waits at most this long for a server that does not answer: for the check of the key (wandb's own ten
# seconds, or WANDB_HTTP_TIMEOUT), for the start, and at the end for what is left to send.
START_TIMEOUT_S = 20
TEARDOWN_TIMEOUT_S = 5
# For an artifact a second more for each of so many bytes.
UPLOAD_BYTES_PER_S = 1_000_000
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
    "x_save_requirements": False,
    "program": "jit_accel.train",  # not where it lies
    "x_transaction_log_flush_interval": 2,  # seconds of rows that a kill costs the local file
}


class WandbTracker(GeneralTracker):
    """A run of W&B, begun or continued; Accelerate's own tracker needs a server, and begins a new run at each start.

    `output_dir` remembers the run, and holds its files below `wandb`, unless WANDB_DIR is set; `init_kwargs` go to
    `wandb.init`. WANDB_RUN_ID and WANDB_RESUME count, and in a trial of a sweep its agent's project. `tracker` is
    wandb's run, and `last_step` the newest step that W&B has of earlier starts: it takes no row before that.
    """

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, project: str, output_dir: Path, **init_kwargs):
        self.project, self.output_dir, self.init_kwargs, self.tracker = project, output_dir, init_kwargs, None
        self.folder = Path(os.environ.get("WANDB_DIR") or output_dir, "wandb").absolute()
        self.id_file = output_dir / ID_FILE
        self.id = self.id_file.read_text().strip() if self.id_file.exists() else ""
        self.last_step, self.newest_step, self.exit_code = 0, 0, 1
        self.newest_time: float | None = None  # of the newest step
        self.model: wandb.Artifact | None = None
        self.is_offline = self.is_warned = self.has_given_up = False
        super().__init__()

    def start(self) -> bool:
        """Begin, or go on with, a run, offline where no server can be used; return False where W&B is disabled."""
        asked = self.asked = self._set_up()
        if asked.mode == "disabled":
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(b"0" * 4096)  # wandb would turn to the system's temporary folder silently
        own, self.id = self.id, asked.run_id or self.id or secrets.token_hex(4)
        if asked.sweep_id:  # wandb takes project, entity and id from the agent alone
            self.project = asked.project or self.project
        self.earlier = read_segments(self.folder, self.id)
        self.is_offline = asked.mode in ("offline", "dryrun")
        if not self.is_offline and (problem := self._start_online()):
            warn(f"{problem} Training goes on, and W&B's files are kept here until they can be sent.")
            self.is_offline = True
        if self.is_offline:
            self._start_offline()
        if self.last_step and self.id == asked.run_id != own:
            warn(
                f"WANDB_RUN_ID={self.id} is a run that has steps up to {self.last_step:,} already, of which this "
                f"folder knows nothing: they stay, and the new ones up to there are in {METRICS_FILE} alone. For a "
                "curve of its own give another id, or none."
            )
        write_text(self.id_file, self.id)
        self._introduce()
        self._define_metrics()
        return True

    def _set_up(self) -> wandb.Settings:
        """Quieten wandb. Returns what the environment and wandb's own files ask for."""
        with contextlib.suppress(ImportError, AttributeError):  # of a later wandb
            # It would send tracebacks, and wait for itself for ever where the service does not start.
            importlib.import_module("wandb.analytics.opentelemetry.opentelemetry_proxy").disable()
        session = wandb.setup(settings=wandb.Settings(silent=True))
        listener = SimpleNamespace(info=lambda line: None, warning=self._look_for_end, error=self._look_for_end)
        wandb.termsetup(wandb.Settings(silent=True), listener)  # what it would print goes there
        return session.settings

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
            if "deleted" not in str(error) or not self.id_file.exists() or self.asked.run_id:
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
        is_unknown = any(not segment.is_offline and not segment.synced_mark.exists() for segment in earlier)
        if is_unknown and self.asked.run_id:
            warn(
                f"nobody can know now how much of the run {self.id} W&B's server has, and WANDB_RUN_ID allows no other "
                f"run: its curve may lack rows there, which {METRICS_FILE} has."
            )
        elif is_unknown:
            old, self.id, earlier = self.id, secrets.token_hex(4), []
            (self.output_dir / URL_FILE).unlink(missing_ok=True)
            warn(
                f"nobody can know now how much of the run {old} W&B's server has: this part goes to the new run "
                f"{self.id}, with all rows from the first step on."
            )
        self._init("offline")
        self.last_step = max((segment.last_step for segment in earlier), default=0)

    def _init(self, mode: str) -> None:
        while list(self.folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{self.id}")):
            time.sleep(0.05)  # wandb would put -1 behind a second folder of this second, which no command then finds
        self.tracker = wandb.init(
            project=self.project,
            **self.init_kwargs,
            dir=str(self.folder.parent),
            id=self.id,
            mode=mode,
            resume=self.asked.resume or "allow",
            settings=wandb.Settings(**SETTINGS, host=os.environ.get("WANDB_HOST", "")),
        )
        self.id, self.project = self.tracker.id, self.tracker.project

    def _tear_down(self) -> None:
        """Undo a start that failed: wandb's service would refuse the id."""
        try:
            in_time(wandb.teardown, TEARDOWN_TIMEOUT_S)
        except TimeoutError:
            raise RuntimeError("wandb's service does not end after a start that failed") from None
        self._set_up()
        files = {segment.file for segment in self.earlier}
        for file in self.folder.glob(f"*run-*-{self.id}/*.wandb"):
            if file not in files:
                shutil.rmtree(file.parent)

    @property
    def _file(self) -> Path:
        return Path(self.tracker.dir).parent / f"run-{self.id}.wandb"

    def _introduce(self) -> None:
        say(f"Wandb initialized: project={self.project}, name={self.tracker.name or self.id}")
        if self.is_offline:
            # The command sends the files of all starts, in the right order, each once.
            command = f"wandb sync {shlex.quote(str(self.folder))}/offline-run-*-{self.id}"
            say(f"Wandb is offline: files in {self._file.parent}; upload later with: {command}")
        else:
            say(f"View run at: {self.tracker.url}")
            (self.output_dir / URL_FILE).write_text(f"{self.tracker.url}\n")

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
        """Send a row under its own true step and time."""
        if step is not None:
            values = {"step": step, **values}
            self.newest_time = values.pop(TIME, self.newest_time if step == self.newest_step else None)
            self.newest_step = step
        self._send(values, step)
        self._warn_if_given_up()

    def _send(self, values: dict, step: int | None) -> None:
        """Send values of a step, which keeps the time of its row whenever they come; wandb would take that of now."""
        if step == self.newest_step and self.newest_time:
            values = values | {"_timestamp": self.newest_time}
        self.tracker.log(values, step=step)

    def log_picture(self, path: Path, step: int, caption: str) -> None:
        """Send a picture; W&B takes nothing for a step it has, so that a late one goes with the next."""
        self._send({SAMPLES: wandb.Image(str(path), caption=caption)}, max(step, self.last_step + 1))

    def log_class_images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Send images, uint8 (n, H, W, 3), of each class as a list."""
        # As files: wandb would put arrays into a folder of its own, which is cleaned away in long trainings.
        with tempfile.TemporaryDirectory() as folder:
            lists = {}
            for number, (name, of) in enumerate(images.items()):
                files = [Path(folder, f"{number}_{i}.png") for i in range(len(of))]
                for file, pixels in zip(files, of):
                    PIL.Image.fromarray(pixels).save(file)
                lists[SAMPLES_OF_CLASS.format(name=name)] = [wandb.Image(str(file)) for file in files]
            self._send(lists, max(step, self.last_step + 1))

    def log_histograms(self, found: dict[str, list[float]], step: int) -> None:
        """Send what `histograms_of` has counted; values that are not finite have no histogram."""
        histograms = {}
        for name, (low, high, *counts) in found.items():
            if math.isfinite(low) and math.isfinite(high) and step > self.last_step:
                edges = np.linspace(low, max(high, low + 1e-6 * (abs(low) or 1)), len(counts) + 1)
                histograms[name] = wandb.Histogram(np_histogram=(np.array(counts, int), edges))
        if histograms:
            self._send(histograms, step)

    def log_model(self, folder: Path, step: int, aliases: list[str]) -> None:
        """Send a folder as the run's model; `finish` waits for it."""
        artifact = wandb.Artifact(f"model-{self.id}", "model", metadata={"step": step})
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)  # no copies on this disk
        self.model = self.tracker.log_artifact(artifact, aliases=aliases)

    def alert(self, title: str, text: str) -> None:
        self.tracker.alert(title=title[:63], text=text, level="WARN")

    def finish(self) -> None:
        """Send what is left, for a minute at most; with an exit code above 128 W&B calls the run preempted."""
        problem = ""
        try:
            if self.model and not self.is_offline:
                self.model.wait(FINISH_TIMEOUT_S + self.model.size // UPLOAD_BYTES_PER_S)
        except Exception as error:
            problem = f"W&B's server did not take the pipeline ({describe(error)})"
        try:
            if self.exit_code > 128:
                self.tracker.mark_preempting()
            in_time(lambda: self.tracker.finish(exit_code=self.exit_code), FINISH_TIMEOUT_S + 10)
        except TimeoutError:
            problem = f"W&B's server did not take everything within {FINISH_TIMEOUT_S} s"
        except Exception as error:
            self.warn_incomplete(f"wandb failed to finish ({describe(error)})")
            with contextlib.suppress(Exception):  # a service that is gone would be a traceback at the exit
                in_time(wandb.teardown, TEARDOWN_TIMEOUT_S)
            return
        self._warn_if_given_up()
        if self.is_offline:
            # Its file alone shows whether something is missing: wandb itself says nothing about a full disk.
            deadline = time.monotonic() + FILE_TIMEOUT_S
            while (is_cut := read_segment(self._file).last_step < self.newest_step) and time.monotonic() < deadline:
                time.sleep(0.1)
            problem = f"{self._file} could not be written to its end (is the disk full?)" if is_cut else ""
        if problem:
            self.warn_incomplete(problem)
        elif not self.is_offline and not self.is_warned:
            Segment(self._file).synced_mark.touch()

    def _warn_if_given_up(self) -> None:
        if self.has_given_up and not self.is_offline:
            self.warn_incomplete("W&B's server refuses what is sent, and wandb has given up")

    def warn_incomplete(self, problem: str) -> None:
        """Say, once, that W&B lacks something, and how it gets it."""
        if not self.is_warned:
            warn(
                f"{problem}. Nothing is lost: {self.output_dir / METRICS_FILE} has every row. The same command with "
                "--resume auto, also after the last step, sends what W&B lacks."
            )
        self.is_warned = True


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
