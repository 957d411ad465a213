"""Classifier-free guidance (arXiv 2207.12598) on labels, on conditions, or on both, and by a worse network."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from jit_accel.model.call_arguments import GUIDED, checked_interval, checked_scale, guidance_weight
from jit_accel.model.scheduler import checked_choice
from jit_accel.model.tiles import tiled


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

    The `weight` of a time t on the host is looked up at each call: callbacks change it. A worse network, the `guide`,
    takes the place of what is left out `on` (autoguidance, arXiv 2406.02507).
    """

    def __init__(
        self,
        network: Callable,
        given: Mapping[str, Tensor],
        on: str,
        weight: Callable[[float], float],
        guide: Callable | None = None,
    ):
        self._network, self._given, self._on, self._weight, self._guide = network, given, on, weight, guide
        self._guided = None if guide else rows_with(given, on, network.config.num_classes)
        self._last_weight: float | None = None

    def __call__(self, z: Tensor, t: Tensor, t_host: float) -> Tensor:
        self._last_weight = weight = self._weight(t_host)
        if self._guide is not None and weight != 1:
            worse, better = (_output(network, z, t, **self._given) for network in (self._guide, self._network))
            return torch.lerp(worse, better, weight)
        return guided_prediction(self._network, z, t, self._given, weight, self._on, self._guided)

    def jumps_at(self, t_host: float) -> bool:
        """Return whether guidance has another weight than in the call before."""
        return self._last_weight not in (None, self._weight(t_host))


class GuidanceMixin:
    """Guides the calls of a pipeline: at a scale, away from no class or from a worse network."""

    @property
    def guidance_scale(self) -> float:
        """The guidance of the current or last call; what a callback sets acts from the next step on."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self._guidance_scale = checked_scale(value)

    @property
    def guide(self):
        """A worse network for the same images, smaller or from earlier in a training, away from which guidance leads.

        Set it to a network or a pipeline, or to None for classifier-free guidance; it is not saved. Raises `ValueError`
        for one that predicts something else, or takes other classes, conditions or numbers.
        """
        return getattr(self, "_guide", None)

    @guide.setter
    def guide(self, value) -> None:
        objective, network = getattr(getattr(value, "config", None), "objective", None), value
        if hasattr(value, "transformer"):
            network = value.transformer
        if network is not None and not hasattr(network, "config"):
            raise ValueError(f"guide {value!r}: give a network or a pipeline, such as jit_accel.load of a folder")
        if network is not None:
            both = network.config, self.transformer.config
            pairs = {name: tuple(_plain(it.get(name)) for it in both) for name in _SHARED}
            for name, usual in _OF_OBJECTIVE.items() if objective else ():
                pairs[name] = tuple(it.get(name, usual) for it in (objective, self.config.objective))
            wrong = [f"{name} {theirs}, not {own}" for name, (theirs, own) in pairs.items() if theirs != own]
            if wrong:
                raise ValueError(f"guide: it has {', '.join(wrong)}: take a model of the same data and prediction")
            network.eval()
        self._guide = network

    def _field(self, given: dict[str, Tensor], guidance_interval, on, tile, overlap) -> GuidedField:
        """Return the guided prediction, of a network that is `given` this, as a function of z, t, and t on the host."""
        interval = checked_interval(self.config.guidance_interval if guidance_interval is None else guidance_interval)
        on = self.config.guidance_on if on is None else checked_choice("guidance_on", on, GUIDED)
        guide = None if self.guide is None else tiled(self.guide.to(self._execution_device), tile, overlap)
        network = tiled(self.transformer, tile, overlap)
        return GuidedField(network, given, on, lambda t: guidance_weight(t, self._guidance_scale, interval), guide)


# What two networks have to have in common for one to guide the other, and their objectives.
_OF_OBJECTIVE = {"prediction_type": "x", "noise_scale": 1.0, "path": "noise"}
_SHARED = ("num_classes", "in_channels", "condition_channels", "vector_sizes", "has_several_labels")


def _plain(value):
    """Return a setting as all sources of a network give it: files have lists, older ones lack what is empty."""
    return list(value) or None if isinstance(value, tuple | list) else value or None


def _output(network: Callable, z: Tensor, t: Tensor, class_labels: Tensor, **more: Tensor) -> Tensor:
    return network(z, t, class_labels, **more, return_dict=False)[0].float()
