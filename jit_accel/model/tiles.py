"""Pictures larger than those of the training, which a network sees through windows whose outputs are blended.

So each step of the ODE moves the whole picture (arXiv 2302.08113), and neighbouring windows agree where they overlap.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from jit_accel.config.presets import sides_of

WINDOWS_AT_ONCE = 16


class TiledNetwork:
    """A network, called as it is, for pictures of any size: it sees squares of `tile` pixels that overlap by `overlap`.

    What belongs to single pixels (`condition_image`, as large as the picture) is cut with them. Each output is weighted
    by its distance from the window's edge, up to `overlap`. Raises `ValueError` where the two make no windows.
    """

    def __init__(self, network: Callable, tile: int, overlap: int, at_once: int | None = None):
        patch = network.config.patch_size
        if tile < patch or tile % patch:
            side = min(sides_of(network.config.img_size))
            raise ValueError(f"tile {tile} must be a multiple of the patch, {patch}, such as {side}")
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap {overlap} must be at least 0 and below the tile, {tile}")
        self.network, self.config, self.tile, self.overlap = network, network.config, tile, overlap
        self.at_once = at_once or WINDOWS_AT_ONCE

    def __call__(
        self, sample: Tensor, timestep: Tensor, *labels: Tensor, return_dict: bool = True, **given: Tensor
    ) -> tuple[Tensor]:
        """Return (output (B, C, H, W), float32); `given` are the network's arguments, (B, ...) each."""
        sides = sample.shape[-2:]
        if min(sides) < self.tile:
            raise ValueError(f"tile {self.tile} is larger than the picture, {sides[0]} x {sides[1]}: leave it out")
        places = product(range(len(sample)), *(starts(side, self.tile, self.overlap) for side in sides))
        weight = self._weight(sample.device)
        total, weights = torch.zeros_like(sample, dtype=torch.float32), torch.zeros(sides, device=sample.device)
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        places = list(places)
        for first in range(0, len(places), self.at_once):
            some = places[first : first + self.at_once]
            rows = torch.tensor([row for row, _, _ in some], device=sample.device)
            told = {name: self._cut(value, some) if value.ndim == 4 else value[rows] for name, value in given.items()}
            shown = (self._cut(sample, some), times[rows], *(each[rows] for each in labels))
            outputs = self.network(*shown, **told, return_dict=False)[0].float()
            for (row, top, left), output in zip(some, outputs):
                rows_here, columns_here = slice(top, top + self.tile), slice(left, left + self.tile)
                total[row, :, rows_here, columns_here] += weight * output
                if row == 0:
                    weights[rows_here, columns_here] += weight
        return (total / weights,)

    def _cut(self, pictures: Tensor, places: list[tuple[int, int, int]]) -> Tensor:
        size = self.tile
        return torch.stack([pictures[row, :, top : top + size, left : left + size] for row, top, left in places])

    def _weight(self, device: torch.device) -> Tensor:
        """Return the weight of each pixel of a window, (tile, tile), above 0."""
        places = torch.arange(self.tile, device=device)
        edge = torch.minimum(places, self.tile - 1 - places) + 1.0
        ramp = edge.clamp(max=max(1, self.overlap))
        return ramp[:, None] * ramp


def tiled(network: Callable, tile: int | None, overlap: int | None) -> Callable:
    """Return the network, through windows where `tile` is given; `overlap` is then a quarter of it unless given."""
    if tile is None:
        if overlap is not None:
            raise ValueError("overlap without tile, the side of the windows that overlap: give tile, or leave it out")
        return network
    tile = checked_whole("tile", tile)
    return TiledNetwork(network, tile, tile // 4 if overlap is None else checked_whole("overlap", overlap))


def checked_whole(name: str, value: int) -> int:
    """Return a whole number. Raises `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} {value} must be a whole number of pixels")
    return value


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where windows begin along a side: evenly, from its beginning to its end, overlapping by at least that."""
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    return [round(place * (side - tile) / max(1, count - 1)) for place in range(count)]
