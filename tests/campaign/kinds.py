"""The trainings that the campaign disturbs, and what each leaves where nobody disturbs it."""

import itertools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from helpers import Group, as_parquet, clothes

STEPS, GLOBAL_BATCH = 36, 8
SAVE_EVERY, SAMPLE_EVERY = 3, 12
FLAGS = (
    *("--max_steps", str(STEPS), "--save_every_steps", str(SAVE_EVERY), "--sample_every_steps", str(SAMPLE_EVERY)),
    *("--holdout", "0.2", "--val_every_steps", str(SAMPLE_EVERY), "--log_every_steps", "2", "--resume", "auto"),
    *("--gradient_accumulation_steps", "1", "--learning_rate", "1e-4", "--ema_decays", "0.5", "0.9", "auto"),
    *("--num_inference_steps", "1", "--guidance_scale", "1", "--no_horizontal_flip"),
)


@dataclass(frozen=True)
class Layout:
    """So many processes; those of FSDP2 share their weights, all of them or so many `shards` a copy (HSDP)."""

    name: str
    processes: int
    shards: int = 0  # 0: each has the whole weights (DDP)

    @property
    def environment(self) -> dict[str, str]:
        sharded = {"TEST_FSDP2_PRECISION": "no"} if self.shards else {}
        return sharded | ({"TEST_SHARDS": str(self.shards)} if 0 < self.shards < self.processes else {})


DDP_1, DDP_2, DDP_4 = Layout("DDP 1", 1), Layout("DDP 2", 2), Layout("DDP 4", 4)
FSDP2, FSDP2_4, HSDP = Layout("FSDP2 2", 2, 2), Layout("FSDP2 4", 4, 4), Layout("HSDP 2 x 2", 4, 2)
LAYOUTS = (DDP_1, DDP_2, DDP_4, FSDP2, HSDP)
# What a training may go on with where its number of processes changes.
OTHERS = {
    DDP_1: (DDP_2, DDP_4),
    DDP_2: (DDP_1, DDP_4),
    DDP_4: (DDP_1, DDP_2),
    FSDP2: (FSDP2_4, DDP_1),
    HSDP: (FSDP2, DDP_2),
}


@dataclass(frozen=True)
class Kind:
    """One kind of training: how it is divided, what steps it takes, what it reads."""

    layout: Layout
    optimizer: str
    data: str

    @property
    def name(self) -> str:
        return f"{self.layout.name}, {self.optimizer}, {self.data}"

    @property
    def folder_name(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "")

    def of(self, layout: Layout) -> "Kind":
        return replace(self, layout=layout)

    def flags(self, data: Path, output: Path, is_begun: bool = False) -> list[str]:
        batch = ("--batch_size", str(GLOBAL_BATCH // self.layout.processes), "--optimizer", self.optimizer)
        lanes = () if is_begun or self.data == "folder" else ("--lanes", "4")  # by default they follow the processes
        return [*FLAGS, *batch, *lanes, "--data_path", str(data / self.data), "--output_dir", str(output)]


KINDS = tuple(Kind(*parts) for parts in itertools.product(LAYOUTS, ("adamw", "muon"), ("folder", "parquet")))


def make_data(folder: Path) -> Path:
    """Make the same pictures as a folder and as Parquet, which is read as a stream."""
    as_parquet(clothes(folder / "folder"), folder / "parquet", num_shards=4)
    return folder


def begin(kind: Kind, data: Path, output: Path, notes: Path, log: Path, workers=0, launched=False) -> Group:
    """Start the processes of a training, or their launcher; they note in a folder which images they take."""
    notes.mkdir(parents=True, exist_ok=True)
    environment = {"TEST_SETUP": "campaign.inside:prepare", "TEST_IMAGES_FOLDER": str(notes)} | kind.layout.environment
    flags = [*kind.flags(data, output, (output / "checkpoints").is_dir()), "--num_workers", str(workers)]
    if not launched:
        return Group(flags, log, kind.layout.processes, environment)
    started = json.dumps({"count": kind.layout.processes, "environment": environment, "log": str(log)})
    return Group(flags, log, 1, {"TEST_MAIN": "campaign.inside:launch", "TEST_LAUNCHED": started})


def reference(kind: Kind, work: Path) -> Path:
    """Return the folder of an undisturbed training: `run`, `notes` and `log.txt`; it is made where it is missing."""
    folder = work / "reference" / kind.folder_name
    if not folder.exists():
        trial = folder.with_name(f"{folder.name}.{os.getpid()}")
        group = begin(kind, work / "data", trial / "run", trial / "notes", trial / "log.txt")
        codes = group.wait(300)
        assert codes == [0] * len(codes), group.output()
        if not folder.exists():  # nor made by another process meanwhile
            trial.rename(folder)
    return folder
