"""Checkpoints that are whole or not there: written aside, synced to disk, sealed by a manifest, then renamed.

    checkpoints/step_00002000/
        model.safetensors  ema_<decay>.safetensors  optimizer.safetensors
        state.json         the step, and all parts that are no tensors: run (settings, data), feed, monitor, scaler
        manifest.json      names and sizes of the above, written last

No pickle is written or read. Tensors are saved whole, whatever the sharding, so the number of processes may
change between saving and loading.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from jit_accel.base.errors import UserError
from jit_accel.base.files import move, sync
from jit_accel.base.processes import on_main, whole_tensors

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 2


class Checkpointer:
    """Saves the checkpoints of one output folder, of which the newest `keep` stay; the main process writes."""

    def __init__(self, accelerator, output_dir: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, output_dir / "checkpoints", keep

    def save(self, step: int, parts: Mapping[str, Stateful | None]) -> Path:
        """Write a checkpoint, all processes together; when this returns, it is on disk under its final name.

        The state of a part (None where this run has no such part) is tensors by name, which are gathered where they are
        sharded, or JSON values. Raises `UserError` on every process where the disk does not take it.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = final.with_name(f"tmp_{final.name}")
        self._write(step, partial(self._make_empty, temporary))
        values = {"format": FORMAT_VERSION, "step": step}
        for name, part in parts.items():
            state = part.state_dict() if part else None
            if state and all(isinstance(value, Tensor) for value in state.values()):
                whole = whole_tensors(state, keep=self.accelerator.is_main_process)
                self._write(step, partial(save_file, whole, temporary / f"{name}.safetensors"))
                del whole
            else:
                values[name] = state
        self._write(step, partial(self._seal, values, temporary, final))
        return final

    def _write(self, step: int, write: Callable[[], object]) -> None:
        """Write something of a checkpoint on the main process. Raises `UserError` on all where that fails."""

        def attempt() -> None:
            try:
                write()
            except (OSError, SafetensorError) as error:
                found = newest_checkpoint(self.folder)
                good = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
                raise UserError(
                    f"the checkpoint of step {step} cannot be written ({error}): make room or choose a smaller "
                    f"--keep_checkpoints, then go on with --resume auto; {good}.",
                    about="output_dir",
                    value=self.folder.parent,
                ) from None

        on_main(self.accelerator, attempt)

    def _make_empty(self, temporary: Path) -> None:
        for left_over in self.folder.glob("tmp_*"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)

    def _seal(self, values: dict, temporary: Path, final: Path) -> None:
        (temporary / STATE).write_text(json.dumps(values, indent=1))
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        for name in sizes:
            sync(temporary / name)
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({"format": FORMAT_VERSION, "files": sizes}, indent=1))
        sync(manifest)
        sync(temporary)
        if is_complete(final):  # of this very step: a whole checkpoint is never touched
            shutil.rmtree(temporary)
            return
        shutil.rmtree(final, ignore_errors=True)
        move(temporary, final)
        sync(final.parent)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(f"tmp_old_{old.name}")
            move(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename later checkpoints, which a run that goes on from `step` leaves behind; on the main process."""
        # Otherwise the newest would not be this run's, and rotation would delete what it writes.
        later = [path for path in complete_checkpoints(self.folder) if _read(path)["step"] > step]
        for path in later:
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            move(path, aside)
        return later


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` means: None for `none`, and for `auto` where there is none."""
    if resume == "none":
        return None
    if resume == "auto":
        return newest_checkpoint(output_dir / "checkpoints")
    if found := newest_checkpoint(Path(resume)) or find_checkpoint_in(Path(resume)):
        return found
    rule = f"holds no complete checkpoint (a folder step_… with a {MANIFEST}): give the path of one, or auto to "
    raise UserError(rule + "continue where --output_dir left off, or none to start anew.", about="resume", value=resume)


def find_checkpoint_in(folder: Path) -> Path | None:
    """Return the folder itself if it is a checkpoint, else the newest of the run whose output folder it is."""
    return folder if is_complete(folder) else newest_checkpoint(folder / "checkpoints")


def newest_checkpoint(folder: Path) -> Path | None:
    return max(complete_checkpoints(folder), default=None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if is_complete(path))


def is_complete(path: Path) -> bool:
    """Return True where the manifest is there and every file it names has the size it names."""
    try:
        sizes = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def load_parts(path: Path, parts: Mapping[str, Stateful | None]) -> int:
    """Let each part take its state from a checkpoint. Returns the step it was written at."""
    state = _read(path)
    for name, part in parts.items():
        if part is None:
            continue
        if name not in state:
            part.load_state_dict(load_tensors(path / f"{name}.safetensors"))
        elif state[name] is not None:
            part.load_state_dict(state[name])
    return state["step"]


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Load a file of a checkpoint; where Accelerate had wrapped the network for torch.compile, without its prefix."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in load_file(file).items()}


def read_run(path: Path) -> dict:
    """Read the part `run` of a checkpoint: the run's `settings`, `class_names`, `data` and so on."""
    return _read(path)["run"]


def _read(path: Path) -> dict:
    state = json.loads((path / STATE).read_text())
    if state["format"] > FORMAT_VERSION:
        raise UserError("was written by a newer jit_accel: update this one.", about="resume", value=path)
    if state["format"] == 1:  # its parts run and feed were not named
        parts = {name: state.pop(name, None) for name in ("format", "step", "monitor", "scaler")}
        feed = {name: state.pop(name) for name in ("loaders", "bad_images")}
        if parts["monitor"] is None:
            images_seen = parts["step"] * state["global_batch_size"]
            parts["monitor"] = {"epochs": {"images_seen": images_seen}, "health": None}
        state = {**parts, "feed": feed, "run": state}
    return state
