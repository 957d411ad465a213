"""Classifier-free guidance (arXiv 2207.12598) on labels, on conditions, or on both."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

GUIDED = ("label", "condition", "both")


def without(given: Mapping[str, Tensor], on: str, num_classes: int) -> dict[str, Tensor]:
    """Return what the network is `given`, its arguments by name, without what guidance acts `on`."""
    left = dict(given)
    if on != "condition":
        left["class_labels"] = torch.full_like(given["class_labels"], num_classes)
    if on != "label":
        left |= {name: torch.zeros_like(mask) for name, mask in given.items() if name.endswith("_mask")}
    return left


def rows_with(given: Mapping[str, Tensor], on: str, num_classes: int) -> Tensor | None:
    """Return the images, (k,), that have anything of what guidance acts `on`; None where all have."""
    left = without(given, on, num_classes)
    choices = [name for name in left if not given[name].is_floating_point()]  # labels and masks
    differs = torch.cat([(left[name] != given[name]).reshape(len(given[name]), -1) for name in choices], 1).any(1)
    return None if differs.all() else differs.nonzero().flatten()


def guided_prediction(
    network: Callable,
    z: Tensor,
    t: Tensor,
    given: Mapping[str, Tensor],
    weight: float,
    on: str = "both",
    guided: Tensor | None = None,
) -> Tensor:
    """Return the network's output under guidance, float32, by one call.

    Args:
        given: the network's arguments besides z (B, C, H, W) and t, (B, ...) each.
        guided: the rows that have what is left out, where not all do; only these are computed with and without it.
    """
    if weight == 1 or (guided is not None and len(guided) == 0):
        return _output(network, z, t, **given)
    left = without(given, on, network.config.num_classes)
    if weight == 0:
        return _output(network, z, t, **left)
    some_z, some = (z, given) if guided is None else (z[guided], {name: v[guided] for name, v in given.items()})
    both = {name: torch.cat([left[name], some[name]]) for name in given}
    outputs = _output(network, torch.cat([z, some_z]), t, **both)
    unconditional, conditional = outputs.split([len(z), len(some_z)])
    # v is affine in the prediction of x, e or v at a given z and t, so mixing outputs is mixing velocities.
    if guided is None:
        return torch.lerp(unconditional, conditional, weight)
    return unconditional.index_copy(0, guided, torch.lerp(unconditional[guided], conditional, weight))


class GuidedField:
    """The prediction of a network that is `given` its arguments, under guidance, as a function of z and t.

    The `weight` of a time t on the host is looked up at each call: callbacks change it.
    """

    def __init__(self, network: Callable, given: Mapping[str, Tensor], on: str, weight: Callable[[float], float]):
        self._network, self._given, self._on, self._weight = network, given, on, weight
        self._guided = rows_with(given, on, network.config.num_classes)
        self._last_weight: float | None = None

    def __call__(self, z: Tensor, t: Tensor, t_host: float) -> Tensor:
        self._last_weight = weight = self._weight(t_host)
        return guided_prediction(self._network, z, t, self._given, weight, self._on, self._guided)

    def jumps_at(self, t_host: float) -> bool:
        """Return whether guidance has another weight than in the call before."""
        return self._last_weight not in (None, self._weight(t_host))


def _output(network: Callable, z: Tensor, t: Tensor, class_labels: Tensor, **more: Tensor) -> Tensor:
    return network(z, t, class_labels, **more, return_dict=False)[0].float()
