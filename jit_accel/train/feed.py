"""The data of a run: opened, fed to its steps, and held out for a loss that it is not trained on."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from jit_accel.base.console import warn
from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.base.processes import on_all
from jit_accel.base.spans import span
from jit_accel.config.groups import STREAMING, ConditionConfig, DataConfig, TechniqueConfig
from jit_accel.config.presets import Size, grid_of
from jit_accel.data.batches.augmentation import Augmentation
from jit_accel.data.batches.batch import Batch, ready
from jit_accel.data.batches.degradations import degradation_of
from jit_accel.data.batches.holdout import HeldOut, held_by_split, split_holdout
from jit_accel.data.batches.ready_batches import WaitTime, batches, waiting_advice
from jit_accel.data.batches.token_routing import TokenRouting
from jit_accel.data.batches.workers import cores_per_process, worker_memory_gib
from jit_accel.data.formats.numbers import Vectors
from jit_accel.data.formats.source import in_class_order, standardised_as
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.data.reading.splits import ALL, have_common
from jit_accel.monitor.metric_table import WAIT_FRACTION, WORKER_MEMORY
from jit_accel.monitor.metrics import of_each_process

log = logging.getLogger(__name__)

SETTINGS_OF_BATCHES = ("img_size", "num_workers", "horizontal_flip", "crop", "shuffle_buffer", "lanes")
MIN_DRAWS = 256  # of the validation: one time and noise an image say little when there are few


def open_data(
    data: DataConfig,
    condition: ConditionConfig,
    *,
    img_size: Size,
    in_channels: int,
    val_images: int,
    accelerator: Accelerator,
    given: Source | None = None,
    begun: Mapping[str, Any] = MappingProxyType({}),
    standards: Mapping | None = None,
) -> tuple[Source, HeldOut | None]:
    """Open the images to train on, unless given, and those held out; all processes get the same, or a `UserError`.

    begun: the checkpoint that the run goes on from, with the order of its classes, `class_names`, and the `fingerprint`
    of its images, which are all splits where they are not those of `data`: earlier versions knew fewer splits.
    standards: the columns of numbers of the weights to start from; the run's own come first.
    """
    names = ("data_format", "image_column", "label_column", "renumber_labels", "vector_column")
    names += ("raw_shape", "raw_dtype", "label_separator")
    standards = Vectors.of_record(begun.get("vectors") or standards)
    how = {name: getattr(data, name) for name in names}
    for name in ("condition_path", "condition_column"):
        how[name] = getattr(condition, name)
        if given and how[name] is not None:
            rule = "the images were opened before: open them with their conditions."
            raise UserError(rule, about=name, value=how[name])
    how |= {"in_channels": in_channels, "value_range": data.value_range}
    if given:
        refuse_other_pixels(given, in_channels, data.value_range)
    open_split = partial(open_images, data.data_path, streaming=STREAMING[data.streaming], **how)

    def open_as_begun() -> tuple[Source, HeldOut | None]:
        found = open_and_hold(data.split)
        if begun and found[0].fingerprint != begun["fingerprint"] and not (given or data.split):
            with contextlib.suppress(UserError):
                whole = open_and_hold(ALL)
                if whole[0].fingerprint == begun["fingerprint"]:
                    log.warning("--data_path %s: all splits are taken, with which the run began", data.data_path)
                    return whole
        return found

    def open_and_hold(split: str | None) -> tuple[Source, HeldOut | None]:
        source = in_class_order(given or open_split(split=split), begun.get("class_names") or ())
        source = standardised_as(source, standards)
        if not data.holdout:
            return source, None
        part = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        part |= {"max_images": val_images, "img_size": img_size}
        if isinstance(data.holdout, float):
            return split_holdout(source, data.holdout, **part)
        for is_wrong, rule in (
            (given, "names a split, and the images were opened before: give a share of them."),
            (have_common(data.split, data.holdout), "is trained on (--split): name another split, or a share."),
        ):
            if is_wrong:
                raise UserError(rule, about="holdout", value=data.holdout)
        with renamed_settings(split="holdout"):
            return source, held_by_split(source, open_split(split=data.holdout), **part)

    source, held_out = on_all(accelerator, open_as_begun, in_turn=True)
    counts = gather_object([len(held_out.keys) if held_out else 0])
    if held_out and not sum(counts):
        if accelerator.is_main_process:
            warn("no image of the holdout can be read, or none was found: there is no val/loss.")
        held_out = None
    refuse_other_images(data, source)
    return source, held_out


def refuse_other_pixels(given: Source, in_channels: int, value_range: tuple[float, float] | None) -> None:
    """Raise `UserError` where images that were opened before have other channels, or another range, than is asked."""
    pixels = given.pixels
    if pixels.channels != in_channels:
        rule = f"the images were opened before, with {pixels.channels}: give the same, or open them with in_channels."
        raise UserError(rule, about="in_channels", value=in_channels)
    if value_range not in (None, pixels.value_range):
        rule = "the images were opened before, with another: open them with value_range, and leave it out here."
        raise UserError(rule, about="value_range", value=value_range)


def refuse_other_images(data: DataConfig, source: Source) -> None:
    """Raise `UserError` where the processes do not find the same images; all together."""
    found = gather_object([(source.num_images, source.fingerprint)])
    if other := next((rank for rank, finding in enumerate(found) if finding != found[0]), None):
        trained = ", ".join(f"process {n} trains on {found[n][0]:,} ({found[n][1][:8]})" for n in (0, other))
        about, value = ("holdout", data.holdout) if data.holdout else ("data_path", data.data_path)
        raise UserError(
            f"the processes do not find the same images ({trained}): make sure that all machines have the same files "
            "and can read all of them, then start again.",
            about=about,
            value=value,
        )


class Feed:
    """The images of one process of a run, on its device; `how` are arguments of `batches` that `data` does not have.

    sizes: the network's, its `config`.
    """

    def __init__(
        self,
        data: DataConfig,
        condition_from: str | None,
        source: Source,
        accelerator: Accelerator,
        technique: TechniqueConfig,
        sizes: FrozenDict,
        **how,
    ):
        self.techniques: list[Callable[[Batch], Batch]] = []
        if technique.augment:
            self.techniques.append(Augmentation(technique.augment, how["seed"]))
        if technique.token_routing:
            count = math.prod(grid_of(data.img_size, sizes.patch_size))
            self.techniques.append(TokenRouting(technique.token_routing, count, how["seed"]))
        self.data, self.source, self.accelerator = data, source, accelerator
        how |= {name: getattr(data, name) for name in SETTINGS_OF_BATCHES}
        rank, world_size = accelerator.process_index, accelerator.num_processes
        how |= {
            "condition_from": condition_from,
            "num_classes": sizes.num_classes,
            "rank": rank,
            "world_size": world_size,
        }
        self.loader = batches(source, device=accelerator.device, **how)
        self.wait_time = WaitTime(accelerator.device)
        self.bad_images: dict[str, None] = {}  # in the order of their discovery

    @span("fetch")
    def next(self) -> Batch:
        """Return the next images of this process, on its device; `UserError` if its own share of the data is bad."""
        try:
            batch = self.wait_time.next(self.loader)
        except UserError as error:
            error.everywhere = False
            raise
        self.bad_images.update(dict.fromkeys(batch.bad_images))
        for technique in self.techniques:
            batch = technique(batch)
        return batch

    def close(self) -> None:
        """End the workers."""
        self.loader.close()

    def all_bad_images(self) -> list[str]:
        """Return the broken images of all processes, which call this together."""
        return list(dict.fromkeys(gather_object(list(self.bad_images))))

    def too_many_bad(self, count: int, seen: int) -> UserError | None:
        """Return the error of more broken images among those `seen` than are allowed; all processes together."""
        allowed = self.data.max_bad_images
        if count <= allowed * seen:
            return None
        first = "; ".join(self.all_bad_images()[:3])
        return UserError(
            f"{count} images cannot be decoded, more than that share; the first: {first}.",
            about="max_bad_images",
            value=f"{allowed:g}",
            remedy="Repair or remove them, or raise the share; the run is saved and goes on with --resume auto.",
        )

    def counters(self) -> list[float]:
        """Return what `read_counters` wants of every process, to be averaged over them."""
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        waited_s = of_each_process(self.wait_time.seconds, process, count)
        return [float(len(self.bad_images)), *waited_s]  # the slowest gates all

    def read_counters(self, means: list[float], steps: int) -> tuple[int, dict[str, float]]:
        """Return the number of broken images, and metrics of the last `steps` steps, from averaged `counters()`."""
        bad_images, *waited_s = means
        measured = {}
        if steps:
            measured[WAIT_FRACTION] = self.wait_time.end_interval(steps, max(waited_s))
            if (memory_gib := worker_memory_gib()) is not None:
                measured[WORKER_MEMORY] = memory_gib
        return round(bad_images * self.accelerator.num_processes), measured

    def lost_lately(self) -> tuple[float | None, str | None]:
        """Return the share of the time that was lost to waiting, and what helps; None where it is too early to say."""
        share = self.wait_time.lost_lately()
        if share is None:
            return None, None
        advice = waiting_advice(
            self.data.data_path,
            num_workers=self.data.num_workers,
            cores=cores_per_process(),
            is_remote=getattr(self.source.images, "is_remote", False),
            is_encoded=self.source.is_encoded,
            is_prepared=self.source.format == "prepared",
            has_conditions=self.source.condition_channels > 0,
            crop=self.data.crop,
        )
        return share, advice

    def state_dict(self) -> dict:
        """Return the place of the next images, and the broken ones of all processes, which call this together."""
        return {
            "loaders": [self.loader.state_dict()],  # a list, because streams had a state for each process
            "bad_images": gather_object([list(self.bad_images)]),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where any number of processes were; `UserError` if these had another seed or way of reading."""
        self.loader.load_state_dict(state["loaders"])
        by_process = state["bad_images"]
        if len(by_process) == self.accelerator.num_processes:
            self.bad_images = dict.fromkeys(by_process[self.accelerator.process_index])
        elif self.accelerator.is_main_process:
            self.bad_images = dict.fromkeys(name for names in by_process for name in names)


class Validation:
    """Mean loss over the held-out images of all processes.

    Noise and time follow from each image's content, so the loss does not depend on the number of processes, on the
    batch size, or on which files lie beside it.
    """

    seed = 0  # whatever the run's seed: runs are compared by this loss

    def __init__(self, held_out: HeldOut, accelerator, batch_size: int, condition_from: str | None = None):
        self.degradation = condition_from and degradation_of(condition_from, self.seed)
        self.held_out, self.accelerator, self.batch_size = held_out, accelerator, batch_size
        mine = torch.tensor([len(held_out.keys)], device=accelerator.device)
        counts = accelerator.gather(mine)
        self.num_images, self.most = int(counts.sum()), int(counts.max())
        self.draws = max(1, MIN_DRAWS // max(1, self.num_images))
        self.passes = 2 * self.most * self.draws  # with the weights, and with their average

    def batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield (batch, weights): equally many on every process, since a sharded network needs all for each forward.

        Where a process has fewer images it goes on with its first ones, at weight 0; one without any has a grey one.
        """
        held, count = self.held_out.or_grey(), len(self.held_out.keys)
        for start in range(0, self.most * self.draws, self.batch_size):
            numbers = torch.arange(start, min(start + self.batch_size, self.most * self.draws))
            draws, places = numbers // self.most, numbers % self.most
            weights = (places < count).float()
            batch = held.batch(places % len(held.keys), draws)
            yield ready(batch, self.accelerator.device, self.degradation), weights

    @torch.no_grad()
    def loss(self, loss_of: Callable[[Batch], Tensor]) -> Tensor:
        """Return the mean, on the device, the same on all processes, of the losses of batches, float32 (B,)."""
        total = torch.zeros((), device=self.accelerator.device)
        for batch, weights in self.batches():
            total += (loss_of(batch) * weights.to(total.device)).sum()
        return self.accelerator.reduce(total, "sum") / (self.num_images * self.draws)
