"""Pictures larger than those of the training, which a network sees through windows whose outputs are blended.

So each step of the ODE moves the whole picture (arXiv 2302.08113), and neighbouring windows agree where they overlap.
"""

import math
from collections.abc import Callable
from itertools import product
from operator import lt

import torch
from torch import Tensor

from jit_accel.base.errors import shown
from jit_accel.config.presets import Size, plain_size, sides_of

WINDOWS_AT_ONCE = 16


class TiledNetwork:
    """A network, called as it is, for pictures of any size: it sees windows of `tile` pixels that overlap by `overlap`.

    Both are a side, or (height, width). What belongs to single pixels (`condition_image`, as large as the picture) is
    cut with them. Each output is weighted by its distance from the window's edge, up to `overlap`. Raises `ValueError`
    where the two make no windows.
    """

    def __init__(self, network: Callable, tile: Size, overlap: Size, at_once: int | None = None):
        patch, self.tile, self.overlap = network.config.patch_size, sides_of(tile), sides_of(overlap)
        if any(side < patch or side % patch for side in self.tile):
            rule = f"such as {shown(network.config.img_size)}"
            raise ValueError(f"tile {shown(tile)} must be a multiple of the patch, {patch}, {rule}")
        if not all(0 <= part < side for part, side in zip(self.overlap, self.tile)):
            raise ValueError(f"overlap {shown(overlap)} must be at least 0 and below the tile, {shown(tile)}")
        self.network, self.config = network, network.config
        self.at_once = at_once or WINDOWS_AT_ONCE

    def __call__(
        self, sample: Tensor, timestep: Tensor, *labels: Tensor, return_dict: bool = True, **given: Tensor
    ) -> tuple[Tensor]:
        """Return (output (B, C, H, W), float32); `given` are the network's arguments, (B, ...) each."""
        sides = sample.shape[-2:]
        if any(map(lt, sides, self.tile)):
            rule = f"is larger than the picture, {sides[0]} x {sides[1]}: leave it out"
            raise ValueError(f"tile {shown(plain_size(self.tile))} {rule}")
        places = product(range(len(sample)), *map(starts, sides, self.tile, self.overlap))
        weight = self._weight(sample.device)
        total, weights = torch.zeros_like(sample, dtype=torch.float32), torch.zeros(sides, device=sample.device)
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        places = list(places)
        for first in range(0, len(places), self.at_once):
            some = places[first : first + self.at_once]
            rows = torch.tensor([row for row, _, _ in some], device=sample.device)
            told = {name: self._cut(value, some) if value.ndim == 4 else value[rows] for name, value in given.items()}
            seen = (self._cut(sample, some), times[rows], *(each[rows] for each in labels))
            outputs = self.network(*seen, **told, return_dict=False)[0].float()
            for (row, top, left), output in zip(some, outputs):
                rows_here, columns_here = slice(top, top + self.tile[0]), slice(left, left + self.tile[1])
                total[row, :, rows_here, columns_here] += weight * output
                if row == 0:
                    weights[rows_here, columns_here] += weight
        return (total / weights,)

    def _cut(self, pictures: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
        height, width = self.tile
        return torch.stack([pictures[row, :, top : top + height, left : left + width] for row, top, left in places])

    def _weight(self, device: torch.device) -> Tensor:
        """Return the weight of each pixel of a window, (height, width), above 0."""
        rows, columns = (_ramp(side, overlap, device) for side, overlap in zip(self.tile, self.overlap))
        return rows[:, None] * columns


def _ramp(side: int, overlap: int, device: torch.device) -> Tensor:
    places = torch.arange(side, device=device)
    return (torch.minimum(places, side - 1 - places) + 1.0).clamp(max=max(1, overlap))


def tiled(network: Callable, tile: Size | None, overlap: Size | None) -> Callable:
    """Return the network, through windows where `tile` is given; `overlap` is then a quarter of it unless given."""
    if tile is None:
        if overlap is not None:
            raise ValueError("overlap without tile, the size of the windows that overlap: give tile, or leave it out")
        return network
    tile = checked_pixels("tile", tile)
    overlap = tuple(side // 4 for side in sides_of(tile)) if overlap is None else checked_pixels("overlap", overlap)
    return TiledNetwork(network, tile, overlap)


def checked_pixels(name: str, value: Size) -> Size:
    """Return a whole number, or two of them. Raises `ValueError`."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise ValueError(f"{name} {shown(value)} must be a whole number of pixels, or (height, width)")
    return value if len(numbers) == 2 else numbers[0]


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where windows begin along a side: evenly, from its beginning to its end, overlapping by at least that."""
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    return [round(place * (side - tile) / max(1, count - 1)) for place in range(count)]
