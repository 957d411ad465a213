"""The kinds of `--input`, and what each holds: weights, sizes, settings; pickles are read and never run."""

import argparse
import contextlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, serialization

from jit_accel.base.errors import UserError, nearest
from jit_accel.config.groups import UNAVERAGED, width_name
from jit_accel.convert.diffusers_layout import (
    joined_qkv,
    network_folder,
    reference_name,
    stated_beside,
    weight_files,
)
from jit_accel.convert.sizes import from_arguments, from_pipeline
from jit_accel.model.card import weights_in_words
from jit_accel.model.loading import (
    BROKEN,
    averages_of,
    find_checkpoint_in,
    find_pipeline_in,
    load_pipeline,
)
from jit_accel.model.manifest import MANIFEST
from jit_accel.model.pipeline import JiTPipeline

# The reference's keys, and what they are called here; its decays.
REFERENCE_SETS = {"model": UNAVERAGED, "model_ema1": "ema1", "model_ema2": "ema2", "state_dict": UNAVERAGED}
REFERENCE_DECAYS = {"ema1": "0.9999", "ema2": "0.9996"}
# Parts of names that wrappers have put in: the reference's Denoiser, DDP, torch.compile, a pipeline.
WRAPPERS = {"net", "module", "_orig_mod", "transformer"}
ONE_SET = "holds one set of weights only: leave the flag out, or give the output folder of a run, or a .pth."
TELLTALE = "x_embedder.proj1.weight"
POSITIONS = "pos_embed"
# Besides tensors and plain containers, which `weights_only` allows. A Namespace only holds attributes.
ALLOWED = [argparse.Namespace]
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
# Words of torch's errors, and what they mean to the user; `{}` is what the pattern found.
_REASONS = (
    (
        # As in "Unsupported global: GLOBAL posix.system was not an allowed global by default"
        r"GLOBAL:? ([\w.]+)",
        "refused, and nothing of it was run: its pickle asks for `{}`, where only tensors, containers and "
        "argparse.Namespace are allowed. A file that asks for more can run any code: get it from its author as "
        ".safetensors, or as a .pth of tensors and plain values.",
    ),
    ("TorchScript()", "is a TorchScript program, not a checkpoint: give the .pth that the training wrote."),
    (
        r"legacy \.tar format()",
        "refused: the tar format of torch 0.1 cannot be read safely; save it anew with a later torch.",
    ),
    (
        r"(?:WeightsUnpickler error:\s*|(?=Unsupported))(.{0,120})",
        "refused, and nothing of it was run: it is no pickle of tensors and plain values as torch.save writes it ({}).",
    ),
    (
        r"\A\s*(.{0,160})",
        "cannot be read as a file of torch.save; it is broken, cut off or something else ({}): get it again.",
    ),
)


@dataclass
class Input:
    """Opened weights, one set of them.

    path: the file or folder itself (of a run, its pipeline or checkpoint), None for the Hub. weights: by the network's
    parameter names. set_name: in words. stated: sizes and settings that the input itself names; they may be wrong where
    others wrote it. positions: the fixed position table, where the weights hold one. facts: for the model card.
    """

    path: Path | None
    weights: dict[str, Tensor]
    set_name: str
    stated: dict
    positions: Tensor | None = None
    epoch: int | None = None
    facts: dict[str, object] = field(default_factory=dict)


def open_input(place: str, wanted: str | None, ema_width: float | None = None) -> Input:
    """Open what `--input` names; `wanted` is `--weights`, and None takes ema1, or the only set there is.

    ema_width: of an average to make in place of these; of a run, or its checkpoint.

    Raises `UserError`: nothing is there, it is refused or broken, or has no such weights.
    """
    path = Path(place).expanduser()
    if ema_width is not None:
        return open_width(place, path, ema_width)
    if path.is_file():
        return open_checkpoint(path, wanted)
    if path.exists() and not path.is_dir():
        raise _refusal(place, "is neither a file nor a folder.")
    if not path.exists() and (path.suffix.lower() in FILE_SUFFIXES or place.count("/") != 1):
        rule = "there is no such file or folder: give a checkpoint (.pth), a .safetensors file, a pipeline folder, the "
        raise _refusal(place, rule + "output folder of a run, or owner/name of the Hub.")
    folder = path
    if not path.exists():
        with contextlib.suppress(*BROKEN):  # of which `load_pipeline` has more to say
            folder = Path(JiTPipeline.download(place))
    if network := network_folder(folder):
        return open_network(network, wanted)
    return open_pipeline(place, path, wanted)


def _refusal(place: str | Path, rule: str, about: str = "input") -> UserError:
    return UserError(rule, about=about, value=place)


def open_checkpoint(path: Path, wanted: str | None) -> Input:
    """Open a `.pth` of the reference, any plain state dict of its names, or a `.safetensors` file."""
    try:
        with path.open("rb") as file:
            start = file.read(23)
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror}): check the file and its disk.") from None
    if start == b"version https://git-lfs":
        raise _refusal(path, "is only a Git LFS pointer: fetch the file itself with `git lfs pull`.")
    if (path.parent / MANIFEST).is_file() and re.search(r"-\d+-of-\d+\.safetensors$", path.name):
        raise _refusal(path, f"is what one of several processes wrote of a checkpoint: give its folder, {path.parent}.")
    # Safetensors begin with eight bytes of length, then JSON.
    is_safe = path.suffix.lower() == ".safetensors" or start[8:9] == b"{"
    content = read_safetensors(path) if is_safe else read_pickle(path)
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    content = content if isinstance(content, Mapping) else {}
    parts = {UNAVERAGED: content} if is_state_dict(content) else content
    sets = {}
    for key, value in parts.items():
        if isinstance(value, Mapping) and is_state_dict(value):
            sets.setdefault(REFERENCE_SETS.get(key, str(key)), value)
    if not sets:
        looked = f"found {found or 'nothing'}; looked for {TELLTALE}, with or without net. before it"
        raise _refusal(path, f"holds no weights of a JiT ({looked}).")
    given = content.get("args")
    given = vars(given) if isinstance(given, argparse.Namespace) else given
    arguments = given if isinstance(given, Mapping) else {}
    known = {name: str(arguments.get(f"ema_decay{name[3:]}", decay)) for name, decay in REFERENCE_DECAYS.items()}
    decays = {name: known.get(name, name) for name in sets}
    if wanted is None and len(sets) > 1 and "ema1" not in sets:
        raise UserError(f"{path} has no ema1, but {', '.join(sets)}: choose one with --weights.", about="weights")
    name = choose(path, decays, wanted or ("ema1" if "ema1" in sets else next(iter(sets))))
    weights, positions = plain_names(path, sets[name])
    arguments = stated_beside(path.parent) | arguments
    if positions is None:  # the table is the same for all sets
        positions = next((table for other in sets.values() if (table := plain_names(path, other)[1]) is not None), None)
    epoch = content.get("epoch")
    epoch = epoch if isinstance(epoch, int) and not isinstance(epoch, bool) else None
    facts = {"epochs trained": epoch + 1} if epoch is not None and "optimizer" in content else {}
    return Input(path, weights, _with_decay(name, decays[name]), from_arguments(arguments), positions, epoch, facts)


def choose(path: Path, decays: Mapping[str, str], wanted: str) -> str:
    """Return the set of weights that `--weights` means by its name or its decay; others have their name for a decay."""
    for name, decay in decays.items():
        if wanted in (name, decay):
            return name
    there = ", ".join(_with_decay(*pair) for pair in decays.items())
    raise _refusal(wanted, f"{path} has {there}.{nearest(wanted, decays)}", "weights")


def _with_decay(name: str, decay: str) -> str:
    return name if name == decay else f"{name} (decay {decay})"


def open_pipeline(place: str, folder: Path, wanted: str | None) -> Input:
    """Open a pipeline folder, a run, one of its checkpoints, or a pipeline of the Hub.

    ema1 and ema2 are the reference's decays where a run kept both, else its first and second.
    """
    exported = find_pipeline_in(folder) if wanted is None else None
    checkpoint = None if exported else find_checkpoint_in(folder)
    average, set_name = None, "the pipeline's"
    if checkpoint:
        averages, theirs = averages_of(checkpoint), set(REFERENCE_DECAYS.values())
        named = {f"ema{i}": average for i, average in enumerate(averages, 1)}
        if theirs <= set(averages):
            named = REFERENCE_DECAYS | {average: average for average in averages if average not in theirs}
        named = {UNAVERAGED: UNAVERAGED, **named}
        average = named[choose(checkpoint, named, wanted or averages[0])]
        set_name = average if average == UNAVERAGED else f"average of decay {average}"
    elif wanted is not None:
        raise _refusal(wanted, f"{place} {ONE_SET}", "weights")
    pipeline = load_pipeline(place, average, about="input")
    dtype = stored_dtype(exported) if exported else torch.float32  # diffusers has made all of it float32
    weights = {name: tensor.to(dtype) for name, tensor in pipeline.transformer.state_dict().items()}
    return Input(exported or checkpoint, weights, set_name, from_pipeline(pipeline))


def open_width(place: str, folder: Path, ema_width: float) -> Input:
    """Open a run, or one of its checkpoints, with an average of this width, which is made of those stored."""
    if folder.is_file():
        rule = f"is made of what a run stored, and {place} is a file: give the output folder of a run."
        raise _refusal(f"{ema_width:g}", rule, "ema_width")
    pipeline = load_pipeline(place, about="input", ema_width=ema_width)
    set_name, weights = weights_in_words(width_name(ema_width)), pipeline.transformer.state_dict()
    return Input(find_checkpoint_in(folder), dict(weights), set_name, from_pipeline(pipeline))


def open_network(folder: Path, wanted: str | None) -> Input:
    """Open a network as diffusers saves it: a folder of its `config.json` and its weights, in one file or several."""
    if wanted is not None:
        raise _refusal(wanted, f"{folder} {ONE_SET}", "weights")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        content = next(iter(read_safetensors(file).values())) if file.suffix == ".safetensors" else read_pickle(file)
        tensors |= content if isinstance(content, Mapping) else {}
    weights, positions = plain_names(folder, tensors)
    return Input(folder, weights, "the folder's", from_arguments(stated_beside(folder)), positions)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the type of the weights in a pipeline folder."""
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                return file.get_tensor(name).dtype
    return torch.float32


def plain_name(name: str) -> str:
    return reference_name(".".join(part for part in name.split(".") if part not in WRAPPERS))


def is_state_dict(content: Mapping) -> bool:
    return any(
        isinstance(name, str) and isinstance(value, Tensor) and plain_name(name) == TELLTALE
        for name, value in content.items()
    )


def plain_names(path: Path, state_dict: Mapping) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the weights under the network's own names, and the fixed position table if it is among them.

    Raises `UserError`: what is no floating-point tensor, or two names that are the same one here.
    """
    weights: dict[str, Tensor] = {}
    for full_name, tensor in state_dict.items():
        name = plain_name(str(full_name))
        if name.endswith(("freqs_cos", "freqs_sin")):  # rotary tables follow from the sizes
            continue
        if name in weights:
            raise _refusal(path, f"{full_name} is there twice, under different prefixes.")
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.layout} {tensor.device.type} {tensor.dtype}" if is_tensor else type(tensor).__name__
            raise _refusal(path, f"{full_name} is no plain floating-point tensor but {kind}.")
        weights[name] = tensor.detach()
    positions = weights.pop(POSITIONS, None)
    return joined_qkv(weights), positions


def read_safetensors(path: Path) -> dict[str, dict]:
    """Return weights and arguments as the reference's checkpoints hold them; the metadata of ours names both."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise _refusal(path, f"cannot be read as safetensors ({error}): get it again.") from None
    try:
        arguments = json.loads(metadata.get("config", "{}")) | json.loads(metadata.get("pipeline", "{}"))
    except (ValueError, TypeError):
        arguments = {}
    return {metadata.get("weights") or UNAVERAGED: tensors, "args": arguments}


def read_pickle(path: Path) -> object:
    """Return what `torch.save` put into the file; tensors on the CPU, mapped into memory where the format permits it.

    Raises `UserError`: it is broken, no file of `torch.save`, or asks for more than tensors, containers and
    `argparse.Namespace`, of which nothing is run then.
    """
    try:
        with only_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is said by `reason_of`
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except Exception as error:  # a made-up file can make the reader fail in any way
        raise _refusal(path, reason_of(error)) from None


@contextlib.contextmanager
def only_allowed() -> Iterator[None]:
    """Inside, `weights_only` allows what torch itself does and `ALLOWED`; not what other libraries have added."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    try:
        with serialization.safe_globals(ALLOWED):
            yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def can_be_mapped(path: Path) -> bool:
    """Return whether the file is a zip archive of stored, not compressed, entries; others cannot be mapped."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    return False


def reason_of(error: Exception) -> str:
    """Return why a file was not read, and what to do, from torch's many words."""
    text = str(error) or type(error).__name__
    return next(meaning.format(match[1]) for pattern, meaning in _REASONS if (match := re.search(pattern, text)))
