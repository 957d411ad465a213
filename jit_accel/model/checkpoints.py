"""Checkpoints that are whole or not there: written aside, synced to disk, sealed by a manifest, then renamed.

    checkpoints/step_00002000/
        model.safetensors  ema_<decay>.safetensors  optimizer.safetensors
        state.json         step, loader positions of every process, settings, data fingerprint
        manifest.json      names and sizes of the above, written last

No pickle is written or read. Tensors are saved whole, whatever the sharding, so the number of processes may
change between saving and loading.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.base.files import move, sync
from jit_accel.config.settings import SETTINGS

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT_VERSION = 1
# What must agree between a checkpoint and the run that continues it; everything else may change.
FIXED_SETTINGS = (
    *("model", "img_size", "num_classes", "prediction", "optimizer", "ema_decays", "seed"),
    *("image_column", "label_column", "holdout", "lora_rank", "lora_alpha", "lora_targets"),
)


class Checkpointer:
    """Saves and rotates the checkpoints of one output folder.

    Args:
        accelerator: all processes call `save` together; the main one writes.
        keep: how many of the newest stay.
    """

    def __init__(self, accelerator, output_dir: Path, keep: int):
        self.accelerator = accelerator
        self.folder = output_dir / "checkpoints"
        self.keep = keep

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> Path:
        """Write a checkpoint; when this returns, it is on disk under its final name.

        Args:
            tensors: file stem -> name -> tensor, on every process (sharded ones are gathered).
            state: JSON values, from the main process.

        Raises:
            UserError: on every process, where the disk does not take it.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = final.with_name(f"tmp_{final.name}")
        is_writer = self.accelerator.is_main_process
        problem = self.try_on_writer(partial(self._make_empty, temporary))
        for stem, named in tensors.items():
            whole = whole_tensors(named, keep=is_writer)
            problem = problem or self.try_on_writer(partial(save_file, whole, temporary / f"{stem}.safetensors"))
            del whole
        text = json.dumps({"format": FORMAT_VERSION, "step": step, **state}, indent=1)
        problem = problem or self.try_on_writer(partial(self._seal, text, temporary, final))
        (problem,) = broadcast_object_list([problem])
        if problem:
            found = complete_checkpoints(self.folder)
            good = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
            raise UserError(
                f"the checkpoint of step {step} cannot be written ({problem}): make "
                f"room or choose a smaller --keep_checkpoints, then go on with --resume auto; {good}.",
                about="output_dir",
                value=self.folder.parent,
            )
        return final

    def try_on_writer(self, write) -> str | None:
        """What stood in the way of writing on the main process, if anything; None on the others."""
        if self.accelerator.is_main_process:
            try:
                write()
            except (OSError, SafetensorError) as error:
                return str(error)
        return None

    def _make_empty(self, temporary: Path) -> None:
        for left_over in self.folder.glob("tmp_*"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)

    def _seal(self, state: str, temporary: Path, final: Path) -> None:
        (temporary / STATE).write_text(state)
        sizes = {}
        for file in sorted(temporary.iterdir()):
            sync(file)
            sizes[file.name] = file.stat().st_size
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
        """Rename later checkpoints, which a run that goes on from `step` leaves behind; on the main process.

        Otherwise the newest would not be this run's, and rotation would delete what it writes.
        """
        later = [path for path in complete_checkpoints(self.folder) if read_state(path)["step"] > step]
        for path in later:
            aside = path.with_name(f"abandoned_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            move(path, aside)
        return later


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means: None for `none`, and for `auto` where there is none.

    Raises:
        UserError: a path that holds no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = complete_checkpoints(output_dir / "checkpoints")
        return found[-1] if found else None
    path = Path(resume)
    if is_complete(path):
        return path
    for folder in (path, path / "checkpoints"):
        if found := complete_checkpoints(folder):
            return found[-1]
    raise UserError(
        f"holds no complete checkpoint (a folder step_… with a {MANIFEST}): give the path of "
        "one, or auto to continue where --output_dir left off, or none to start anew.",
        about="resume",
        value=resume,
    )


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if is_complete(path))


def is_complete(path: Path) -> bool:
    """Whether the manifest is there and every file it names has the size it names."""
    try:
        sizes = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def read_state(path: Path) -> dict:
    """What `save` was given as `state`, and the `step`.

    Raises:
        UserError: written by a newer version.
    """
    state = json.loads((path / STATE).read_text())
    if state["format"] > FORMAT_VERSION:
        raise UserError("was written by a newer jit_accel: update this one.", about="resume", value=path)
    return state


def refuse_other_run(path: Path, state: dict, settings: dict, data: str, fingerprint: str) -> None:
    """Raise `UserError` where a run with these settings and data cannot continue a checkpoint, naming each difference.

    Args:
        path, state: the checkpoint, and its `read_state`.
        data, fingerprint: the run's data in words, and what identifies it.
    """
    saved = {name: SETTINGS[name].default for name in FIXED_SETTINGS} | state["settings"]
    differences = [
        f"--{name} is {settings[name]}, the checkpoint has {saved[name]}"
        for name in FIXED_SETTINGS
        if settings[name] != saved[name]
    ]
    if state["fingerprint"] != fingerprint:
        differences.append(f"--data_path is {data}, the checkpoint has {state['data']}")
    if differences:
        raise UserError(
            f"belongs to another run: {'; '.join(differences)}. "
            "Give the settings it was made with, or another --output_dir to start anew.",
            about="resume",
            value=path,
        )


def load_tensors(path: Path, stem: str, into: dict[str, Tensor]) -> None:
    """Copy a file's tensors into these, in place; sharded ones take their share."""
    with safe_open(path / f"{stem}.safetensors", framework="pt") as file:
        stored = set(file.keys())
        assert stored == set(into), f"{path}/{stem}: {sorted(stored ^ set(into))[:5]} stand on one side only"
        with torch.no_grad():
            for name, tensor in into.items():
                tensor.copy_(_like(file.get_tensor(name), tensor))


def optimizer_tensors(model: torch.nn.Module, optimizers) -> dict[str, Tensor]:
    """The state of all optimizers as `<parameter>|<key>` -> tensor."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}|{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(path: Path, model: torch.nn.Module, optimizers) -> None:
    """Put back what `optimizer_tensors` gave, into optimizers that have not stepped yet."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    params = dict(model.named_parameters())
    with safe_open(path / "optimizer.safetensors", framework="pt") as file:
        for full_name in file.keys():  # noqa: SIM118 (not a dict)
            name, _, key = full_name.rpartition("|")
            p, value = params[name], file.get_tensor(full_name)
            # Step counts are scalars; they follow the device of their parameter, as fused AdamW wants it.
            owner[p].state[p][key] = _like(value, p) if value.shape == p.shape else value.to(p.device)


def whole_tensors(named: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor | None]:
    """Gather sharded tensors; all processes take part, those that `keep` get the values, on the CPU."""
    return {name: _whole(tensor, keep) for name, tensor in named.items()}


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous() if keep else None


def _like(value: Tensor, reference: Tensor) -> Tensor:
    if hasattr(reference, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value.to(reference.device)
