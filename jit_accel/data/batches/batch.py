"""The batches that loaders hand out, and how they become ready to be trained on."""

import math
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from jit_accel.base.errors import UserError
from jit_accel.data.batches.degradations import Degradation
from jit_accel.data.formats.columns import COLOUR, PixelFormat
from jit_accel.data.formats.numbers import Vectors

MAX_SUBSTITUTES = 100  # images drawn to stand in for one that is bad


@dataclass
class PixelBatch:
    """One micro-batch of one process as a loader reads it."""

    images: torch.Tensor  # (B, C + C', H, W) as `pixels` says; behind an image's C are those of its condition, if any
    labels: torch.Tensor  # int64 (B,), or (B, k) filled up by -1
    positions: np.ndarray  # int64 (B,): the images' numbers in the run, on which every random choice for them depends
    bad_images: list[str] = field(default_factory=list)  # "name: reason" of each that could not be decoded
    mirror: np.ndarray | None = None  # bool (B,): which images `ready` turns left to right
    vectors: torch.Tensor | None = None  # float32 (B, n): numbers, standardised
    pixels: PixelFormat = COLOUR

    def pin_memory(self) -> "PixelBatch":
        """Return the same batch in page-locked memory."""
        names = [name for name in ("images", "labels", "vectors") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass
class Batch:
    """One micro-batch of one process, ready to be trained on."""

    images: torch.Tensor  # float32 (B, C, H, W) in [-1, 1], on the device
    labels: torch.Tensor  # int64 (B,), or (B, k) filled up by -1, on the device
    positions: np.ndarray  # as in `PixelBatch`
    bad_images: list[str]
    condition: torch.Tensor | None  # float32 (B, C, H, W) in [-1, 1], on the device
    vectors: torch.Tensor | None  # float32 (B, n): numbers, standardised, on the device
    augmentation: torch.Tensor | None = None  # float32 (B, AUGMENT_SIZE), on the device
    kept_tokens: torch.Tensor | None = None  # int64 (K,), on the device: not led past the middle blocks


def arguments_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the arguments of the network besides the label, by name."""
    given = {"condition_image": batch.condition, "vectors": batch.vectors}
    given |= {"augmentation": batch.augmentation, "kept_tokens": batch.kept_tokens}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def ready(batch: PixelBatch, device: torch.device | str, degradation: Degradation | None = None) -> Batch:
    """Return the batch on `device`, mirrored and normalised: the only place where its pixels change.

    degradation: what makes conditions of its images, where none were read with them.
    """
    images = batch.images.to(device, non_blocking=True)
    if batch.mirror is not None and images.device.type != "cpu":
        chosen = torch.from_numpy(batch.mirror).to(device, non_blocking=True)
        images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)
    x = images.float()
    if batch.mirror is not None and x.device.type == "cpu":  # eight times as fast there as the other way
        for place in np.flatnonzero(batch.mirror):
            x[place] = x[place].flip(-1)
    labels = batch.labels.to(device, non_blocking=True)
    if batch.pixels.value_range is None:
        x = x.div_(127.5).sub_(1)
    else:
        low, high = batch.pixels.value_range
        x = ((x - low) * (2 / (high - low)) - 1).clamp_(-1, 1)
    condition, channels = None, batch.pixels.channels
    if x.shape[1] > channels:
        x, condition = x[:, :channels].contiguous(), x[:, channels:].contiguous()
    elif degradation:
        condition = degradation(x, batch.positions)
    vectors = None if batch.vectors is None else batch.vectors.to(device, non_blocking=True)
    return Batch(x, labels, batch.positions, batch.bad_images, condition, vectors)


def labels_in(facts: np.ndarray) -> torch.Tensor:
    """Return the labels, int64 (B,), or (B, k) of images that may have several, among what `Images.read` returns."""
    return torch.from_numpy(facts if facts.dtype.names is None else np.ascontiguousarray(facts["label"]))


def renumbered(labels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return labels with the class that `numbers` has for each; -1 stays."""
    found = numbers.to(labels.device)[labels]
    return found if labels.ndim == 1 else found.where(labels >= 0, -1)


def listed(labels: torch.Tensor) -> list:
    """Return labels as a call of a pipeline takes them: of images that may have several, a list of each, or None."""
    if labels.ndim == 1:
        return labels.tolist()
    return [[label for label in of_image if label >= 0] or None for of_image in labels.tolist()]


def vectors_in(facts: np.ndarray, vectors: Vectors | None) -> torch.Tensor | None:
    """Return the numbers among them, standardised, float32 (B, n); None where there are none."""
    return None if vectors is None else torch.from_numpy(vectors.standardised(facts["vectors"]))


def empty_batch(shape: tuple[int, ...], dtype: np.dtype = COLOUR.dtype) -> torch.Tensor:
    """Uninitialised memory for a batch; in a worker shared with the main process, which spares a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.from_numpy(_free_buffer(shape, dtype))
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as torch's default_collate does
    return torch.from_numpy(np.empty(0, dtype)).set_(storage).view(shape)


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_buffers: list[np.ndarray] = []
_MOST_BUFFERS = 4
(_WHEN_FREE,) = _references([np.empty(0)])  # versions of Python count differently


def _free_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory of a batch that nobody holds any more: new pages would cost as much as filling them."""
    for place, references in enumerate(_references(_buffers)):
        if references == _WHEN_FREE and (_buffers[place].shape, _buffers[place].dtype) == (shape, dtype):
            return _buffers[place]
    _buffers.append(np.empty(shape, dtype))
    del _buffers[:-_MOST_BUFFERS]
    return _buffers[-1]


def check_labels(labels: np.ndarray, num_classes: int | None) -> None:
    """Raise `UserError` for a label that is negative or not below `num_classes`, which streams show only when read."""
    largest = labels.max()
    if labels.ndim == 1 and labels.min() < 0:
        rule = "an image of the stream has no label, or a negative one; labels are 0, 1, 2, ...: remove such images or "
        raise UserError(rule + "choose another column.", about="label_column")
    if num_classes is not None and largest >= num_classes:
        rule = f"the data has the label {largest}; labels go from 0 to num_classes - 1: use --num_classes "
        raise UserError(rule + f"{largest + 1} or more.", about="num_classes", value=num_classes)
