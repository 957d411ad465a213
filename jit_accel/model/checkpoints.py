"""Checkpoints that are whole or not there: found, looked at and loaded. `Checkpointer` writes them.

    checkpoints/step_00002000/
        model.safetensors  ema_<decay>.safetensors  optimizer.safetensors
        state.json         the step, and all parts that are no tensors: run (settings, data), feed, monitor, scaler
        manifest.json      names, sizes and checksums of the above, written last
        proven.json        once finite steps have followed

Of several processes each writes what it holds, in files of its own (`model-00001-of-00008.safetensors`), and reads what
it needs, whatever the number of processes and the sharding at the time of writing. No pickle is written or read. A
damaged checkpoint is not loaded, and nothing named `step_…` is deleted before whole ones stand in its place.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError, message_of
from jit_accel.base.files import move
from jit_accel.base.processes import on_main
from jit_accel.model.manifest import FORMAT_VERSION, MANIFEST, STATE, damage_of, files_of, is_complete
from jit_accel.model.tensor_files import stored_tensors

PROVEN = "proven.json"  # in a checkpoint's folder, and not sealed
NOT_FINITE = "not_finite"
# What diffusers, safetensors and torch raise for folders that are broken, cut off or of other sizes than they say.
BROKEN = (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError)


def sound_checkpoint(accelerator, output_dir: Path, resume: str, *, may_rename: bool = True) -> Path | None:
    """Return the checkpoint that `--resume` means, its content verified by all processes together.

    Damaged ones are passed over, each with a warning, where `resume` does not name one itself; with `auto` they are
    renamed too, once a sound one is found, if that is allowed. Raises `UserError`: none is sound.
    """
    found, damages = on_main(accelerator, partial(_candidates, output_dir, resume)), {}
    for path in reversed(found):
        damage = _damage_found_by_all(accelerator, path)
        if damage is None:
            if accelerator.is_main_process:
                _pass_over(damages, path, is_renamed=may_rename and resume == "auto")
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
        renamed = ""
        with contextlib.suppress(OSError):  # a folder that cannot be written to
            renamed = f", and is now {set_aside(path).name}" if is_renamed else ""
        warn(f"the checkpoint {path} is damaged{renamed}: {damage}. {taken.name} is taken in its place.")
    for path in taken.parent.glob(f"step_*.{NOT_FINITE}"):
        if (step_of(path.with_suffix("")) or 0) > (step_of(taken) or math.inf):
            warn(f"the steps that followed {path} were not finite: {taken.name} is taken in its place.")


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint, so that nothing takes it for one, and nothing overwrites it; return its new path."""
    names = (path.with_name(f"{path.name}.{why}{number}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(name for name in names if not os.path.lexists(name))
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
    """Return what bears a checkpoint's name in `folder`, whole or not, oldest first.

    Raises `UserError` where the folder is there and cannot be read: it may hold some.
    """
    try:
        found = [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"the checkpoints in {folder} cannot be read ({error.strerror}): make them readable.") from None
    return sorted((path for path in found if step_of(path) is not None), key=step_of)


def is_proven(path: Path) -> bool:
    """Return True where finite steps have followed a checkpoint."""
    return (path / PROVEN).is_file()


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint; None for other names."""
    match = re.fullmatch(r"step_(\d+)", path.name)
    return int(match[1]) if match else None


@contextlib.contextmanager
def named_damage(path: Path, about: str | None, what: str = "it") -> Iterator[None]:
    """Raise what a broken checkpoint makes of the block as a `UserError` about the setting that names it."""
    try:
        yield
    except BROKEN as error:
        rule = f"{what} cannot be loaded ({message_of(error)}): it is damaged, or not of this network; give another."
        remedy = "Where its folder is renamed, --resume auto takes the one before it."
        raise UserError(rule, about=about, value=path, remedy=remedy if about == "resume" else None) from None


def load_parts(path: Path, parts: Mapping[str, Stateful | None]) -> int:
    """Let each part take its state from a checkpoint. Returns the step it was written at.

    A state is JSON values, or `StoredTensor`s by name, of which the part reads what this process holds. Raises
    `UserError`: it is another one than these parts have.
    """
    state = _read(path)
    for name, part in parts.items():
        with named_damage(path, "resume", name):
            if part and name not in state:
                part.load_state_dict(stored_tensors(files_of(path, name)))
            elif part and state[name] is not None:
                part.load_state_dict(state[name])
    return state["step"]


def load_tensors(path: Path, part: str, about: str) -> dict[str, Tensor]:
    """Load the tensors of a part of a checkpoint whole, their content verified first.

    Raises `UserError` about the setting `about`.
    """
    if damage := damage_of(path, parts=[part]):
        raise UserError(f"is damaged and cannot be read: {damage}: give another.", about=about, value=path)
    with named_damage(path, about, part):
        return {name: tensor.whole() for name, tensor in stored_tensors(files_of(path, part)).items()}


def read_run(path: Path) -> dict:
    """Read the part `run` of a checkpoint: the run's `settings`, `class_names`, `data` and so on."""
    with named_damage(path, None, f"{STATE} of {path}"):
        return _read(path)["run"]


def _read(path: Path) -> dict:
    """Read what is no tensors. Raises `UserError`: it is damaged, or of a newer format."""
    if damage := damage_of(path, parts=()):
        raise UserError(f"the checkpoint {path} is damaged: {damage}: give another.")
    try:
        state = json.loads((path / STATE).read_bytes())
        if state["format"] > FORMAT_VERSION:
            raise UserError(f"the checkpoint {path} was written by a newer jit_accel: update this one.")
        state = _with_named_parts(state) if state["format"] == 1 else state
        return state | {"step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {STATE} ({message_of(error)}): give another.") from None


def _with_named_parts(state: dict) -> dict:
    """Return the state of the first format, whose parts run and feed were not named, as that of the second."""
    parts = {name: state.pop(name, None) for name in ("format", "step", "monitor", "scaler")}
    feed = {name: state.pop(name) for name in ("loaders", "bad_images")}
    if parts["monitor"] is None:
        images_seen = parts["step"] * state["global_batch_size"]
        parts["monitor"] = {"epochs": {"images_seen": images_seen}, "health": None}
    return {**parts, "feed": feed, "run": state}
