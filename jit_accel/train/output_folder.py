"""The folder of a run: which one it is, and that it holds nobody else's work."""

import hashlib
import itertools
import os
import re
import tempfile
from functools import partial
from pathlib import Path

from jit_accel.base.console import say
from jit_accel.base.errors import UserError
from jit_accel.base.folder_lock import locked
from jit_accel.model.checkpoints import step_folders
from jit_accel.model.loading import PIPELINE_FOLDER
from jit_accel.monitor.log import METRICS_FILE
from jit_accel.train.results import read_record

# Locked files and their descriptors, by the folder that this process trains into.
_claims: dict[Path, tuple[Path, int | None]] = {}


def choose_folder(first: Path, resume: str, experiment: str) -> Path:
    """Return the folder of a run without a name: `first`, or the same with -2 and so on behind it.

    With `--resume auto` that is the newest of the same experiment, else the first that holds no run and that no other
    process has claimed. Writes nothing there.
    """
    numbered = {1: first}
    for path in first.parent.glob(f"{first.name}-*"):
        if number := re.fullmatch(r"-([1-9]\d*)", path.name.removeprefix(first.name)):
            numbered[int(number[1])] = path
    taken = {number: path for number, path in sorted(numbered.items()) if held(path)}
    if resume == "auto":
        ours = [path for path in taken.values() if read_record(path).get("experiment") == experiment]
    else:
        ours = [path for path in taken.values() if continues(path, resume)]
    if ours:
        return ours[-1]
    named = ((n, first if n == 1 else first.with_name(f"{first.name}-{n}")) for n in itertools.count(1))
    number, folder = next((n, path) for n, path in named if n not in taken and claim(path))
    if number > 1 and os.environ.get("RANK", "0") == "0":
        other = list(taken.values() or [first])[-1]
        say(
            f"{other} holds another run, so this one goes to {folder} (--output_dir {other} --resume auto would go on "
            "with that one)."
        )
    return folder


def claim(folder: Path) -> bool:
    """Let no other run of this machine choose a folder, until `release` or the end of this process.

    Returns False where another process has claimed it. Only the main process of a run claims.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _claims or os.environ.get("RANK", "0") != "0":
        return True
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"jit_accel-{name}.lock")
    try:
        _claims[folder] = path, locked(path)
    except BlockingIOError:
        return False
    except OSError:  # another user's, say
        return True
    return True


def release(folder: Path) -> None:
    """End this process's claim of a folder, if it has one."""
    path, descriptor = _claims.pop(Path(os.path.realpath(folder)), (None, None))
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def held(folder: Path) -> list[Path]:
    """Return what is in a folder of an earlier run: metrics, results, checkpoints, broken ones too."""
    return [
        *(path for path in folder.glob(METRICS_FILE) if path.stat().st_size),
        *folder.glob(f"{PIPELINE_FOLDER}/model_index.json"),
        *step_folders(folder / "checkpoints"),
    ]


def continues(folder: Path, resume: str) -> bool:
    """Return True where `--resume` goes on with the run in this folder."""
    resumed = Path(resume).resolve()
    return resume == "auto" or (resume != "none" and Path(os.path.realpath(folder)) in (resumed, *resumed.parents))


def check_output_dir(folder: Path, resume: str, data_path: str) -> None:
    """Make sure that the run can write, and that it overwrites nobody's work.

    Raises `UserError`: not writable, the folder of the images, or it holds another run.
    """
    refused = partial(UserError, about="output_dir", value=folder)
    if os.path.realpath(folder) == os.path.realpath(os.path.expanduser(data_path)):
        raise refused("is the folder of the images, among which the run's own would come: give another, as runs/first.")
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if (found := held(folder)) and not continues(folder, resume):
            raise refused(
                f"holds another run ({found[-1].relative_to(folder)}): add --resume auto to continue it, or give "
                "another folder (or --wandb_name, which names it)."
            )
        if not existing.is_dir():
            raise refused(f"{existing} is not a folder that can be written to: give another.")
        # The folder itself is made where training begins, after all that may be refused.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:  # a name that is too long, say
        raise refused(f"cannot be written to ({error.strerror}): give another.") from None
