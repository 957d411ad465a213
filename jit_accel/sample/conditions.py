"""The pictures that a network is shown beside the noise, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.data.batches.degradations import grey
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.model.pipeline import JiTPipeline


@dataclass(frozen=True)
class Conditions:
    """Pictures of a data set; image number n of a class, or of none, shows the n-th, and they come round again."""

    source: Source
    size: tuple[int, int]  # height and width in pixels, to which they are cropped
    channels: int
    names: list[str] = field(default_factory=list)  # of their files, without endings; [] where they have none

    def __len__(self) -> int:
        return self.source.num_images

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return pictures, (B, channels, H, W) in [0, 1]. Raises `UserError` for one that cannot be read."""
        pixels = np.empty((len(indices), 3, *self.size), np.uint8)
        _, bad = self.source.images.read(np.array(indices) % len(self), pixels)
        if bad:
            rule = f"{next(iter(bad.values()))}: repair it, or remove it."
            raise UserError(rule, about="condition_path", value=self.source.name)
        pictures = torch.from_numpy(pixels).float() / 255
        return grey(pictures, 0.0, np.empty(0)) if self.channels == 1 else pictures


def open_conditions(path: str | None, pipeline: JiTPipeline, size: tuple[int, int], model: str) -> Conditions | None:
    """Open what the network is shown; None for one that is shown nothing.

    Raises `UserError`: there are conditions for the one and not for the other, or they are no pictures.
    """
    channels = pipeline.transformer.config.condition_channels
    if not channels:
        if path is not None:
            raise UserError(
                f"{model} was trained without conditions: leave it out.", about="condition_path", value=path
            )
        return None
    if path is None:
        rule = "was trained with conditions: add --condition_path, a folder of pictures to show it."
        raise UserError(rule, about="model", value=model)
    if channels not in (1, 3):
        rule = f"conditions of {channels} channels are read from Python alone: "
        raise UserError(f"{rule}jit.load(...)(condition_image=...).", about="condition_path", value=path)
    with renamed_settings(data_path="condition_path"):
        source = open_images(path, streaming=False)
    paths = getattr(source.images, "paths", list)()
    return Conditions(source, size, channels, [Path(path).stem for path in paths])
