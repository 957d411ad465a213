"""Mean and covariance from sums that grow batch by batch, and are kept apart for groups of images."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256  # a product of few rows costs as much to store as to compute


@dataclass
class Gaussian:
    """mean: float64 (D,). covariance: float64 (D, D)."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance; eigenvalues that rounding made negative count as zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Moments:
    """Sums in float64 for mean and covariance: totals (G, D), products (G, D, D) of x x^T, of G groups of images."""

    def __init__(self, size: int, device: torch.device | str = "cpu", groups: int = 1):
        self.counts = [0] * groups
        self.totals, self.products = zeros(device, groups, size), zeros(device, groups, size, size)
        self._waiting: list[list[Tensor]] = [[] for _ in range(groups)]

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, features: Tensor, groups: Tensor | None = None) -> None:
        """Add features (B, D), of these groups, int64 (B,) on the CPU; None where there is one group alone."""
        features = features.to(self.totals.device)
        parts = {0: features}
        if groups is not None:
            parts = {group: features[(groups == group).to(features.device)] for group in groups.unique().tolist()}
        for group, rows in parts.items():
            waiting = self._waiting[group]
            waiting.append(rows)
            if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
                self._flush(group)

    def _flush(self, group: int) -> None:
        if waiting := self._waiting[group]:
            rows = torch.cat(waiting).double()
            self._waiting[group] = []
            self.counts[group] += len(rows)
            self.totals[group] += rows.sum(0)
            self.products[group].addmm_(rows.T, rows)

    def gaussian(self, accelerator=None) -> Gaussian:
        """Return mean and unbiased covariance, of all processes' features where there is an accelerator."""
        for group in range(len(self.counts)):
            self._flush(group)
        counts = torch.tensor(self.counts, dtype=torch.float64)
        self.counts = sum_of_processes(counts, accelerator).long().tolist()
        self.totals = sum_of_processes(self.totals, accelerator)
        for products in self.products:  # one by one, since reducing them takes a copy
            products.copy_(sum_of_processes(products, accelerator))
        return _gaussian(self.count, self.totals.sum(0), self.products.sum(0))

    def without_each(self) -> Iterator[Gaussian]:
        """Yield `gaussian` of all but one group, for each in turn; after `gaussian`, which adds up the processes."""
        total, products = self.totals.sum(0), self.products.sum(0)
        for group, count in enumerate(self.counts):
            yield _gaussian(self.count - count, total - self.totals[group], products - self.products[group])


def _gaussian(count: int, total: Tensor, products: Tensor) -> Gaussian:
    mean = total / count
    return Gaussian(mean, (products - count * torch.outer(mean, mean)) / (count - 1))


def zeros(device: torch.device | str, *shape: int) -> Tensor:
    """Return zeros in float64, on the device if that has float64."""
    is_apple = torch.device(device).type == "mps"
    return torch.zeros(shape, dtype=torch.float64, device="cpu" if is_apple else device)


def sum_of_processes(values: Tensor, accelerator) -> Tensor:
    """Return the sum over all processes, the same on all; the values themselves where there is one."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum").to(values.device)
