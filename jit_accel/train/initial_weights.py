"""Trained weights to start from: those that fit are kept, and the others are named."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor

from jit_accel.base.errors import UserError
from jit_accel.config.facts import Start
from jit_accel.config.groups import TuneConfig
from jit_accel.config.presets import in_pixels, plain_size
from jit_accel.data.batches.batch import Batch, renumbered
from jit_accel.data.formats.source import Source
from jit_accel.model.loading import load_pipeline
from jit_accel.model.lora import Adapter, is_added
from jit_accel.model.pipeline import JiTPipeline
from jit_accel.model.transformer import JiTTransformer2DModel

LABELS = "y_embedder.embedding_table.weight"
PATCH_IN = "x_embedder.proj1.weight"
PATCH_OUT = ("final_layer.linear.weight", "final_layer.linear.bias")


@dataclass(frozen=True)
class Initial:
    """The weights that `--init_from` names with this path: a pipeline, float32 on the CPU."""

    path: str
    pipeline: JiTPipeline

    @property
    def network(self) -> JiTTransformer2DModel:
        return self.pipeline.transformer

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None where they have numbers only."""
        return real_names(self.pipeline.config.class_names)

    @property
    def start(self) -> Start:
        """The facts that complete the settings of a run that starts from these weights."""
        config = self.pipeline.config
        noise_scale, prediction = (config.objective[name] for name in ("noise_scale", "prediction_type"))
        return Start(self.path, self.network.config, noise_scale, prediction, config.guidance_scale)

    def rows_for(self, names: Sequence[str] | None, num_classes: int) -> list[int | None]:
        """Return the row of each class in the source's label table: by name, where both have names, else by number."""
        if names and self.class_names:
            known = [unicodedata.normalize("NFC", name) for name in self.class_names]
            row_of = {name: row for row, name in reversed(list(enumerate(known)))}
            rows = [row_of.get(unicodedata.normalize("NFC", name)) for name in names]
            return [*rows, *[None] * (num_classes - len(names))]
        if num_classes == self.network.config.num_classes:
            return list(range(num_classes))
        return [None] * num_classes

    def labels_for(self, source: Source) -> tuple[Tensor, list[str]]:
        """Return the source's class of each label, and their names; `UserError` if some are new to an adapter."""
        count, names = self.network.config.num_classes, names_of(source, self.class_names) or ()
        needed = max(source.num_classes or 0, len(source.class_names))
        rows = self.rows_for(names, count)[: len(names)] if self.class_names else []
        unknown = [name for name, row in zip(names, rows) if row is None]
        if needed > count or 0 < len(unknown) < len(rows):
            has, only = f"{needed} classes", f"{count}"
            if needed <= count:
                has, only = f"the classes {', '.join(unknown[:5])}", f"others ({', '.join(self.class_names[:5])}, ...)"
            rule = f"{source.name} has {has}, and {self.path} {only}: an adapter learns no new class: leave "
            remedy = "--lora_rank out to train all weights, or train on classes of the source."
            raise UserError(rule + remedy, about="lora_rank")
        labels = torch.arange(count)
        if rows and not unknown:
            labels[: len(rows)] = torch.tensor(rows)
            return labels, list(self.class_names)
        return labels, [*names, *(self.class_names or ())[len(names) :]]


@dataclass
class Transfer:
    """The fate of the source's tensors in a new network."""

    kept: dict[str, int] = field(default_factory=dict)  # name -> how many numbers of it
    new: dict[str, str] = field(default_factory=dict)  # name -> why
    resampled: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    added: set[str] = field(default_factory=set)  # parts for conditions that are new

    def in_words(self, path: str) -> str:
        """Return a line for each kind of fate."""
        lines = [f"From {path}: kept {len(self.kept)} tensors, {sum(self.kept.values()):,} parameters."]
        if self.resampled:
            lines.append(f"  resampled to the new patch size: {', '.join(self.resampled)}")
        lines += [f"  new: {name} ({why})" for name, why in self.new.items()]
        if self.dropped:
            lines.append(f"  dropped: {', '.join(self.dropped)}")
        return "\n".join(lines)


@torch.no_grad()
def transfer(
    initial: Initial, model: JiTTransformer2DModel, names: Sequence[str] | None, vectors: Sequence[str] = ()
) -> Transfer:
    """Copy into a fresh model, with these names of first classes and columns of numbers, all that fits."""
    done = Transfer()
    given, into = initial.network.state_dict(), model.state_dict()
    known, others = initial.pipeline.config.vectors, []
    if known and list(known["names"]) != list(vectors):  # perhaps as wide, but of other things
        others = [name for name in given if name.startswith("vector_embedder.")]
        given = {name: tensor for name, tensor in given.items() if name not in others}
    old, new = initial.network.config.patch_size, model.config.patch_size
    if old != new:
        resampled = resample_patches(given, old, new)
        done.resampled = [name for name, tensor in resampled.items() if tensor.shape == into[name].shape]
        given |= resampled
    # What augmentation adds to a network is nothing where there is none.
    given = {name: tensor for name, tensor in given.items() if name in into or not name.startswith("augment_embedder.")}
    done.dropped = [*others, *(name for name in given if name not in into)]
    for name, tensor in into.items():
        if name == LABELS and name in given:
            _transfer_labels(initial, tensor, given[name], names, done)
        elif name not in given:
            done.new[name] = "the source has none"
            done.added |= {name.partition(".")[0]} if is_added(name) else set()
        elif given[name].shape != tensor.shape:
            done.new[name] = f"{_shape(given[name])} in the source, {_shape(tensor)} here"
        else:
            tensor.copy_(given[name])
            done.kept[name] = tensor.numel()
    return done


def _transfer_labels(initial: Initial, table: Tensor, given: Tensor, names, done: Transfer) -> None:
    rows = initial.rows_for(names, len(table) - 1)
    kept = [(row, source) for row, source in enumerate([*rows, len(given) - 1]) if source is not None]
    into, sources = (torch.tensor(places) for places in zip(*kept))
    table[into] = given[sources]
    done.kept[LABELS] = len(kept) * table.shape[1]
    if fresh := [row for row, source in enumerate(rows) if source is None]:
        shown = ", ".join(names[row] if names and row < len(names) else str(row) for row in fresh[:5])
        more = f" and {len(fresh) - 5} more" if len(fresh) > 5 else ""
        done.new[f"{len(fresh)} of {len(rows)} rows of {LABELS}"] = f"classes the source does not have: {shown}{more}"
    if gone := len(given) - len({source for _, source in kept}):
        done.dropped.append(f"{gone} of {len(given)} rows of {LABELS}")


def resample_patches(tensors: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Return the layers that see patches of `old` pixels a side, for patches of `new` (FlexiViT, arXiv 2212.08013).

    With R the bilinear (antialiased) resizing of a patch, the last layer's output is resized, y' = R y, and the first
    layer gets the pseudo-inverse, so that it sees in a resized patch what it saw in the patch: w' R x = w x, exactly
    where the patches grow, in the sense of least squares where they shrink.
    """
    resize = F.interpolate(
        torch.eye(old, dtype=torch.float64)[None, None], size=(new, old), mode="bilinear", antialias=True
    )[0, 0]
    back = torch.linalg.pinv(resize).mT
    first = tensors[PATCH_IN].double()
    out = {PATCH_IN: torch.einsum("ip,jq,bcpq->bcij", back, back, first)}
    for name in PATCH_OUT:
        rows = tensors[name].double().unflatten(0, (old, old, -1))  # a patch's rows, columns, colours
        out[name] = torch.einsum("ip,jq,pq...->ij...", resize, resize, rows).flatten(0, 2)
    return {name: tensor.float() for name, tensor in out.items()}


@dataclass(frozen=True)
class Tuning:
    """The relation of a run to the weights that it starts from, if any."""

    class_names: Sequence[str]
    labels: Tensor | None = None  # the network's class of each label of the data, where these differ
    adapter: Adapter | None = None  # what alone is trained, on the weights at `path`
    path: str = ""
    notes: str = ""  # the fate of the weights, in words

    def labels_of(self, batch: Batch) -> Tensor:
        """Return labels, (B,) or (B, k), as the network knows them."""
        return batch.labels if self.labels is None else renumbered(batch.labels, self.labels)


def tune(
    model: JiTTransformer2DModel, settings: TuneConfig, noise_scale: float, source: Source, initial: Initial | None
) -> Tuning:
    """Give a fresh model the weights to start from, and an adapter if one is wanted; `UserError` if it cannot learn."""
    if initial is None:
        return Tuning(source.class_names)
    rank = settings.lora_rank
    vectors = source.vectors.names if source.vectors else ()
    done = transfer(initial, model, None if rank else names_of(source, initial.class_names), vectors)
    lines = done.in_words(initial.path).splitlines()
    old, new = initial.network.config, model.config
    after, before = (in_pixels(plain_size(config.img_size)) for config in (new, old))
    if after != before:
        lines.append(f"  {after} px instead of {before}: positions are computed, no weight depends on it")
    if (scale := initial.start.noise_scale) != noise_scale:
        lines.append(f"  --noise_scale {noise_scale:g} instead of {scale:g}")
    if old.in_context_start != new.in_context_start:
        lines.append(f"  in-context tokens from block {new.in_context_start} on instead of {old.in_context_start}")
    if rank is None:
        return Tuning(source.class_names, notes="\n".join(lines))
    refuse_what_an_adapter_cannot_learn(initial, done, model)
    labels, names = initial.labels_for(source)
    is_by_name = names and list(names) == list(initial.class_names or ())
    how = "by name" if is_by_name else "by number: the data's take the place of the source's first ones"
    lines.append(f"  classes go {how}")
    alpha, dropout, targets = settings.lora_alpha, settings.lora_dropout, settings.lora_targets
    how = {"alpha": alpha, "dropout": dropout, "targets": targets, "added": done.added}
    adapter = Adapter(model, rank=rank, **how)
    return Tuning(names, labels, adapter, initial.path, "\n".join(lines))


def read_initial(path: str) -> Initial:
    """Read the weights of a pipeline folder, a run, a checkpoint or a Hub id; `UserError` if they are not a JiT's."""
    if Path(path).expanduser().is_file():
        make = f"python -m jit_accel.convert --input {path} --output FOLDER"
        rule = f"is a file: make a pipeline folder of it first, {make}, and give that."
        raise UserError(rule, about="init_from", value=path)
    logging.disable_progress_bar()
    pipeline = load_pipeline(path, about="init_from")
    pipeline.transformer.requires_grad_(False)
    return Initial(path, pipeline)


def refuse_what_an_adapter_cannot_learn(initial: Initial, done: Transfer, model: JiTTransformer2DModel) -> None:
    """Raise `UserError` where weights that an adapter leaves frozen would be others than the source's."""
    old, new = initial.network.config, model.config
    misfits = [*done.resampled, *(name for name in done.new if not is_added(name)), *done.dropped]
    if old.in_context_start != new.in_context_start:
        misfits.append(f"in_context_start {old.in_context_start} against {new.in_context_start}")
    if misfits:
        rule = f"an adapter needs all of {initial.path} as it is, but this does not fit: {'; '.join(misfits)}: "
        known = initial.pipeline.config.vectors
        numbers = f", give --vector_column {' '.join(known['names'])}" if known else ""
        remedy = f"leave out --model and --num_classes{numbers}, or leave out --lora_rank to train all weights."
        raise UserError(rule + remedy, about="lora_rank")


def names_of(source: Source, known: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the classes' names of a data set; None where it has none, or nothing to tell apart.

    Numbers are names where those `known` are such in another order, as earlier versions sorted them.
    """
    if source.is_labelled and len(source.class_names) > 1 and set(source.class_names) == set(known or ()):
        return source.class_names
    return real_names(source.class_names) if source.is_labelled else None


def real_names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names, or None where they tell nothing: there is one class, or they are the numbers."""
    if not names or len(names) < 2 or all(name == str(i) for i, name in enumerate(names)):
        return None
    return tuple(names)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
