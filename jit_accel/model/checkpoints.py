"""Checkpoints that are whole or not there: written aside, synced to disk, sealed by a manifest, then renamed.

    checkpoints/step_00002000/
        model.safetensors  ema_<decay>.safetensors  optimizer.safetensors
        state.json         the step, and all parts that are no tensors: run (settings, data), feed, monitor, scaler
        manifest.json      names, sizes and checksums of the above, written last
        proven.json        once finite steps have followed

No pickle is written or read. Tensors are saved whole, whatever the sharding, so the number of processes may
change between saving and loading. A damaged checkpoint is not loaded, and nothing named `step_…` is deleted before
whole ones stand in its place.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError, message_of
from jit_accel.base.files import move, sync, write_json
from jit_accel.base.processes import on_main, whole_tensors
from jit_accel.model.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    damage_of,
    files_of,
    is_complete,
    write_manifest,
)
from jit_accel.model.tensor_files import Piece, Unsound, Written, stored_tensors, summed_file, write_tensors

T = TypeVar("T")
PROVEN = "proven.json"  # in a checkpoint's folder, and not sealed
NOT_FINITE = "not_finite"
DIVERGED = (
    "Lower --learning_rate, set --max_grad_norm 1, or use --mixed_precision bf16 or no, then go on with --resume auto."
)
# What diffusers, safetensors and torch raise for folders that are broken, cut off or of other sizes than they say.
BROKEN = (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError)


class Checkpointer:
    """Saves the checkpoints of one output folder; the main process writes.

    The newest `keep` stay, and the newest that is *proven*: finite steps have followed it.
    """

    def __init__(self, accelerator, output_dir: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, output_dir / "checkpoints", keep
        self.unproven: int | None = None  # the step of the newest checkpoint, until finite steps have followed

    def save(self, step: int, parts: Mapping[str, Stateful | None]) -> Path:
        """Write a checkpoint, all processes together; when this returns, it is on disk under its final name.

        The state of a part (None where this run has no such part) is tensors by name, which are gathered where they are
        sharded, or JSON values. Raises `UserError` on every process where the disk does not take it.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = final.with_name(f"tmp_{final.name}")
        self._write(step, partial(self._make_empty, temporary))
        values, files = {"format": FORMAT_VERSION, "step": step}, {}
        for name, part in parts.items():
            state = part.state_dict() if part else None
            if state and all(isinstance(value, Tensor) for value in state.values()):
                is_main = self.accelerator.is_main_process
                pieces = {
                    key: Piece.whole(value) for key, value in whole_tensors(state, keep=is_main).items() if is_main
                }
                file = f"{name}.safetensors"
                files[file] = self._write(step, partial(write_tensors, temporary / file, pieces))
                del pieces
            else:
                values[name] = state
        self._write(step, partial(self._seal, values, files, temporary, final))
        self.unproven = step
        return final

    def _write(self, step: int, write: Callable[[], T]) -> T:
        """Write something of a checkpoint on the main process. Raises `UserError` on all where that fails."""

        def attempt() -> T:
            found = newest_checkpoint(self.folder)
            good = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
            try:
                return write()
            except Unsound as error:
                rule = f"{error} after step {step}: training stopped and no checkpoint was overwritten; {good}."
                raise UserError(rule, remedy=DIVERGED) from None
            except OSError as error:
                raise UserError(
                    f"the checkpoint of step {step} cannot be written ({error}): make room or choose a smaller "
                    f"--keep_checkpoints, then go on with --resume auto; {good}.",
                    about="output_dir",
                    value=self.folder.parent,
                ) from None

        return on_main(self.accelerator, attempt)

    def _make_empty(self, temporary: Path) -> None:
        for left_over in self.folder.glob("tmp_*"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)

    def _seal(self, values: dict, files: dict[str, Written], temporary: Path, final: Path) -> None:
        with summed_file(temporary / STATE) as file:
            file.write(json.dumps(values, indent=1).encode())
        write_manifest(temporary, files | {STATE: file.written})
        sync(temporary)
        if is_complete(final):  # of this very step: a whole checkpoint is never touched
            shutil.rmtree(temporary)
            return
        if final.exists():
            set_aside(final)
        move(temporary, final)
        sync(final.parent)
        whole = complete_checkpoints(self.folder)
        proven = [path for path in whole if is_proven(path)]
        for old in whole[: -self.keep]:
            if old not in proven[-1:]:
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                doomed = old.with_name(f"tmp_old_{old.name}")
                move(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def prove(self, step: int) -> None:
        """Note that all steps to this one were finite, beside the newest checkpoint if it lies before."""
        if self.unproven is not None and self.unproven < step:
            path = self.folder / f"step_{self.unproven:08d}"
            if self.accelerator.is_main_process and path.is_dir():
                with contextlib.suppress(OSError):  # of a full disk, say; the next reading would note it as well
                    write_json(path / PROVEN, {"finite_to_step": step})
            self.unproven = None

    def distrust(self, resumed: int) -> Path | None:
        """Return the checkpoint to go on from when steps were not finite; the same on all processes.

        The unproven one that this start went on from, at the step `resumed`, is renamed where there is a proven one.
        """

        def judge() -> Path | None:
            whole = complete_checkpoints(self.folder)
            proven = [path for path in whole if is_proven(path)]
            if whole and proven and step_of(whole[-1]) == self.unproven == resumed and whole[-1] not in proven:
                with contextlib.suppress(OSError):
                    set_aside(whole.pop(), NOT_FINITE)
            return max(whole, default=None)

        return on_main(self.accelerator, judge)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename later checkpoints, which a run that goes on from `step` leaves behind; on the main process."""
        # Otherwise the newest would not be this run's, and rotation would delete what it writes.
        later = [path for path in complete_checkpoints(self.folder) if step_of(path) > step]
        for path in later:
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            move(path, aside)
        return later


def sound_checkpoint(accelerator, output_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` means, its content verified by all processes together.

    Damaged ones are passed over, each with a warning, where `resume` does not name one itself; with `auto` they are
    renamed too, once a sound one is found. Raises `UserError`: none is sound.
    """
    found, damages = on_main(accelerator, partial(_candidates, output_dir, resume)), {}
    for path in reversed(found):
        damage = _damage_found_by_all(accelerator, path)
        if damage is None:
            if accelerator.is_main_process:
                _pass_over(damages, path, is_renamed=resume == "auto")
            return path
        damages[path] = damage
    if not damages:
        return None
    listed = "; ".join(f"{path.name}: {damage}" for path, damage in damages.items())
    remedy = "Give another checkpoint, get this one again from where it is whole, or give another --output_dir"
    if resume == "auto":
        remedy = "Get one of them again from where it is whole, or give another --output_dir to start anew"
    raise UserError(
        f"no checkpoint there is whole ({listed}).",
        about="resume",
        value=resume,
        remedy=f"{remedy}; nothing was changed.",
    )


def _candidates(output_dir: Path, resume: str) -> list[Path]:
    """Return the checkpoints that `--resume` may mean, oldest first; with `auto` broken ones too."""
    if resume == "auto":
        return step_folders(output_dir / "checkpoints")
    if (found := find_checkpoint(output_dir, resume)) is None:
        return []
    return [found] if is_complete(Path(resume)) else complete_checkpoints(found.parent)


def _damage_found_by_all(accelerator, path: Path) -> str | None:
    """Return what is wrong with a checkpoint, whose content the processes divide among them."""
    ranks = accelerator.num_processes
    found = [damage_of(path, rank=accelerator.process_index if ranks > 1 else 0, ranks=ranks)]
    return next(filter(None, gather_object(found) if ranks > 1 else found), None)


def _pass_over(damages: Mapping[Path, str], taken: Path, is_renamed: bool) -> None:
    for path, damage in damages.items():
        renamed = f", and is now {set_aside(path).name}" if is_renamed else ""
        warn(f"the checkpoint {path} is damaged{renamed}: {damage}. {taken.name} is taken in its place.")
    for path in taken.parent.glob(f"step_*.{NOT_FINITE}"):
        if is_renamed and (step := step_of(path.with_suffix(""))) and step > step_of(taken):
            warn(f"the steps that followed {path} were not finite: {taken.name} is taken in its place.")


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint, so that nothing takes it for one, and nothing overwrites it; return its new path."""
    names = (path.with_name(f"{path.name}.{why}{number}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    move(path, aside)
    return aside


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """Return the checkpoint that `--resume` means by names and sizes: None for `none`, and for `auto` without any."""
    if resume == "none":
        return None
    if resume == "auto":
        return newest_checkpoint(output_dir / "checkpoints")
    path = Path(resume)
    if found := newest_checkpoint(path) or find_checkpoint_in(path):
        return found
    damage = f"; {damage_of(path)}" if step_of(path) is not None and path.is_dir() else ""
    rule = (
        f"holds no complete checkpoint (a folder step_… with a {MANIFEST}{damage}): give the path of one, or auto to "
    )
    raise UserError(rule + "continue where --output_dir left off, or none to start anew.", about="resume", value=resume)


def find_checkpoint_in(folder: Path) -> Path | None:
    """Return the folder itself if it is a checkpoint, else the newest of the run whose output folder it is.

    Of those, the ones whose manifest, state or sizes are damaged are named in a warning.
    """
    if is_complete(folder):
        return folder
    for path in reversed(step_folders(folder / "checkpoints")):
        if (damage := damage_of(path, parts=())) is None:
            return path
        warn(f"the checkpoint {path} is damaged and passed over: {damage}.")
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    return max(complete_checkpoints(folder), default=None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, by names and sizes, oldest first."""
    return [path for path in step_folders(folder) if is_complete(path)]


def step_folders(folder: Path) -> list[Path]:
    """Return what bears a checkpoint's name in `folder`, whole or not, oldest first."""
    return sorted((path for path in folder.glob("step_*") if step_of(path) is not None), key=step_of)


def is_proven(path: Path) -> bool:
    """Return True where finite steps have followed a checkpoint."""
    return (path / PROVEN).is_file()


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint; None for other names."""
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match[1]) if match else None


def load_parts(path: Path, parts: Mapping[str, Stateful | None]) -> int:
    """Let each part take its state from a checkpoint. Returns the step it was written at.

    A state is JSON values, or `StoredTensor`s by name, of which the part reads what this process holds. Raises
    `UserError`: the tensors are others than these parts have.
    """
    state = _read(path)
    for name, part in parts.items():
        if part is None:
            continue
        if name in state:
            if state[name] is not None:
                part.load_state_dict(state[name])
            continue
        try:
            part.load_state_dict(stored_tensors(files_of(path, name)))
        except BROKEN as error:
            raise UserError(
                f"{name} cannot be loaded ({message_of(error)}): it is damaged, or not of this network.",
                about="resume",
                value=path,
                remedy="Rename its folder, and --resume auto takes the checkpoint before it.",
            ) from None
    return state["step"]


def load_tensors(path: Path, part: str, about: str) -> dict[str, Tensor]:
    """Load the tensors of a part of a checkpoint whole, their content verified first.

    Raises `UserError` about the setting `about`.
    """
    damage = damage_of(path, parts=[part])
    try:
        if not damage:
            return {name: tensor.whole() for name, tensor in stored_tensors(files_of(path, part)).items()}
    except BROKEN as error:
        damage = f"{part} cannot be read ({message_of(error)})"
    raise UserError(f"is damaged and cannot be read: {damage}: give another checkpoint.", about=about, value=path)


def read_run(path: Path) -> dict:
    """Read the part `run` of a checkpoint: the run's `settings`, `class_names`, `data` and so on."""
    return _read(path)["run"]


def _read(path: Path) -> dict:
    """Read what is no tensors. Raises `UserError`: it is damaged, or of a newer format."""
    if damage := damage_of(path, parts=()):
        raise UserError(f"the checkpoint {path} is damaged: {damage}: give another.")
    state = json.loads((path / STATE).read_bytes())
    if state["format"] > FORMAT_VERSION:
        raise UserError(f"the checkpoint {path} was written by a newer jit_accel: update this one.")
    if state["format"] == 1:  # its parts run and feed were not named
        parts = {name: state.pop(name, None) for name in ("format", "step", "monitor", "scaler")}
        feed = {name: state.pop(name) for name in ("loaders", "bad_images")}
        if parts["monitor"] is None:
            images_seen = parts["step"] * state["global_batch_size"]
            parts["monitor"] = {"epochs": {"images_seen": images_seen}, "health": None}
        state = {**parts, "feed": feed, "run": state}
    return state
